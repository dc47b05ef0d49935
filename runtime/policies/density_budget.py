"""Density budget: the bucket follows from how much there is to see."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ..errors import RunError
from ..session import Seen, Session
from .buckets import Run
from .density import FROM_PICTURE, SIGNALS, densest, of_features, of_picture
from .policy import Asked, Policy, Request


class DensityBudget(Policy):
    """Dense pictures get more tokens, before the language model runs.

    LangDC (arXiv:2509.00969) lets a captioner say how much a clip holds and ZipVL (arXiv:2410.08584) counts the tokens that hold a share of the
    attention; here a figure of the picture or of the vision stage's features chooses among compiled artifacts. signal: edges, detail (of the
    pixels: nothing runs before the choice); mass, dissimilarity, rank (of the features that the cheapest bucket's vision stage makes: it
    runs first, and again where the chosen bucket's vision stage is another one). A request goes to bucket k when its density is at least
    the k-th threshold; thresholds rise.
    """

    name: ClassVar[str] = "density-budget"
    settings: ClassVar[tuple[str, ...]] = ("signal",)

    def __init__(self, buckets: Sequence[Session], thresholds: Sequence[float] | None = None, *, signal: str = "edges") -> None:
        if signal not in SIGNALS:
            raise RunError(f"{self.name}: signal {signal!r} is none of {', '.join(SIGNALS)}")
        super().__init__(buckets, thresholds)
        self.signal = signal

    def _check(self, thresholds: Sequence[float]) -> None:
        super()._check(thresholds)
        if any(a > b for a, b in itertools.pairwise(thresholds)):
            raise RunError(f"{self.name}: thresholds must not fall, found {list(thresholds)}")

    def bucket_of(self, signal: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
        return (signal >= np.asarray(thresholds)[:, None]).sum(0)

    def always(self, bucket: int) -> list[float]:
        return [-np.inf] * bucket + [np.inf] * (len(self.buckets) - 1 - bucket)

    def decide(self, requests: list[Request], asked: Asked, thresholds: Sequence[float]) -> None:
        values, seen = self.measure(requests, asked)
        buckets = self.bucket_of(np.tile(values, (len(thresholds), 1)), thresholds)
        for bucket in sorted(set(buckets.tolist())):
            self.ask(bucket, requests, np.flatnonzero(buckets == bucket), seen, asked)

    def measure(self, requests: Sequence[Request], asked: Asked) -> tuple[np.ndarray, Seen | None]:
        """-> density[requests], and what the cheapest bucket's vision stage saw, where it had to run"""
        if self.signal in FROM_PICTURE:
            values, seen = [densest([of_picture(p, self.signal) for p in r.sample.pictures]) for r in requests], None
        else:
            seen = self.see(0, requests, [r.sample for r in requests], asked)
            rows = seen.features[self.buckets[0].facts["features"][0]]
            values = [self._of_rows(rows[b], seen.batch.layouts[b].groups) for b in range(len(requests))]
        for request, value in zip(requests, values, strict=True):
            request.measured = value
        return np.array(values), seen

    def ask(self, bucket: int, requests: Sequence[Request], chosen: np.ndarray, seen: Seen | None, asked: Asked) -> None:
        """Let a bucket answer the requests `chosen`."""
        mine = [requests[i] for i in chosen]
        samples = [r.sample for r in mine]
        again = seen is not None and self.shares(0, bucket)
        own = self.buckets[bucket].again(seen, chosen.tolist()) if again else self.see(bucket, mine, samples, asked)
        read = self.read(bucket, samples, own, asked)
        self.answer(bucket, mine, read, range(len(mine)), asked)
        for request in mine:
            steps = sum(len(t) - 1 for t in request.said["tokens"])
            request.runs += self.runs_of(bucket, steps)

    def runs_of(self, bucket: int, steps: int) -> list[Run]:
        """A look of the cheapest vision stage that could not be used again is a run without prefill."""
        looked = self.signal not in FROM_PICTURE and not self.shares(0, bucket)
        return [*([Run(0, prefill=False)] if looked else []), Run(bucket, steps=steps)]

    def _of_rows(self, rows: np.ndarray, groups: Sequence[Any]) -> float:
        """rows[visual, D] of one request, pictures one after another"""
        ends = np.cumsum([len(g) for g in groups])[:-1]
        return densest([of_features(part, self.signal) for part in np.split(rows, ends) if len(part)])
