"""Where did it go wrong: walk from the original to the artifact step by step and name the step, item and tensor at which agreement breaks.

Every step is run on the same items with the original's own answers fed in, so that all steps see the same tokens. A lowering must repeat
the numbers of the step before it; a pass may change numbers, and so may a lowering that keeps other visual tokens (a tie that rounding
decides), but not suddenly what the model says. NaN and infinity are a break anywhere; where the step runs in plain torch, the operation
that makes them is named too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ..export.errors import LowerError
from .datasets import Item
from .errors import NumberError, RunError
from .evaluate import request_of

KINDS = ("pass", "lowering")
ANSWER = 8  # tokens of an answer that are compared


@dataclass(frozen=True)
class Step:
    """One state on the way. `open` gives a session (a context manager) of it; a RunError or LowerError there means: not on this machine."""

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
    """One step: how often its tokens equal the original's, its largest relative difference from the step before, how many items kept other
    visual tokens than there, and what broke, if anything did. `skipped`: why it could not run here.
    """

    name: str
    kind: str
    agreement: float
    error: float
    moved: int = 0
    item: str | None = None
    tensor: str | None = None
    reason: str | None = None
    operation: str | None = None
    skipped: str | None = None

    @property
    def broken(self) -> bool:
        return self.reason is not None


@dataclass(frozen=True)
class Finding:
    """All steps that were tried; the walk ends with the first broken one."""

    outcomes: tuple[Outcome, ...]

    @property
    def culprit(self) -> Outcome | None:
        return next((o for o in self.outcomes if o.broken), None)

    @property
    def skipped(self) -> tuple[Outcome, ...]:
        return tuple(o for o in self.outcomes if o.skipped)

    @property
    def exit_code(self) -> int:
        """0 no step breaks, 1 one does, 4 none of those that could run here"""
        return 1 if self.culprit else 4 if self.skipped else 0

    def __str__(self) -> str:
        return "\n".join([*map(_line, self.outcomes), self._end()])

    def _end(self) -> str:
        bad = self.culprit
        if bad is not None:
            where = f", operation {bad.operation}" if bad.operation else ""
            return f"{bad.kind} {bad.name!r} breaks it: {bad.reason}; first at item {bad.item}, tensor {bad.tensor}{where}"
        if self.skipped:
            return f"no step that runs on this machine breaks agreement; not tried: {', '.join(o.name for o in self.skipped)}"
        return "no step breaks agreement"

    def as_dict(self) -> dict[str, Any]:
        return {
            "steps": [asdict(o) for o in self.outcomes],
            "culprit": asdict(self.culprit) if self.culprit else None,
            "exit_code": self.exit_code,
        }


def _line(o: Outcome) -> str:
    if o.skipped:
        return f"not run {o.name:40s} {o.skipped}"
    moved = f", {o.moved} items kept other tokens" if o.moved else ""
    return f"{'BROKEN' if o.broken else 'ok':7s} {o.name:40s} equal tokens {o.agreement:6.1%}, largest difference {o.error:.1e}{moved}"


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
        answers = [_answer(session, i) for i in items]
        original = [trace(session, i, a) for i, a in zip(items, answers, strict=True)]
        first = _judge(steps[0], items, original, original, original, 1.0, limits)
        outcomes = [_located(first, session, items, answers)]
    before, last = original, 1.0
    for step in steps[1:]:
        if outcomes[-1].broken:
            break
        say(f"running {step.name}")
        try:
            opened = step.open()
        except (RunError, LowerError) as error:
            outcomes.append(Outcome(step.name, step.kind, float("nan"), float("nan"), skipped=str(error)))
            continue
        with opened as session:
            now = [trace(session, i, a) for i, a in zip(items, answers, strict=True)]
            outcomes.append(_located(_judge(step, items, original, before, now, last, limits), session, items, answers))
        before, last = now, outcomes[-1].agreement
    return Finding(tuple(outcomes))


def _answer(session: Any, item: Item) -> np.ndarray:
    """The original's own tokens; one stands for all when there is no answer, so that the trace can say where numbers break."""
    request = request_of(session, [(item, [])])
    try:
        return session.generate([item.pictures()], **request, max_new_tokens=ANSWER, do_sample=False).tokens[0]
    except NumberError:
        return np.zeros(1, np.int64)


def trace(session: Any, item: Item, answer: np.ndarray) -> Trace:
    """Every stage's outputs with `answer` fed in token by token: vision.*, kept.*, prefill.logits, decode.<step>.logits."""
    seen: Trace = {}
    engine = session.engine
    session.engine = _Recorder(engine, seen)
    try:
        batch = session.encode(session.prepare([item.pictures()], **request_of(session, [(item, [])]))).batch
        outputs, cache = engine.prefill(batch.feeds, batch.length + len(answer))
        seen |= {k: np.asarray(v) for k, v in outputs.items() if k.startswith("kept.")}
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
        for name, value in out.items():
            kept = name.startswith("kept.")
            self.seen[name if kept else f"vision.{name}"] = np.asarray(value) if kept else np.asarray(value, np.float32)
        return out


def _judge(
    step: Step, items: Sequence[Item], original: Sequence[Trace], before: Sequence[Trace], now: Sequence[Trace], last: float, limits: Limits
) -> Outcome:
    agreement = float(
        np.mean([_same(o[name], n[name]) for o, n in zip(original, now, strict=True) for name in o if name.endswith("logits")])
    )
    moved = [any(n.startswith("kept.") and not np.array_equal(b[n], t[n]) for n in b if n in t) for b, t in zip(before, now, strict=True)]
    errors = [
        [] if other else [(name, difference(b[name], n[name])) for name in b if name in n and not name.startswith("kept.")]
        for b, n, other in zip(before, now, moved, strict=True)
    ]
    finite = [e for part in errors for _, e in part if np.isfinite(e)]
    outcome = Outcome(step.name, step.kind, agreement, max(finite, default=0.0), sum(moved) if step.kind == "lowering" else 0)
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
    if agreement < limits.floor and agreement < last - limits.drop:
        name = _first_tensor(original, before, now)
        item = next(i for i, o, n in zip(items, original, now, strict=True) if name in o and not _same(o[name], n[name]))
        return _broken(outcome, item, name, f"equal tokens fell from {last:.1%} to {agreement:.1%}")
    return outcome


def _broken(outcome: Outcome, item: Item, tensor: str, reason: str) -> Outcome:
    return replace(outcome, item=item.id, tensor=tensor, reason=reason)


def _located(outcome: Outcome, session: Any, items: Sequence[Item], answers: Sequence[np.ndarray]) -> Outcome:
    """With the operation that first made NaN or infinity, where that is what broke and the engine keeps its graphs."""
    modules = getattr(session.engine, "modules", None)
    if not outcome.broken or outcome.tensor is None or "NaN" not in str(outcome.reason) or not modules:
        return outcome
    item, answer = next((i, a) for i, a in zip(items, answers, strict=True) if i.id == outcome.item)
    found: list[str] = []
    kept = dict(modules)
    try:
        for stage, module in kept.items():
            modules[stage] = _watched(module, stage, found)
        trace(session, item, answer)
    finally:
        modules.update(kept)
    return replace(outcome, operation=found[0]) if found else outcome


def _watched(module: Any, stage: str, found: list[str]) -> Callable[..., Any]:
    """The graph, node by node: notes the first result that is not finite though all that went in is."""
    import torch

    if not isinstance(module, torch.fx.GraphModule):
        return module

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            out = super().run_node(n)
            inputs = [self.env[i] for i in n.all_input_nodes if isinstance(self.env.get(i), torch.Tensor)]
            if not found and n.op == "call_function" and inputs and not _finite(out) and all(map(_finite, inputs)) and not _masks(n):
                found.append(f"{n.name} of {stage}{_weight(n)}")
            return out

    return Watch(module, garbage_collect_values=False).run


def _finite(value: Any) -> bool:
    import torch

    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())


def _masks(node: Any) -> bool:
    """Masks are made with infinity on purpose."""
    return any(word in str(node.target) for word in ("where", "masked_fill", "full", "scalar_tensor", "log.default"))


def _weight(node: Any) -> str:
    """The parameter that the operation reads, maybe through a cast"""
    for source in node.all_input_nodes:
        while source.op == "call_function" and len(source.all_input_nodes) == 1:
            source = source.all_input_nodes[0]
        if source.op == "get_attr":
            return f" (reads {source.target})"
    return ""


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
