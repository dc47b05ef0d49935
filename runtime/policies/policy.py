"""What all policies share: buckets that are checked and priced, a batch that is split and put together again, one result."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import RunError
from ..prompts import Sample
from ..result import Generation, Timings, cached_rows, clock
from ..sampling import Choose, chooser
from ..session import Read, Seen, Session, Stop, Stream, _pictures, check_copies
from .buckets import Run, check, vision_of


@dataclass(frozen=True)
class Answer(Generation):
    """A generation, and how the policy came to it. `kept` is empty where buckets with different sites answered; `pictures` have it all.

    timings: the sum over all runs. flops: per request over all runs, by the forecasts of the artifacts.
    """

    buckets: tuple[int, ...] = ()  # per request the bucket that answered
    confidence: tuple[float | None, ...] = ()  # per request what was compared with the thresholds last; None where nothing was
    runs: tuple[tuple[Run, ...], ...] = ()
    flops: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        sure = [c if c is not None and np.isfinite(c) else None for c in self.confidence]
        how = {"buckets": list(self.buckets), "confidence": sure, "runs": [[vars(r) for r in runs] for runs in self.runs]}
        return {**super().as_dict(), **how, "flops": list(self.flops)}


@dataclass
class Request:
    """One prompt on its way through the buckets."""

    sample: Sample  # as the next bucket is asked
    original: Sample
    rows: range  # its pictures among those of the call
    runs: list[Run] = field(default_factory=list)
    measured: float | None = None
    said: dict[str, Any] = field(default_factory=dict)  # its row of the result


@dataclass(frozen=True)
class Asked:
    """What one `generate` call wants, for every bucket the same."""

    config: Mapping[str, Any]
    steps: int
    limit: int | None
    seed: int | None
    extra: Mapping[str, Any]
    pictures: int
    copies: int
    timings: Timings
    stream: Stream | None


class Policy(ABC):
    """Several opened artifacts of one model, cheapest first. `generate` answers; `close` (or `with`) closes all of them."""

    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]]  # attributes that are saved and given to __init__ again
    engine: Any = None  # a policy has no single one
    whole: bool = True  # the last bucket is asked what the caller asked, not about a crop

    def __init__(self, buckets: Sequence[Session], thresholds: Sequence[float] | None = None) -> None:
        """thresholds: one per step from a bucket to the next; None: to be calibrated."""
        self.buckets = tuple(buckets)
        self.prices = check(self.buckets)
        self.thresholds = None if thresholds is None else tuple(float(t) for t in thresholds)
        if self.thresholds is not None:
            self._check(self.thresholds)
        self.calibration: Any = None

    # -- what a policy decides

    @abstractmethod
    def decide(self, requests: list[Request], asked: Asked, thresholds: Sequence[float]) -> None:
        """Answer all requests: fill `said`, `runs`, `measured`."""

    @abstractmethod
    def bucket_of(self, signal: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
        """signal[thresholds, n] -> the bucket that answers, [n]"""

    @abstractmethod
    def always(self, bucket: int) -> list[float]:
        """Thresholds with which this bucket answers every request."""

    # -- the main job

    def generate(
        self,
        images: Any = None,
        prompt: str | Sequence[str] | None = None,
        *,
        messages: Sequence[Any] | None = None,
        max_new_tokens: int | None = None,
        streamer: Any = None,
        seed: int | None = None,
        extra: Mapping[str, Any] | None = None,
        max_cache_tokens: int | None = None,
        num_return_sequences: int = 1,
        **options: Any,
    ) -> Answer:
        """As `Session.generate`. A streamer gets nothing before the bucket that answers is known."""
        if self.thresholds is None:
            raise RunError(f"{self.name}: it has no thresholds; give them, or find them with calibrate()")
        check_copies(num_return_sequences)
        first, timings = self.buckets[0], Timings()
        known = {n for b in self.buckets for n in b.facts.get("vision_extra") or ()}
        if unknown := sorted(set(extra or {}) - known):
            raise RunError(f"generate: no artifact of this policy has extra inputs {unknown}; they take {sorted(known) or 'none'}")
        with clock(timings, "preprocess_ms"):
            samples = first.prepare(images, prompt, messages)
        stream = Stream(streamer, first.tokenizer, len(samples) * num_return_sequences) if streamer is not None else None
        ends = np.cumsum([0, *(len(s.pictures) for s in samples)]).tolist()
        requests = [Request(s, s, range(*ends[i : i + 2])) for i, s in enumerate(samples)]
        config, steps = first._config(options), first._budget(max_new_tokens)
        asked = Asked(config, steps, max_cache_tokens, seed, extra or {}, ends[-1], num_return_sequences, timings, stream)
        self.decide(requests, asked, self.thresholds)
        return self._together(requests, timings)

    # -- parts that policies are made of

    def see(self, bucket: int, requests: Sequence[Request], samples: Sequence[Sample], asked: Asked) -> Seen:
        """The vision stage of a bucket."""
        session, rows = self.buckets[bucket], [i for r in requests for i in r.rows]
        wanted = {n: np.asarray(a) for n, a in asked.extra.items() if n in (session.facts.get("vision_extra") or ())}
        own = {n: a[rows] if a.ndim > 1 and len(a) == asked.pictures else a for n, a in wanted.items()}  # a row per picture, or one for all
        return session.encode(samples, asked.timings, own)

    def read(self, bucket: int, samples: Sequence[Sample], seen: Seen, asked: Asked) -> Read:
        session = self.buckets[bucket]
        return session.read(samples, seen, asked.steps, asked.timings, session._limit(asked.limit))

    def answer(self, bucket: int, requests: Sequence[Request], read: Read, chosen: Sequence[int], asked: Asked, watch: Any = None,
               live: bool = True) -> None:
        """Decode the rows `chosen` of a prefill, for `requests`; watch: sees the logits [B, V] that every token is chosen from."""
        session, index = self.buckets[bucket], np.repeat(np.asarray(chosen), asked.copies)
        part = read if len(index) == read.batch.size and asked.copies == 1 else read.take(index)
        choose: Choose = chooser(asked.config, session.eos, [len(p.tokens) for p in part.batch.layouts], asked.seed)
        stop = Stop(asked.steps, session._limit(asked.limit))
        tokens, finish = session._decode(part.batch, part.logits, part.cache, stop, watch(choose) if watch else choose, asked.timings,
                                         asked.stream if live else None)
        kept = {k: v for k, v in read.outputs.items() if k.startswith("kept.")}
        pictures = _pictures(read.samples, read.seen, kept, session._grid)
        bytes_ = getattr(part.cache, "nbytes", None)
        for place, (request, row) in enumerate(zip(requests, chosen, strict=True)):
            own = slice(place * asked.copies, (place + 1) * asked.copies)
            request.said = {
                "bucket": bucket, "tokens": tokens[own], "finish": finish[own], "layout": read.seen.batch.layouts[row], "pictures": pictures[row],
                "kept": {k: v[row : row + 1] for k, v in kept.items()} | _per_image(read.seen, row),
                "kv_rows": None if (rows := cached_rows(read.outputs)) is None else rows[:, row],
                "kv_bytes": None if bytes_ is None else bytes_ // len(chosen),
                "clip": part.cache.clip_rate() if hasattr(part.cache, "clip_rate") else None,
            }

    def shares(self, a: int, b: int) -> bool:
        """Is the vision stage of two buckets one and the same?"""
        return a == b or vision_of(self.buckets[a]) == vision_of(self.buckets[b])

    def flops(self, runs: Sequence[Run]) -> float:
        return float(sum(self.prices[r.bucket].flops(r) for r in runs))

    def calibrate(self, data: Sequence[Any], **options: Any) -> Policy:
        """This policy with thresholds found on unlabelled data; see `calibrate.calibrate`."""
        from .calibrate import calibrate

        return calibrate(self, data, **options)

    def save(self, path: str | Path) -> Path:
        """One YAML file that names the artifacts and their hashes."""
        from .saved import save

        return save(self, Path(path))

    # -- as a session

    @property
    def processor(self) -> Any:
        return self.buckets[0].processor

    @property
    def manifest(self) -> dict[str, Any]:
        """What identifies results of this policy."""
        own = {"policy": self.name, "thresholds": self.thresholds, **{n: getattr(self, n) for n in self.settings}}
        return {**own, "buckets": [b.manifest for b in self.buckets]}

    def close(self) -> None:
        for bucket in self.buckets:
            bucket.close()

    def __enter__(self) -> Policy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self, thresholds: Sequence[float]) -> None:
        if len(thresholds) != len(self.buckets) - 1 or np.isnan(thresholds).any():
            raise RunError(f"{self.name}: {len(self.buckets)} artifacts need {len(self.buckets) - 1} thresholds (numbers), found {list(thresholds)}")

    def _together(self, requests: Sequence[Request], timings: Timings) -> Answer:
        said, session = [r.said for r in requests], self.buckets[0]
        tokens = [t for s in said for t in s["tokens"]]
        rows, sizes = [s["kv_rows"] for s in said], [s["kv_bytes"] for s in said]
        one = len({(s["bucket"], *((k, v.shape[1:]) for k, v in s["kept"].items())) for s in said}) == 1
        return Answer(
            texts=tuple(session.text_of(t) for t in tokens),
            tokens=tuple(tokens),
            timings=timings,
            kept={k: np.concatenate([s["kept"][k] for s in said]) for k in said[0]["kept"]} if one else {},
            pictures=tuple(s["pictures"] for s in said),
            layouts=tuple(s["layout"] for s in said),
            kv_rows=np.stack(rows, 1) if all(r is not None and len(r) == len(rows[0]) for r in rows) else None,
            kv_bytes=sum(sizes) if all(n is not None for n in sizes) else None,
            kv_clip_rate=said[0]["clip"] if len({s["bucket"] for s in said}) == 1 else None,
            finish=tuple(f for s in said for f in s["finish"]),
            buckets=tuple(s["bucket"] for s in said),
            confidence=tuple(r.measured for r in requests),
            runs=tuple(tuple(r.runs) for r in requests),
            flops=tuple(self.flops(r.runs) for r in requests),
        )


def _per_image(seen: Seen, row: int) -> dict[str, np.ndarray]:
    """The vision stage's kept.<site> of one sample's pictures."""
    start = sum(len(g) for g in seen.groups[:row])
    return {k: v[start : start + len(seen.groups[row])] for k, v in seen.kept.items()}
