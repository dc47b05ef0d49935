"""What is inside a TensorRT engine, read without a GPU: the plan carries its compiled graph as plain text, kernels with names, grids and
vector widths.

    kernels(plan)                     every kernel launch of the plan, in order
    EngineReport                      one engine: size, seconds, memory, profiles, tensors, kernels, what became of attention
    render(reports)                   the table for people; `EngineReport.to_json()` for machines

Reading stops at what the file says: speed is known only on the GPU.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

_LAUNCH = re.compile(
    rb"function=\{ name=(\S+) fqn=(\S+) args=\{([^}]*)\}(.*?)grid = \{([^}]*)\} block = \{([^}]*)\}.*?vec_width=(\d+)", re.S
)
GEMV, GEMM = "_gemv_mha", "_gemm_mha"  # fused attention for one query and for many


@dataclass(frozen=True)
class Kernel:
    """One launch. vector: values per load; 1 means scalar loads."""

    name: str
    grid: str
    block: str
    vector: int

    @property
    def attention(self) -> bool:
        return self.name.startswith((GEMV, GEMM))

    @property
    def threads(self) -> int:
        """Of the largest launch, as far as the file fixes it."""
        return math.prod(max(int(n), 1) for n in f"{self.grid} {self.block}".split() if n.isdigit())


@dataclass(frozen=True)
class EngineReport:
    """One stage's engine. seconds, bytes as measured; peak_rss_bytes: of this process while it built."""

    stage: str
    target: str
    version: str
    compute_capability: str
    precision: str
    layers: int  # of the network, before fusion
    bytes: int
    seconds: float
    peak_rss_bytes: int
    inputs: list[dict[str, Any]]
    outputs: list[dict[str, Any]]
    profile: dict[str, list[list[int]]]  # input -> [min, opt, max] shapes
    attention_layers: int  # attention nodes in the graph
    kernels: list[Kernel] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def cache_copies(self) -> int:
        """Kernels of a decode step that write a past of its own: a concatenation with at least one thread per row of the longest past."""
        rows = max((shapes[2][1] for name, shapes in self.profile.items() if name.startswith("past_k.")), default=0)
        return sum("Conc" in k.name and not k.attention and k.threads >= rows for k in self.kernels) if rows else 0

    @property
    def fused(self) -> int:
        """How many attention layers became one kernel each."""
        return sum(k.attention for k in self.kernels)

    @property
    def attention(self) -> str:
        """One sentence: what became of attention."""
        if not self.kernels:
            return "this plan does not show its kernels"
        if not self.attention_layers:
            return "no attention in this stage"
        names = Counter(f"{k.name.strip('_')} (vec{k.vector})" for k in self.kernels if k.attention)
        if self.fused < self.attention_layers:
            found = ", ".join(f"{n} x {name}" for name, n in names.items()) or "none"
            return f"{self.attention_layers - self.fused} of {self.attention_layers} layers are not one fused kernel (fused: {found})"
        copies = f"; {self.cache_copies} kernels copy the cache" if self.cache_copies else ""
        return ", ".join(f"{n} x {name}" for name, n in names.items()) + copies

    def to_json(self) -> dict[str, Any]:
        """Plain data: fields, the attention sentence and kernel counts by name."""
        plain = asdict(self)
        plain["kernels"] = [asdict(k) for k in self.kernels]
        return plain | {
            "kernel_count": len(self.kernels),
            "fused_attention": self.fused,
            "cache_copies": self.cache_copies,
            "attention": self.attention,
        }


def kernels(plan: bytes | memoryview) -> list[Kernel]:
    """Kernel launches found in a serialized engine, in program order; empty for a plan that carries no readable graph (classic
    TensorRT)."""
    found = _LAUNCH.finditer(plan)
    return [Kernel(m[1].decode(), _squeeze(m[5]), _squeeze(m[6]), int(m[7])) for m in found]


def _squeeze(text: bytes) -> str:
    return " ".join(text.decode("latin1").split())


def render(reports: Sequence[EngineReport]) -> str:
    """A text table, one line per engine."""
    header = ("stage", "layers", "kernels", "MB", "build s", "RSS MB", "precision", "SM", "attention")
    rows = [
        (
            r.stage,
            str(r.layers),
            str(len(r.kernels)),
            f"{r.bytes / 1e6:.1f}",
            f"{r.seconds:.1f}",
            f"{r.peak_rss_bytes / 1e6:.0f}",
            r.precision,
            r.compute_capability,
            r.attention,
        )
        for r in reports
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
