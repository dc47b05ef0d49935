"""Latency per stage: warm-up, percentiles, and two artifacts in turns so that drift of the machine hits both.

Times are taken around calls that return numpy arrays, so a GPU has finished when the clock is read; there CUDA events on the stream say
besides how long the device was at it. `projector` and `selection` are parts of encoder and prefill: their shares of the profiled kernel
time (runtime/profile.py) of the time measured without a profile.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .errors import RunError
from .profile import Shares, shares
from .prompts import inserts_itself, placeholders
from .session import Session

STAGES = ("preprocess", "encoder", "prefill", "decode", "ttft", "total")
PARTS = ("projector", "selection")  # of encoder and prefill, where the backend keeps a profile
DEVICE = ("encoder on device", "prefill on device", "decode on device")  # by CUDA events
ALL = (*STAGES, *PARTS, *DEVICE)
PERCENTILES = (10, 50, 90, 99)
NOTHING = Shares(0.0, {})
QUESTION = "What is in this picture?"


@dataclass(frozen=True)
class Request:
    """What is timed: a batch of prompts with pictures and a number of new tokens that no end token shortens."""

    images: Any
    prompts: list[str]
    new_tokens: int

    @classmethod
    def of(cls, session: Session, images: Sequence[Any], prompt: str | None, batch: int, new_tokens: int) -> Request:
        """Defaults: one grey-noise picture, a short question through the chat template where there is one."""
        if batch < 1 or new_tokens < 1:
            raise RunError(f"bench: batch {batch} and new tokens {new_tokens} must be at least 1")
        pictures = list(images) or [noise_picture()]
        text = prompt or _default_prompt(session, len(pictures))
        return cls([pictures] * batch, [text] * batch, new_tokens)


def noise_picture(size: int = 336, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def _default_prompt(session: Session, pictures: int) -> str:
    processor = session.processor
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}] * pictures + [{"type": "text", "text": QUESTION}]
        return processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    marks = "" if inserts_itself(processor) or not placeholders(processor) else placeholders(processor)[0] * pictures
    return f"{marks} {QUESTION}"


@dataclass(frozen=True)
class Samples:
    """Milliseconds of every repetition of one artifact, by stage; decode is per token."""

    ms: Mapping[str, tuple[float, ...]]
    visual_tokens: int
    prompt_tokens: int
    kv_bytes: int | None

    def percentiles(self, stage: str) -> dict[str, float] | None:
        return {f"p{q}": float(np.percentile(self.ms[stage], q)) for q in PERCENTILES} if self.ms[stage] else None

    def median(self, stage: str) -> float | None:
        return float(np.median(self.ms[stage])) if self.ms[stage] else None

    def spread(self, stage: str) -> tuple[float, float] | None:
        """10th and 90th percentile"""
        return (float(np.percentile(self.ms[stage], 10)), float(np.percentile(self.ms[stage], 90))) if self.ms[stage] else None


@dataclass(frozen=True)
class Bench:
    """The measurement of one artifact, or of two in turns. `str()` is the table."""

    samples: Mapping[str, Samples]
    repeat: int
    warmup: int
    batch: int
    new_tokens: int
    peak_rss_bytes: int = 0  # of this process so far, all sessions included

    @property
    def stages(self) -> tuple[str, ...]:
        """Those that were measured of any artifact"""
        return tuple(stage for stage in ALL if stage in STAGES or any(s.ms[stage] for s in self.samples.values()))

    def speedup(self, stage: str) -> float | None:
        """Median over the repetitions of baseline / artifact, paired: both were measured right after each other."""
        if "baseline" not in self.samples or not self.samples["artifact"].ms[stage] or not self.samples["baseline"].ms[stage]:
            return None
        pairs = zip(self.samples["baseline"].ms[stage], self.samples["artifact"].ms[stage], strict=True)
        return float(np.median([b / a for b, a in pairs]))

    def rows(self) -> list[list[str]]:
        out = []
        for stage in self.stages:
            row = [TITLES.get(stage, stage)]
            for s in self.samples.values():
                spread = s.spread(stage)
                row.append("-" if spread is None else f"{s.median(stage):.2f} ({spread[0]:.2f}..{spread[1]:.2f}, {s.percentiles(stage)['p99']:.2f})")
            times = self.speedup(stage)
            out.append(row + ([] if "baseline" not in self.samples else ["-" if times is None else f"{times:.2f}x"]))
        return out

    def __str__(self) -> str:
        first = self.samples["artifact"]
        head = (f"batch {self.batch}, {first.prompt_tokens} prompt tokens of which {first.visual_tokens} visual, {self.new_tokens} new tokens; "
                f"median ms (10th..90th, 99th percentile) of {self.repeat} after {self.warmup} warm-up")
        titles = ["stage", *self.samples, *(["speed-up"] if "baseline" in self.samples else [])]
        table = [titles, *self.rows()]
        widths = [max(len(r[i]) for r in table) for i in range(len(titles))]
        kv = ", ".join(f"{name} {s.kv_bytes / 1e6:.2f} MB" for name, s in self.samples.items() if s.kv_bytes is not None)
        lines = [head, *("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in table)]
        host = [f"peak host memory of the process: {self.peak_rss_bytes / 1e6:,.0f} MB"] if self.peak_rss_bytes else []
        return "\n".join([*lines, *([f"KV buffers: {kv}"] if kv else []), *host])

    def as_dict(self) -> dict[str, Any]:
        """JSON-able"""
        stages = {
            name: {stage: {"median_ms": s.median(stage), "p10_p90_ms": s.spread(stage), "percentiles_ms": s.percentiles(stage)} for stage in self.stages}
            for name, s in self.samples.items()
        }
        return {"batch": self.batch, "new_tokens": self.new_tokens, "repeat": self.repeat, "warmup": self.warmup, "stages": stages,
                "kv_bytes": {n: s.kv_bytes for n, s in self.samples.items()}, "speedup": {stage: self.speedup(stage) for stage in self.stages},
                "peak_rss_bytes": self.peak_rss_bytes}


TITLES = {"decode": "decode per token", "projector": "  projector", "selection": "  selection", "decode on device": "decode per token on device"}


def measure(
    sessions: Mapping[str, Session],
    request: Request,
    *,
    repeat: int = 10,
    warmup: int = 3,
    parts: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Bench:
    """sessions: {"artifact": ..., "baseline": ...}; every repetition runs each once, the order alternating. parts: profile each afterwards."""
    if repeat < 1 or warmup < 0:
        raise RunError(f"bench: repeat {repeat} must be at least 1 and warm-up {warmup} at least 0")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sessions}
    for turn in range(-warmup, repeat):
        names = list(sessions) if turn % 2 == 0 else list(reversed(sessions))
        for name in names:
            result = once(sessions[name], request)
            if turn >= 0:
                found[name].append(result)
        if progress:
            progress(f"{'warm-up' if turn < 0 else 'repetition'} {turn + 1 + (warmup if turn < 0 else 0)}")
    short = Request(request.images, request.prompts, 1)
    seen = {n: shares(s, lambda s=s: once(s, short)) if parts else None for n, s in sessions.items()}
    return Bench({n: _collect(r, seen[n]) for n, r in found.items()}, repeat, warmup, len(request.prompts), request.new_tokens, peak_rss())


def once(session: Session, request: Request) -> dict[str, Any]:
    """One request by the parts of `generate`, with a fixed number of greedy steps: an end token would make repetitions unequal. Seconds."""
    clock = Stopwatch.of(session)
    start = time.perf_counter()
    samples = session.prepare(request.images, request.prompts)
    prepared = time.perf_counter()
    seen = clock.lap("encoder", lambda: session.encode(samples))
    encoded = time.perf_counter()
    outputs, cache = clock.lap("prefill", lambda: session.engine.prefill(seen.batch.feeds, seen.batch.length + request.new_tokens))
    tokens = outputs["logits"].argmax(-1)
    prefilled = time.perf_counter()
    steps = []
    for step in range(request.new_tokens - 1):
        begin = time.perf_counter()
        tokens = clock.lap("decode", lambda t=tokens, s=step: session.engine.decode(cache, t[:, None], seen.batch.step_positions(s))).argmax(-1)
        steps.append(time.perf_counter() - begin)
    end = time.perf_counter()
    return {"preprocess": prepared - start, "encoder": encoded - prepared, "prefill": prefilled - encoded, "ttft": prefilled - start, "total": end - start,
            "decode": float(np.median(steps)) if steps else None, "visual": seen.batch.layouts[0].visual, "prompt": len(seen.batch.layouts[0].tokens),
            "kv": getattr(cache, "nbytes", None), **clock.device()}


class Stopwatch:
    """Runs the parts of a request; on a GPU also by CUDA events on the current stream, which is where our GPU backends work."""

    def __init__(self, cuda: Any = None) -> None:
        self.cuda, self.ms = cuda, {}

    @classmethod
    def of(cls, session: Any) -> Stopwatch:
        """With events if this session's engine is on a GPU. torch is not imported for that: a backend on a GPU has done so."""
        torch = sys.modules.get("torch")
        on_gpu = str(getattr(session.engine, "device", "")).startswith("cuda") or str(session.manifest.get("target", "")).startswith("tensorrt")
        return cls(torch.cuda if on_gpu and torch is not None and torch.cuda.is_available() else None)

    def lap(self, name: str, run: Callable[[], Any]) -> Any:
        if self.cuda is None:
            return run()
        begin, end = self.cuda.Event(enable_timing=True), self.cuda.Event(enable_timing=True)
        begin.record()
        out = run()
        end.record()
        end.synchronize()  # elapsed_time is an error before the event has happened
        self.ms.setdefault(name, []).append(begin.elapsed_time(end))
        return out

    def device(self) -> dict[str, float]:
        """seconds by name; decode is the median step"""
        return {f"{name} on device": float(np.median(ms)) / 1e3 for name, ms in self.ms.items()}


def _collect(results: Sequence[Mapping[str, Any]], parts: Mapping[str, Shares] | None) -> Samples:
    ms = {stage: tuple(r[stage] * 1e3 for r in results if r.get(stage) is not None) for stage in ALL}
    if parts is not None:
        vision, prefill = parts.get("vision", NOTHING), parts.get("prefill", NOTHING)
        if vision.projector:
            ms["projector"] = tuple(vision.projector * t for t in ms["encoder"])
        if vision.added or prefill.added:
            pairs = zip(ms["encoder"], ms["prefill"], strict=True)
            ms["selection"] = tuple(vision.selection * e + prefill.selection * p for e, p in pairs)
    return Samples(ms, results[0]["visual"], results[0]["prompt"], results[0]["kv"])


def peak_rss() -> int:
    """Bytes; the largest resident size this process has had"""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
