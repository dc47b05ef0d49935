"""Latency of a candidate against its baseline at several batch sizes: bench's alternating repetitions, percentiles, ratios with
intervals, memory.

`ttft` is preprocessing, encoder, projector, prefill (with the selection of tokens inside it) and the choice of the first token.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .bench import Request, Samples, measure, peak_rss
from .session import Session
from .stats import ratio_interval


@dataclass(frozen=True)
class Stage:
    """One stage at one batch size; milliseconds. `ratio` is candidate over baseline with its interval, None without a baseline."""

    name: str
    batch: int
    candidate: dict[str, float]
    baseline: dict[str, float] | None
    ratio: tuple[float, float, float] | None
    pairs: tuple[tuple[float, ...], tuple[float, ...]]  # candidate, baseline


@dataclass(frozen=True)
class Timed:
    """The whole measurement."""

    stages: tuple[Stage, ...]
    tokens_per_second: dict[int, tuple[float, float | None]]  # batch -> candidate, baseline: new tokens of a whole request
    kv_bytes: dict[int, tuple[int | None, int | None]]
    peak_rss_bytes: int  # of this process, both sessions included
    clocks: str | None

    def pairs(self, names: Sequence[str] = ("ttft", "total")) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        """What a gate judges: name -> (candidate ms, baseline ms)."""
        several = len({s.batch for s in self.stages}) > 1
        return {f"{s.name} at batch {s.batch}" if several else s.name: s.pairs for s in self.stages if s.name in names and s.pairs[1]}

    def as_dict(self) -> dict[str, Any]:
        """JSON-able"""
        stages = [
            {"stage": s.name, "batch": s.batch, "candidate_ms": s.candidate, "baseline_ms": s.baseline, "ratio": s.ratio}
            for s in self.stages
        ]
        return {
            "stages": stages,
            "tokens_per_second": self.tokens_per_second,
            "kv_bytes": self.kv_bytes,
            "peak_rss_bytes": self.peak_rss_bytes,
            "clocks": self.clocks,
        }


def compare(
    candidate: Session,
    baseline: Session | None,
    *,
    images: Sequence[Any] = (),
    prompt: str | None = None,
    batches: Sequence[int] = (1,),
    new_tokens: int = 16,
    repeat: int = 20,
    warmup: int = 3,
    confidence: float = 0.95,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Timed:
    """Alternate the two on the same request, at every batch size."""
    sessions = {"artifact": candidate, **({"baseline": baseline} if baseline else {})}
    stages: list[Stage] = []
    speed: dict[int, tuple[float, float | None]] = {}
    memory: dict[int, tuple[int | None, int | None]] = {}
    for batch in batches:
        bench = measure(sessions, Request.of(candidate, images, prompt, batch, new_tokens), repeat=repeat, warmup=warmup, progress=progress)
        a, b = bench.samples["artifact"], bench.samples.get("baseline")
        stages += [_stage(name, batch, a, b, confidence, seed) for name in bench.stages if a.ms[name]]
        rate = [None if s is None else 1e3 * batch * new_tokens / float(np.median(s.ms["total"])) for s in (a, b)]
        speed[batch], memory[batch] = (rate[0] or 0.0, rate[1]), (a.kv_bytes, b.kv_bytes if b else None)
    return Timed(tuple(stages), speed, memory, peak_rss(), gpu_clocks())


def _stage(name: str, batch: int, a: Samples, b: Samples | None, confidence: float, seed: int) -> Stage:
    paired = b is not None and len(b.ms[name]) == len(a.ms[name])
    ratio = ratio_interval(a.ms[name], b.ms[name], confidence, seed) if b is not None and paired else None
    return Stage(
        name,
        batch,
        _percentiles(a.ms[name]),
        _percentiles(b.ms[name]) if b is not None and paired else None,
        ratio,
        (a.ms[name], b.ms[name] if b is not None and paired else ()),
    )


def _percentiles(ms: Sequence[float]) -> dict[str, float]:
    return {f"p{q}": float(np.percentile(ms, q)) for q in (10, 50, 90, 99)}


def gpu_clocks() -> str | None:
    """ "name, SM clock, memory clock" of each GPU now, None where nvidia-smi does not run"""
    query = ["nvidia-smi", "--query-gpu=name,clocks.sm,clocks.mem,clocks.max.sm", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().replace("\n", "; ") or None
