"""Where did it go wrong: walk from the original to the artifact step by step and name the step, item and tensor at which agreement breaks.

Every step is run on the same items with the original's own answers fed in, so that all steps see the same tokens. A lowering must
repeat the numbers of
the step before it; a pass may change numbers, but not suddenly what the model says. NaN and infinity are a break anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .datasets import Item
from .errors import RunError
from .evaluate import request_of

KINDS = ("pass", "lowering")
ANSWER = 8  # tokens of an answer that are compared


@dataclass(frozen=True)
class Step:
    """One state on the way. `open` gives a session (a context manager) of it."""

    name: str
    kind: str
    open: Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Limits:
    """When a step counts as broken.

    error: largest difference of a lowering, relative to the tensor's largest value. floor, drop: a pass breaks agreement when fewer than
    `floor` of its tokens equal the original's and it lost more than `drop` against the step before.
    """

    error: float = 0.02
    floor: float = 0.85
    drop: float = 0.1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not 0 < value < 1:
                raise RunError(f"bisect: {name} is {value:g}; it must lie between 0 and 1")


@dataclass(frozen=True)
class Outcome:
    """One step: how often its tokens equal the original's, its largest relative difference from the step before, and what broke, if
    anything did.
    """

    name: str
    kind: str
    agreement: float
    error: float
    item: str | None = None
    tensor: str | None = None
    reason: str | None = None

    @property
    def broken(self) -> bool:
        return self.reason is not None


@dataclass(frozen=True)
class Finding:
    """All steps that ran; the walk ends with the first broken one."""

    outcomes: tuple[Outcome, ...]

    @property
    def culprit(self) -> Outcome | None:
        return next((o for o in self.outcomes if o.broken), None)

    def __str__(self) -> str:
        rows = [
            f"{'BROKEN' if o.broken else 'ok':7s} {o.name:40s} equal tokens {o.agreement:6.1%}, largest difference {o.error:.1e}"
            for o in self.outcomes
        ]
        bad = self.culprit
        end = (
            "no step breaks agreement"
            if bad is None
            else f"{bad.kind} {bad.name!r} breaks it: {bad.reason}; first at item {bad.item}, tensor {bad.tensor}"
        )
        return "\n".join([*rows, end])

    def as_dict(self) -> dict[str, Any]:
        return {"steps": [asdict(o) for o in self.outcomes], "culprit": asdict(self.culprit) if self.culprit else None}


Trace = dict[str, np.ndarray]  # tensor name -> value, in the order in which they are computed


def bisect(
    steps: Sequence[Step], items: Sequence[Item], limits: Limits = Limits(), progress: Callable[[str], None] | None = None
) -> Finding:
    """steps[0] is the original. Stops at the first step that breaks; steps are cheap to list and dear to open, so none is opened twice."""
    if not items or not steps:
        raise RunError("bisect: it needs at least one item and the original")
    say = progress or (lambda text: None)
    say(f"running {steps[0].name}")
    with steps[0].open() as session:
        answers = [
            session.generate([i.pictures()], **request_of(session, [(i, [])]), max_new_tokens=ANSWER, do_sample=False).tokens[0]
            for i in items
        ]
        original = [trace(session, i, a) for i, a in zip(items, answers, strict=True)]
    outcomes = [_judge(steps[0], items, original, original, original, 1.0, limits)]
    before = original
    for step in steps[1:]:
        if outcomes[-1].broken:
            break
        say(f"running {step.name}")
        with step.open() as session:
            now = [trace(session, i, a) for i, a in zip(items, answers, strict=True)]
        outcomes.append(_judge(step, items, original, before, now, outcomes[-1].agreement, limits))
        before = now
    return Finding(tuple(outcomes))


def trace(session: Any, item: Item, answer: np.ndarray) -> Trace:
    """Every stage's outputs with `answer` fed in token by token: vision.*, prefill.logits, decode.<step>.logits."""
    seen: Trace = {}
    engine = session.engine
    session.engine = _Recorder(engine, seen)
    try:
        batch = session.encode(session.prepare([item.pictures()], **request_of(session, [(item, [])]))).batch
        outputs, cache = engine.prefill(batch.feeds, batch.length + len(answer))
        seen["prefill.logits"] = np.asarray(outputs["logits"], np.float32)
        for step in range(len(answer) - 1):
            logits = engine.decode(cache, np.array([[answer[step]]], np.int64), batch.step_positions(step))
            seen[f"decode.{step + 1}.logits"] = np.asarray(logits, np.float32)
    finally:
        session.engine = engine
    return seen


class _Recorder:
    """An engine that keeps what its vision stage returns."""

    def __init__(self, engine: Any, seen: Trace):
        self.engine, self.seen = engine, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def vision(self, feeds: Any) -> Any:
        out = self.engine.vision(feeds)
        self.seen |= {f"vision.{k}": np.asarray(v, np.float32) for k, v in out.items() if not k.startswith("kept.")}
        return out


def _judge(
    step: Step, items: Sequence[Item], original: Sequence[Trace], before: Sequence[Trace], now: Sequence[Trace], last: float, limits: Limits
) -> Outcome:
    agreement = float(
        np.mean([_same(o[name], n[name]) for o, n in zip(original, now, strict=True) for name in o if name.endswith("logits")])
    )
    errors = [[(name, difference(b[name], n[name])) for name in b if name in n] for b, n in zip(before, now, strict=True)]
    finite = [e for part in errors for _, e in part if np.isfinite(e)]
    outcome = Outcome(step.name, step.kind, agreement, max(finite, default=0.0))
    for item, t in zip(items, now, strict=True):
        for name, value in t.items():
            if not np.isfinite(value).all():
                bad = int((~np.isfinite(value)).sum())
                return _broken(outcome, item, name, f"{bad} of {value.size} values are NaN or infinite")
    if step.kind == "lowering":
        for item, part in zip(items, errors, strict=True):
            for name, error in part:
                if error > limits.error:
                    return _broken(
                        outcome, item, name, f"it differs from the step before by {error:.1e} of its largest value (limit {limits.error:g})"
                    )
    elif agreement < limits.floor and agreement < last - limits.drop:
        name = _first_tensor(original, before, now)
        item = next(i for i, o, n in zip(items, original, now, strict=True) if name in o and not _same(o[name], n[name]))
        return _broken(outcome, item, name, f"equal tokens fell from {last:.1%} to {agreement:.1%}")
    return outcome


def _broken(outcome: Outcome, item: Item, tensor: str, reason: str) -> Outcome:
    return Outcome(outcome.name, outcome.kind, outcome.agreement, outcome.error, item.id, tensor, reason)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a.argmax(-1) == b.argmax(-1)).all())


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """Largest difference relative to the largest value of `a`; infinite when shapes differ."""
    if a.shape != b.shape:
        return float("inf")
    with np.errstate(invalid="ignore", over="ignore"):
        return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-9)) if a.size else 0.0


def _first_tensor(original: Sequence[Trace], before: Sequence[Trace], now: Sequence[Trace]) -> str:
    """The earliest kind of logits whose share of equal tokens fell by most of the fall: prefill, else the first decode step that did."""
    names = list(dict.fromkeys(n for t in original for n in t if n.endswith("logits")))

    def fall(name: str) -> float:
        having = [(o[name], b[name], n[name]) for o, b, n in zip(original, before, now, strict=True) if name in o]
        return float(np.mean([_same(o, b) for o, b, _ in having]) - np.mean([_same(o, n) for o, _, n in having]))

    falls = {name: fall(name) for name in names}
    return next(name for name in names if falls[name] >= 0.5 * max(falls.values()))
