"""What is inside a TensorRT engine, read without a GPU: the plan carries its compiled graph as plain text, kernels with names, grids and
vector widths.

    kernels(plan)                     every kernel launch of the plan, in order, with what it reads and writes
    EngineReport.unfused              what stands between the cache and attention: kernels that write keys or values back to memory
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
_COPY = re.compile(rb'copy=\{ name="(copy_d2d)[^"]*"([^\n]*)')  # copies to and from the host carry sizes
_ALIAS = re.compile(rb'sub_tensor=\{ base="([^"]+)".*? name="([^"]+)"')
_ARGUMENTS = re.compile(rb"(input|output)(?:_args)?=\{([^}]*)\}")
_NAME = re.compile(rb'"([^"]+)"')
_CODES = re.compile(r"past_[kv]\.\d+(\.(?!scale$|center$|balance$)[a-z]\w*)?")
GEMV, GEMM = "_gemv_mha", "_gemm_mha"  # fused attention for one query and for many


@dataclass(frozen=True)
class Kernel:
    """One launch. vector: values per load; 1 means scalar loads."""

    name: str
    grid: str
    block: str
    vector: int
    reads: tuple[str, ...] = ()  # tensors of the plan: inputs by their name and a number, "past_k.0.1"
    writes: tuple[str, ...] = ()

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
    def codes(self) -> list[str]:
        """Inputs of a decode step that are rows of a quantized cache: past_k.0, past_v.3.lo."""
        return [t["name"] for t in self.inputs if t["dtype"] == "int8" and _CODES.fullmatch(t["name"])]

    @property
    def unfused(self) -> list[str]:
        """Why this plan does not read its quantized cache inside attention; empty when it does, or has none.

        Every partition's codes must be read by attention kernels alone: another reader writes them back in a wider type, which costs more
        than the float cache did, and codes that nobody is seen to read prove nothing.
        """
        if not self.codes:
            return []
        if not self.kernels:
            return [f"this plan does not show its kernels, so nothing is known of {len(self.codes)} quantized caches"]
        found = []
        for name in self.codes:
            readers = [k for k in self.kernels if any(_is_of(name, tensor) for tensor in k.reads)]
            others = [k for k in readers if not k.attention]
            if others:
                said = ", ".join(f"{k.name} (grid {k.grid}, writes {' '.join(k.writes)})" for k in others)
                found.append(f"{name} is read by {said} before attention: it is dequantized to memory")
            elif not readers:
                found.append(f"{name} is read by no kernel that this plan shows")
        return found

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
        codes = f"; {len(self.unfused)} of {len(self.codes)} quantized caches are dequantized to memory" if self.unfused else ""
        codes = codes or (f"; reads {len(self.codes)} quantized caches as they lie" if self.codes else "")
        return ", ".join(f"{n} x {name}" for name, n in names.items()) + copies + codes

    def to_json(self) -> dict[str, Any]:
        """Plain data: fields, the attention sentence and kernel counts by name."""
        plain = asdict(self)
        plain["kernels"] = [asdict(k) for k in self.kernels]
        return plain | {
            "kernel_count": len(self.kernels),
            "fused_attention": self.fused,
            "cache_copies": self.cache_copies,
            "quantized_caches": len(self.codes),
            "unfused": self.unfused,
            "attention": self.attention,
        }


def kernels(plan: bytes | memoryview) -> list[Kernel]:
    """Kernel launches found in a serialized engine, in program order; empty for a plan that carries no readable graph (classic
    TensorRT). Views of a tensor count as the tensor; plain copies are launches too."""
    aliases = {m[2]: m[1] for m in _ALIAS.finditer(plan)}
    found = []
    for m in sorted([*_LAUNCH.finditer(plan), *_COPY.finditer(plan)], key=lambda m: m.start()):
        launch = m.re is _LAUNCH
        sides = {side: _tensors(names, aliases) for side, names in _ARGUMENTS.findall(m[4] if launch else m[2])}
        between = {"reads": sides.get(b"input", ()), "writes": sides.get(b"output", ())}
        shape = (_squeeze(m[5]), _squeeze(m[6]), int(m[7])) if launch else ("", "", 1)
        found.append(Kernel(m[1].decode(), *shape, **between))
    return found


def _tensors(names: bytes, aliases: dict[bytes, bytes]) -> tuple[str, ...]:
    """Argument names with views replaced by what they are views of; sizes ("proxy...") are no tensors."""
    found = []
    for name in _NAME.findall(names):
        seen: set[bytes] = set()
        while name in aliases and name not in seen:
            seen.add(name)
            name = aliases[name]
        if not name.startswith(b"proxy") and b"_proxy" not in name:
            found.append(name.decode("latin1"))
    return tuple(found)


def _is_of(name: str, tensor: str) -> bool:
    """Is this tensor of the plan the network's input `name`? Plans number their tensors: past_k.0 is past_k.0.1."""
    return tensor == name or (tensor.startswith(f"{name}.") and tensor.removeprefix(f"{name}.").isdigit())


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
