"""Latency per stage: warm-up, medians, and two artifacts in turns so that drift of the machine hits both."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from .errors import RunError
from .prompts import inserts_itself, placeholders
from .session import Session

STAGES = ("preprocess", "encoder", "prefill", "decode", "ttft", "total")
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

    def speedup(self, stage: str) -> float | None:
        """Median over the repetitions of baseline / artifact, paired: both were measured right after each other."""
        if "baseline" not in self.samples or not self.samples["artifact"].ms[stage]:
            return None
        pairs = zip(self.samples["baseline"].ms[stage], self.samples["artifact"].ms[stage], strict=True)
        return float(np.median([b / a for b, a in pairs]))

    def rows(self) -> list[list[str]]:
        out = []
        for stage in STAGES:
            row = [stage + (" per token" if stage == "decode" else "")]
            for s in self.samples.values():
                spread = s.spread(stage)
                row.append("-" if spread is None else f"{s.median(stage):.2f} ({spread[0]:.2f}..{spread[1]:.2f})")
            times = self.speedup(stage)
            out.append(row + ([] if "baseline" not in self.samples else ["-" if times is None else f"{times:.2f}x"]))
        return out

    def __str__(self) -> str:
        first = self.samples["artifact"]
        head = (f"batch {self.batch}, {first.prompt_tokens} prompt tokens of which {first.visual_tokens} visual, {self.new_tokens} new tokens; "
                f"median ms (10th..90th percentile) of {self.repeat} after {self.warmup} warm-up")
        titles = ["stage", *self.samples, *(["speed-up"] if "baseline" in self.samples else [])]
        table = [titles, *self.rows()]
        widths = [max(len(r[i]) for r in table) for i in range(len(titles))]
        kv = ", ".join(f"{name} {s.kv_bytes / 1e6:.2f} MB" for name, s in self.samples.items() if s.kv_bytes is not None)
        lines = [head, *("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))) for r in table)]
        return "\n".join([*lines, *([f"KV buffers: {kv}"] if kv else [])])

    def as_dict(self) -> dict[str, Any]:
        """JSON-able"""
        stages = {name: {stage: {"median_ms": s.median(stage), "p10_p90_ms": s.spread(stage)} for stage in STAGES} for name, s in self.samples.items()}
        return {"batch": self.batch, "new_tokens": self.new_tokens, "repeat": self.repeat, "warmup": self.warmup, "stages": stages,
                "kv_bytes": {n: s.kv_bytes for n, s in self.samples.items()}, "speedup": {stage: self.speedup(stage) for stage in STAGES}}


def measure(sessions: Mapping[str, Session], request: Request, *, repeat: int = 10, warmup: int = 3, progress: Callable[[str], None] | None = None) -> Bench:
    """sessions: {"artifact": ..., "baseline": ...}; every repetition runs each once, the order alternating."""
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
    return Bench({n: _collect(r) for n, r in found.items()}, repeat, warmup, len(request.prompts), request.new_tokens)


def once(session: Session, request: Request) -> dict[str, Any]:
    """One request by the parts of `generate`, with a fixed number of greedy steps: an end token would make repetitions unequal."""
    start = time.perf_counter()
    samples = session.prepare(request.images, request.prompts)
    prepared = time.perf_counter()
    seen = session.encode(samples)
    encoded = time.perf_counter()
    outputs, cache = session.engine.prefill(seen.batch.feeds, seen.batch.length + request.new_tokens)
    tokens = outputs["logits"].argmax(-1)
    prefilled = time.perf_counter()
    steps = []
    for step in range(request.new_tokens - 1):
        begin = time.perf_counter()
        tokens = session.engine.decode(cache, tokens[:, None], seen.batch.step_positions(step)).argmax(-1)
        steps.append(time.perf_counter() - begin)
    end = time.perf_counter()
    return {"preprocess": prepared - start, "encoder": encoded - prepared, "prefill": prefilled - encoded, "ttft": prefilled - start, "total": end - start,
            "decode": float(np.median(steps)) if steps else None, "visual": seen.batch.layouts[0].visual, "prompt": len(seen.batch.layouts[0].tokens),
            "kv": getattr(cache, "nbytes", None)}


def _collect(results: Sequence[Mapping[str, Any]]) -> Samples:
    ms = {stage: tuple(r[stage] * 1e3 for r in results if r[stage] is not None) for stage in STAGES}
    return Samples(ms, results[0]["visual"], results[0]["prompt"], results[0]["kv"])
