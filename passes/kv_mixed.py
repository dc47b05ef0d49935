"""MixedKV: important rows in a partition of more bits, which also takes what is generated; the rest in one of fewer bits, which is only read."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.fx import Node

from ..graph.kv_format import APPENDED, KVFormat, Partition
from ..graph.program import KVLayer, Program
from ..graph.splice import splice
from . import kv_codecs
from .kv_codecs import Code
from .kv_evict import call, spared, taps_of
from .kv_rows import gathered, newest, output, rows_of, set_lengths
from .kv_store import StoreKV
from .reduce import share

F = torch.ops.foveate
HI, LO = "hi", "lo"
Share = Annotated[float, Ge(0), Le(1)]


def partition(name: str, code: str) -> Partition:
    """One scale per channel, and a centre where bits are few."""
    return Partition(name, code, centred=code not in ("float", "int8", "fp8"))


@dataclass(frozen=True)
class MixedKV(StoreKV):
    """hi, lo: the codes. important: the share of tokens that are stored as `hi`, to a thousandth, rounded up.

    text: only visual tokens are demoted, and the share is of them; false: of all tokens. sinks, recent: the first and last tokens of the
    prompt rank before all others. A sliding-window layer keeps every row as `hi`: its rows are known by their places.
    appended: the code of what is generated, and of the prompt's last `recent` tokens (at least one) with it; where it is `hi`, both are stored
    together. margin: how much wider than the prompt's the ranges per channel of appended codes are (see UniformKV).
    streaming_gap: 0 = what is generated stays as it is appended. Else it is float until so many tokens wait; a flush then divides them into `hi`
    and `lo` by what the newest query gives them. A row is quantized once.
    """

    hi: Code = "int8"
    lo: Code = "int4"
    important: Share = 0.5
    text: bool = True
    sinks: Annotated[int, Ge(0)] = 4
    recent: Annotated[int, Ge(0)] = 16
    appended: Code = "int8"
    streaming_gap: Annotated[int, Ge(0)] = 0
    margin: Annotated[float, Ge(1)] | None = None

    limit: ClassVar[Callable[..., Tensor] | None] = None  # a method's own: (self, **taps) -> [B], how many tokens the data ask for

    @abstractmethod
    def importance(self, **taps: Any) -> Tensor:
        """-> [B, T], larger is more important

        May read, by the names of its arguments: q, k, v, mask, scale, causal, softcap of the layer's own attention; visual, valid [B, T]; and
        pool[B, T]: the tokens that may be demoted.
        """

    def partitions(self, entry: KVLayer) -> tuple[Partition, ...]:
        if entry.window:
            return (self.high(),)
        if self.streaming_gap or self.appended != self.hi:
            grown = partition(APPENDED, "float" if self.streaming_gap else self.appended)
            return grown, replace(self.high(), name=HI), self.low()
        return self.high(), self.low()

    def format(self, entry: KVLayer, parts: tuple[Partition, ...]) -> KVFormat:
        if len(parts) < 3 or not self.streaming_gap:
            return KVFormat(parts)
        hi = share(self.important, self.streaming_gap)
        return KVFormat(parts, tuple((name, rows) for name, rows in ((HI, hi), (LO, self.streaming_gap - hi)) if rows), self.recent)

    def high(self) -> Partition:
        return partition(APPENDED, self.hi)

    def low(self) -> Partition:
        return partition(LO, self.lo)

    def widen(self, part: Partition) -> float:
        return kv_codecs.widen(part.code, not part.name or (part.name == HI and self.streaming_gap > 0), self.margin)

    def prefill(self, program: Program, entry: KVLayer, parts: tuple[Partition, ...]) -> None:
        if len(parts) == 1:
            super().prefill(program, entry, parts)
            return
        stage, rows = program["prefill"], rows_of(program, entry)
        important, n_hi, n_lo = self.split(program, rows.attention)
        recent = max(self.recent, 1) if len(parts) == 3 else 0
        masks = splice(stage, output(stage), _masks, important, rows.index, rows.valid, recent)
        sizes = (recent, n_hi, n_lo) if recent else (n_hi, n_lo)
        for part, mask, size in zip(parts, masks, sizes, strict=True):
            k, v, held, count = splice(stage, output(stage), gathered, rows.k, rows.v, mask, size)
            for which, node, every in (("k", k, rows.k), ("v", v, rows.v)):
                of = (every, rows.valid) if recent and not part.name else ()
                self.emit(stage, entry, which, node, held, part, f"{self.name}.{entry.layer}", rows.attention.args[0], *of)
            set_lengths(program, entry, part, count)

    def split(self, program: Program, attention: Node) -> tuple[Node, Any, Any]:
        """important[B, T] bool over the rows that the layer attends with; bounds on the important and on the other rows."""
        stage = program["prefill"]
        taps = taps_of(program, attention)
        sizes = [stage.placeholder("input_ids"), stage.placeholder(program.facts.features[0])]

        def choose(ids: Tensor, features: Tensor, *values: Any) -> tuple[Tensor, Any, Any]:
            return self.choose(dict(zip(taps, values, strict=True)), ids.shape[1] - features.shape[1])

        return splice(stage, attention.next, choose, *sizes, *taps.values())

    def choose(self, read: dict[str, Any], words: Any) -> tuple[Tensor, Any, Any]:
        """From the taps, and the largest number of text tokens of a sample, to `split`."""
        visual, valid = read["visual"], read["valid"]
        text = words if self.text else 0
        pool, size = visual & valid if self.text else valid, valid.shape[1] - text
        read["pool"] = pool
        score = call(self.importance, read)
        bound, budget = share(self.important, size), share(self.important, pool.sum(1))
        if self.limit:
            budget = torch.minimum(budget, call(self.limit, read))
        important = spared(score, pool, valid, self.sinks, self.recent, bound, budget)
        return important, bound + text, (size if self.limit else size - bound) + 1  # never none at all: a range needs a row


def _masks(important: Tensor, index: Tensor | None, valid: Tensor, recent: int) -> tuple[Tensor, ...]:
    """For rows that were gathered by `index` since: which are recent (0: not asked), which important, and which are neither"""
    important = important if index is None else F.keep_tokens(important, index)
    if not recent:
        return important & valid, valid & ~important
    new = newest(valid, recent)
    return new, important & valid & ~new, valid & ~important & ~new
