"""Coarse to fine: answer with few tokens; where the answer is not sure, look again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from ..errors import RunError
from ..evaluate import log_softmax
from ..prompts import Sample, placeholders, process
from ..sampling import Choose
from ..session import Read, Seen, Session, _pictures
from .buckets import Run, title
from .policy import Asked, Policy, Request
from .region import box_of

MEASURES = ("margin", "probability", "entropy")
OVER = ("first", "answer")
MODES = ("finer", "crop-beside", "crop-alone")


def sureness(logits: np.ndarray, measure: str) -> np.ndarray:
    """logits[B, V] -> [B], larger = surer: p1 - p2, p1, or minus the entropy in nats, of the model's own distribution (temperature 1)"""
    logp = log_softmax(logits)
    p = np.exp(logp)
    if measure == "entropy":
        return (p * np.where(p > 0, logp, 0)).sum(-1)
    best = np.partition(p, -2, -1)[:, -2:]
    return best[:, 1] - best[:, 0] if measure == "margin" else best[:, 1]


class CoarseToFine(Policy):
    """The training-free counterpart of AdaptVision (arXiv:2512.03794), whose request for a closer look is learned by reinforcement.

    Bucket after bucket answers, cheapest first; an answer is taken where its confidence is at least the bucket's threshold, and the last bucket's
    always. measure: margin (between the two likeliest tokens), probability, entropy. over: `first` token, known before any decode step, or
    the least sure token of the whole `answer`. mode: `finer` asks the next bucket about the same picture; `crop-beside` and `crop-alone` ask
    it about the most attended region, twice as wide and high, cut from the original picture: as one more picture behind it, or instead
    of it. A crop needs a bucket that cuts by attention inside the language model (its kept tokens say where it looked).
    """

    name: ClassVar[str] = "coarse-to-fine"
    settings: ClassVar[tuple[str, ...]] = ("measure", "over", "mode")

    def __init__(self, buckets: Sequence[Session], thresholds: Sequence[float] | None = None, *, measure: str = "margin", over: str = "answer",
                 mode: str = "finer") -> None:
        for name, value, known in (("measure", measure, MEASURES), ("over", over, OVER), ("mode", mode, MODES)):
            if value not in known:
                raise RunError(f"{self.name}: {name} {value!r} is none of {', '.join(known)}")
        super().__init__(buckets, thresholds)
        self.measure, self.over, self.mode, self.whole = measure, over, mode, mode == "finer"
        if mode != "finer":
            for session in self.buckets[:-1]:
                if not any(name.startswith("kept.") for name in _outputs(session)):
                    raise RunError(
                        f"{self.name}: mode {mode} needs to know where a bucket looked, and {title(session)} cuts nothing by attention inside the "
                        "language model; add a late cut to its recipe, such as drop-fastv{layer=6,keep=8}, or use mode finer"
                    )

    def bucket_of(self, signal: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
        sure = signal >= np.asarray(thresholds)[:, None]
        return np.where(sure.any(0), sure.argmax(0), len(thresholds))

    def always(self, bucket: int) -> list[float]:
        return [np.inf] * bucket + [-np.inf] * (len(self.buckets) - 1 - bucket)

    def decide(self, requests: list[Request], asked: Asked, thresholds: Sequence[float]) -> None:
        left, known = list(requests), Known()
        for bucket in range(len(self.buckets)):
            left = self.ask(bucket, left, known, asked, thresholds[bucket] if bucket < len(thresholds) else None)
            if not left:
                return

    def ask(self, bucket: int, requests: list[Request], known: Known, asked: Asked, threshold: float | None) -> list[Request]:
        """Let a bucket answer; -> the requests that it is not sure of."""
        samples = [r.sample for r in requests]
        seen, fresh = known.get(self, bucket, requests), False
        if seen is None:
            seen, fresh = self.see(bucket, requests, samples, asked), True
            known.put(bucket, requests, seen)
        read = self.read(bucket, samples, seen, asked)
        for request in requests:
            request.runs.append(Run(bucket, fresh, scale=_scale(request)))
        sure = np.ones(len(requests), bool)
        if threshold is not None:
            values = sureness(read.logits, self.measure)
            if self.over == "answer":
                values = self._whole(bucket, requests, read, asked)
            for request, value in zip(requests, values, strict=True):
                request.measured = float(value)
            sure = values >= threshold
        taken, rest = np.flatnonzero(sure), np.flatnonzero(~sure)
        if len(taken):
            if self.over == "first" or threshold is None:
                self.answer(bucket, [requests[i] for i in taken], read, taken, asked)
                for i in taken:
                    _count(requests[i])
            elif asked.stream:
                for token in requests[0].said["tokens"][0]:
                    asked.stream.put(np.array([token]))
                asked.stream.end()
        if self.mode != "finer":
            kept = {k: v for k, v in read.outputs.items() if k.startswith("kept.")}
            looked = _pictures(read.samples, read.seen, kept, self.buckets[bucket]._grid)
            for i in rest:
                requests[i].sample = closer(self.buckets[bucket], requests[i].sample, looked[i], self.mode)
            known.seen.clear()
        return [requests[i] for i in rest]

    def _whole(self, bucket: int, requests: Sequence[Request], read: Read, asked: Asked) -> np.ndarray:
        """Answer everything, and how sure the least sure token of each answer was, [B]."""
        watch = Watch(self.measure)
        self.answer(bucket, requests, read, range(len(requests)), asked, watch, live=False)
        for request in requests:
            _count(request)
        lengths = [len(t) for r in requests for t in r.said["tokens"]]
        return watch.least(lengths).reshape(len(requests), asked.copies).min(1)


class Known:
    """Features that earlier buckets computed, for buckets with the same vision stage."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, list[Request], Seen]] = []

    def put(self, bucket: int, requests: Sequence[Request], seen: Seen) -> None:
        self.seen.append((bucket, list(requests), seen))

    def get(self, policy: Policy, bucket: int, requests: Sequence[Request]) -> Seen | None:
        for other, had, seen in self.seen:
            if policy.shares(other, bucket):
                place = {id(r): i for i, r in enumerate(had)}
                return policy.buckets[bucket].again(seen, [place[id(r)] for r in requests])
        return None


class Watch:
    """Notes how sure every choice of a token was."""

    def __init__(self, measure: str) -> None:
        self.measure, self.steps = measure, []

    def __call__(self, choose: Choose) -> Choose:
        def noted(logits: np.ndarray, history: list[np.ndarray]) -> np.ndarray:
            self.steps.append(sureness(logits, self.measure))
            return choose(logits, history)

        return noted

    def least(self, lengths: Sequence[int]) -> np.ndarray:
        """Per row the least over its own tokens; what was fed behind an end is not counted."""
        table = np.stack(self.steps)
        return np.array([table[:n, b].min() for b, n in enumerate(lengths)])


def closer(session: Session, sample: Sample, looked: Sequence[Any], mode: str) -> Sample:
    """The request about the most attended region of its pictures: the crop behind them or instead of them. Without pictures: as it is."""
    boxes = [box_of(p) for p in looked]
    if not boxes:
        return sample
    at = int(np.argmax([weight for weight, _ in boxes]))
    crop = sample.pictures[at].crop(boxes[at][1])
    if mode == "crop-alone":
        return process(session.processor, sample.text, [*sample.pictures[:at], crop, *sample.pictures[at + 1 :]])
    marks = placeholders(session.processor)
    if not marks or marks[0] not in sample.text:
        raise RunError(f"coarse-to-fine: {type(session.processor).__name__} has no placeholder to put a second picture at; use mode crop-alone or finer")
    end = sample.text.rindex(marks[0]) + len(marks[0])
    tail = sample.text[end:]
    gap = tail[: len(tail) - len(tail.lstrip())] or " "
    return process(session.processor, f"{sample.text[:end]}{gap}{marks[0]}{tail}", [*sample.pictures, crop])


def _scale(request: Request) -> float:
    """Pictures of this run in terms of those of the request."""
    own = len(request.original.pictures)
    return len(request.sample.pictures) / own if own else 1.0


def _count(request: Request) -> None:
    """Note the decode steps of the answer just made: one less than its tokens, the first came with the prefill."""
    request.runs[-1] = replace(request.runs[-1], steps=sum(len(t) - 1 for t in request.said["tokens"]))


def _outputs(session: Session) -> list[str]:
    return [o["name"] for o in session.manifest["components"]["prefill"].get("outputs", [])]


__all__ = ["MEASURES", "MODES", "OVER", "CoarseToFine", "sureness"]
