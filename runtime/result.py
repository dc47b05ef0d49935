"""What `generate` returns: text, tokens, where the time went, and which visual tokens were kept where."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .batch import Layout


def cached_rows(outputs: Mapping[str, Any]) -> np.ndarray | None:
    """[L, B] rows that the prefill put into the cache, all partitions of a layer together."""
    parts = [rows for name, rows in outputs.items() if name.startswith("kv_lengths")]
    return np.sum(parts, 0) if parts else None


@dataclass
class Timings:
    """Milliseconds of one call. `ttft_ms` ends with the first token's choice and includes everything before it except loading."""

    preprocess_ms: float = 0.0  # reading pictures, the processor
    encoder_ms: float = 0.0  # the vision stage; with the projector when it is in the same graph
    projector_ms: float | None = None  # None: inside encoder_ms
    prefill_ms: float = 0.0
    first_token_ms: float = 0.0  # choosing the first token
    decode_ms: list[float] = field(default_factory=list)  # per further token: choice and step

    @property
    def ttft_ms(self) -> float:
        return self.preprocess_ms + self.encoder_ms + (self.projector_ms or 0.0) + self.prefill_ms + self.first_token_ms

    @property
    def total_ms(self) -> float:
        return self.ttft_ms + sum(self.decode_ms)

    def as_dict(self) -> dict[str, Any]:
        step = float(np.median(self.decode_ms)) if self.decode_ms else None
        return {
            "preprocess_ms": self.preprocess_ms,
            "encoder_ms": self.encoder_ms,
            "projector_ms": self.projector_ms,
            "prefill_ms": self.prefill_ms,
            "ttft_ms": self.ttft_ms,
            "decode_ms_per_token": step,
            "decode_steps": len(self.decode_ms),
            "total_ms": self.total_ms,
        }


@contextmanager
def clock(timings: Timings | None, name: str) -> Iterator[None]:
    """Add the milliseconds of the block to `name`; a list grows by one."""
    start = time.perf_counter()
    yield
    ms = (time.perf_counter() - start) * 1e3
    if timings is None:
        return
    if isinstance(getattr(timings, name), list):
        getattr(timings, name).append(ms)
    else:
        setattr(timings, name, getattr(timings, name) + ms)


@dataclass(frozen=True)
class Picture:
    """One picture of one sample: its visual tokens lie on `grid` (rows, columns) when the family has one grid per picture."""

    image: Image.Image
    tokens: int  # visual tokens before any reduction
    grid: tuple[int, int] | None
    kept: Mapping[str, np.ndarray]  # site -> kept tokens, ascending indices into 0..tokens-1


@dataclass(frozen=True)
class Generation:
    """The answer to one `generate` call of B samples."""

    texts: tuple[str, ...]
    tokens: tuple[np.ndarray, ...]  # per sample the generated ids, the end token included where one came
    timings: Timings
    kept: Mapping[str, np.ndarray]  # `kept.<site>` of vision and prefill as returned: [B or images, K], -1 where a sample kept fewer
    pictures: tuple[tuple[Picture, ...], ...]
    layouts: tuple[Layout, ...]
    kv_rows: np.ndarray | None = None  # [L, B] cached rows per layer after prefill
    kv_bytes: int | None = None
    kv_clip_rate: float | None = None  # of the generated tokens' keys and values, the share beyond the range that the prompt fixed
    finish: tuple[str, ...] = ()  # per sample: "stop" (an end token), "length" (max_new_tokens) or "cache" (the cache may hold no more)

    @property
    def text(self) -> str:
        """The only sample's text; several samples are in `texts`."""
        return self.texts[0] if len(self.texts) == 1 else "\n".join(self.texts)

    def __str__(self) -> str:
        return self.text

    def overlay(self, path: str | Path, sample: int | None = None) -> Path:
        """Draw the kept tokens on every picture, one panel per site, as a PNG; returns its path."""
        from .overlay import draw

        return draw(self, Path(path), sample)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: what `foveate run --json` prints."""
        return {
            "texts": list(self.texts),
            "tokens": [t.tolist() for t in self.tokens],
            "timings": self.timings.as_dict(),
            "kept": {k: v.tolist() for k, v in self.kept.items()},
            "prompt_tokens": [len(p.tokens) for p in self.layouts],
            "visual_tokens": [p.visual for p in self.layouts],
            "kv_rows": None if self.kv_rows is None else self.kv_rows.tolist(),
            "kv_bytes": self.kv_bytes,
            "kv_clip_rate": self.kv_clip_rate,
            "finish": list(self.finish),
        }
