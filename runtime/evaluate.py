"""A session over a data set: item by item into a results file, nothing lost when it stops and nothing computed twice when it goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import metrics
from .datasets import Item, take
from .errors import NumberError, RunError
from .prompts import placeholders
from .results import Log, Result, Run
from .stats import wilson

Progress = Callable[[int, int, float | None], None]  # items done, items in all, mean score so far
TOP = 64  # log-probabilities of the first token that are saved; the rest is kept as one number


@dataclass(frozen=True)
class Settings:
    """What shapes the answers; results of other settings are not continued. Batches are fixed by an item's place in the data set."""

    max_new_tokens: int = 64
    batch: int = 1
    logits: bool = False  # save the first token's likeliest log-probabilities: what agreement figures need


def evaluate(
    session: Any,
    items: Sequence[Item],
    path: str | Path,
    settings: Settings = Settings(),
    *,
    shard: tuple[int, int] = (1, 1),
    until: int | None = None,
    name: str = "",
    progress: Progress | None = None,
) -> Run:
    """Answer every item of the shard into the results file `path`, which is continued if it exists.

    until: only that many items for now; a later call goes on. Raises when items could not be run, after all others.
    """
    if settings.batch < 1 or settings.max_new_tokens < 1:
        raise RunError(f"evaluate: batch {settings.batch} and max_new_tokens {settings.max_new_tokens} must be at least 1")
    if settings.logits and session.engine is None:
        raise RunError("evaluate: a policy's answers come from several artifacts, so it has no log-probabilities to save; leave --logits out")
    mine = take(items, shard)
    log = Log(
        Path(path),
        {
            "name": name,
            "artifact": fingerprint(session),
            "data": digest(items),
            "settings": vars(settings),
            "shard": f"{shard[0]}/{shard[1]}",
        },
    )
    batches = [mine[i : i + settings.batch] for i in range(0, len(mine), settings.batch)]
    finished = [b for b in batches if all(i.id in log.done and log.done[i.id].digest == i.digest for i in b)]
    log.start(i.id for b in finished for i in b)
    wanted = batches if until is None else batches[: -(-until // settings.batch)]
    todo = [b for b in wanted if any(i.id not in log.done for i in b)]
    with watched(session, settings.logits) as watch:
        for batch in todo:
            log.append(_answer(session, watch, batch, settings))
            if progress:
                progress(len(log.done), len(mine), mean(log.done.values()))
    run = Run(log.header, {i.id: log.done[i.id] for b in wanted for i in b})
    failed = [r for r in run.errors if r.kind == "run"]
    if failed:
        raise RunError(
            f"evaluate: {len(failed)} of {len(mine)} items could not be run (first: {failed[0].id}: {failed[0].error}); the "
            f"others are kept in {path}"
        )
    return run


def fingerprint(session: Any) -> str:
    """Of the artifact's manifest, which holds the hashes of all its files."""
    return hashlib.sha256(json.dumps(session.manifest, sort_keys=True, default=str).encode()).hexdigest()[:16]


def digest(items: Sequence[Item]) -> str:
    return hashlib.sha256(" ".join(f"{i.id} {i.digest}" for i in items).encode()).hexdigest()[:16]


def mean(results: Any) -> float | None:
    scores = [r.score for r in results if r.score is not None]
    return sum(scores) / len(scores) if scores else None


def summary(run: Run, confidence: float = 0.95) -> list[dict[str, Any]]:
    """Overall and per slice: n, mean score, its two-sided interval, errors; and the yes-no figures where that metric is used."""
    groups: dict[str, list[Result]] = {"overall": list(run.results.values())}
    for r in run.results.values():
        groups.setdefault(f"{r.slice} ({r.metric})" if r.slice == "overall" else r.slice, []).append(r)
    rows = []
    for name, part in groups.items():
        scores = [r.score for r in part if r.score is not None]
        low, high = wilson(sum(scores), len(scores), confidence) if scores else (None, None)
        rows.append(
            {
                "slice": name,
                "metric": "/".join(sorted({r.metric or "none" for r in part})),
                "n": len(part),
                "score": sum(scores) / len(scores) if scores else None,
                "low": low,
                "high": high,
                "errors": sum(r.error is not None for r in part),
            }
        )
    return rows


def binary(run: Run, items: Sequence[Item]) -> dict[str, float] | None:
    """Precision, recall and F1 of the yes-no items, None when there are none."""
    asked = [
        (run.results[i.id].answers[-1], i.turns[-1].answers[0])
        for i in items
        if i.metric == "yes_no" and i.id in run.results and run.results[i.id].answers
    ]
    return metrics.binary_report(*zip(*asked, strict=True)) if asked else None


# -- answering


def _answer(session: Any, watch: Watch, batch: Sequence[Item], settings: Settings) -> list[Result]:
    """One batch; when it fails, its items one by one, so that one bad item does not cost its neighbours."""
    try:
        return _talk(session, watch, batch, settings)
    except RunError as error:
        if len(batch) > 1:
            return [r for item in batch for r in _answer(session, watch, [item], settings)]
        item, numbers = batch[0], isinstance(error, NumberError)
        return [_result(item, [], [], {}, [], 0, error=str(error), kind="model" if numbers else "run")]


def _talk(session: Any, watch: Watch, batch: Sequence[Item], settings: Settings) -> list[Result]:
    """All turns of all items; later turns carry the model's own earlier answers."""
    pictures = [item.pictures() for item in batch]
    answers: list[list[str]] = [[] for _ in batch]
    first: list[list[Mapping[str, Any]]] = [[] for _ in batch]
    count, ms = [0] * len(batch), [dict[str, Any]() for _ in batch]
    for turn in range(max(len(i.turns) for i in batch)):
        now = [k for k, i in enumerate(batch) if len(i.turns) > turn]
        made = session.generate(
            [pictures[k] for k in now],
            **request_of(session, [(batch[k], answers[k]) for k in now]),
            max_new_tokens=settings.max_new_tokens,
            do_sample=False,
        )
        for place, k in enumerate(now):
            answers[k].append(made.texts[place])
            count[k] += len(made.tokens[place])
            if settings.logits:
                first[k].append(watch.first(place))
            if turn == 0:
                ms[k] = {
                    **{n: round(v, 3) for n, v in made.timings.as_dict().items() if isinstance(v, float)},
                    "kv_bytes": made.kv_bytes,
                    "batch": len(now),
                }
    return [_result(i, a, f, m, i.turns, c) for i, a, f, m, c in zip(batch, answers, first, ms, count, strict=True)]


def request_of(session: Any, talks: Sequence[tuple[Item, list[str]]]) -> dict[str, Any]:
    """generate's prompt= or messages=, one entry per conversation."""
    if getattr(session.processor, "chat_template", None):
        return {"messages": [messages(item, said) for item, said in talks]}
    marks = placeholders(session.processor)
    if any(len(item.turns) > 1 for item, _ in talks):
        raise RunError(f"item {talks[0][0].id}: it has several turns, and this model has no chat template to put them in")
    return {"prompt": [f"{marks[0] if marks else ''} ".lstrip() * len(item.images) + item.turns[0].question for item, _ in talks]}


def messages(item: Item, said: Sequence[str]) -> list[dict[str, Any]]:
    """The chat up to the next question; pictures stand before the first one."""
    turns = item.turns[: len(said) + 1]
    chat: list[dict[str, Any]] = [
        {"role": "user", "content": [*({"type": "image"} for _ in item.images), {"type": "text", "text": turns[0].question}]}
    ]
    for answer, turn in zip(said, turns[1:], strict=True):
        chat += [
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
            {"role": "user", "content": [{"type": "text", "text": turn.question}]},
        ]
    return chat


def _result(
    item: Item,
    answers: Sequence[str],
    first: Sequence[Mapping[str, Any]],
    ms: Mapping[str, Any],
    turns: Sequence[Any],
    tokens: int,
    error: str | None = None,
    kind: str | None = None,
) -> Result:
    scores = (
        [metrics.score(a, t.answers, item.metric, item.options) for a, t in zip(answers, turns, strict=True)]
        if item.labelled and answers
        else []
    )
    score = round(sum(scores) / len(scores), 9) if scores else 0.0 if kind == "model" and item.labelled else None
    return Result(
        item.id,
        item.digest,
        item.slice,
        item.metric,
        tuple(answers),
        tuple(scores),
        score,
        item.group,
        len(item.turns),
        error,
        kind,
        tokens,
        tuple(first),
        ms,
    )


# -- watching the numbers


class Watch:
    """An engine that keeps the first token's logits as they pass by."""

    def __init__(self, engine: Any, keep: bool):
        self.engine, self.keep, self.logits = engine, keep, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def prefill(self, *arguments: Any, **options: Any) -> Any:
        outputs, cache = self.engine.prefill(*arguments, **options)
        self.logits = np.asarray(outputs["logits"], np.float32) if self.keep else None
        return outputs, cache

    def first(self, sample: int) -> dict[str, Any]:
        """The likeliest TOP tokens and the log of what is left."""
        return top(log_softmax(self.logits[sample]))


@contextmanager
def watched(session: Any, keep: bool = False) -> Iterator[Watch]:
    """The session with its engine watched, as before afterwards."""
    engine = session.engine
    session.engine = watch = Watch(engine, keep)
    try:
        yield watch
    finally:
        session.engine = engine


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """over the last axis, in double"""
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def top(logp: np.ndarray) -> dict[str, Any]:
    """logp[V] -> ids and log-probabilities, the largest first, six digits; `rest` is the others' probability."""
    ids = np.argsort(-logp, kind="stable")[:TOP]
    return {
        "ids": ids.tolist(),
        "logp": [round(float(v), 6) for v in logp[ids]],
        "rest": round(max(0.0, 1 - float(np.exp(logp[ids]).sum())), 9),
    }
