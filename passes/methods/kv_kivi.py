"""KIVI: keys per channel in blocks of tokens, values per token in groups of channels, the newest tokens as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from torch import Tensor

from ...graph.kv_format import KVFormat, Partition
from ...graph.program import KVLayer, Program
from ...graph.splice import splice
from ..kv_mixed import LO
from ..kv_rows import gathered, output, rows_of, set_lengths
from ..kv_store import StoreKV


@dataclass(frozen=True)
class KVKivi(StoreKV):
    """Quantize all but the newest tokens, in whole blocks; a flush moves `residual` rows when twice as many are waiting.

    rewrite:
        k.l, v.l  ->  k.l, v.l: the last residual .. residual + group - 1 valid rows, float
                      k.l.lo int<bits>[B, G, T, D] per channel and block of `group` tokens, v.l.lo per token and `group` channels, all centred
        stage flush: the oldest `residual` float rows  ->  k.l.lo, v.l.lo behind the others

    Liu et al., "KIVI", ICML 2024. A token is quantized once. The published code slides the window of values row by row; here keys and values go
    together. Sliding-window layers stay float.
    """

    name: ClassVar[str] = "kv-kivi"
    paper: ClassVar[str] = "arXiv:2402.02750"

    bits: Literal[2, 4, 8] = 4
    group: Annotated[int, Ge(2)] = 32
    residual: Annotated[int, Ge(2)] = 64

    def partitions(self, entry: KVLayer) -> tuple[Partition, ...]:
        recent = Partition(code="float")
        if entry.window:
            return (recent,)
        return recent, Partition(LO, f"int{self.bits}", f"block:{self.group}", f"group:{self.group}", centred=True)

    def format(self, entry: KVLayer, parts: tuple[Partition, ...]) -> KVFormat:
        return KVFormat(parts, ((LO, self.residual),), self.residual) if len(parts) > 1 else KVFormat(parts)

    def chosen(self, program: Program) -> list[KVLayer]:
        if self.residual % self.group:
            raise self.fail(f"residual={self.residual} is no multiple of group={self.group}: a flush moves whole blocks")
        found = super().chosen(program)
        if bad := [e.value_dim for e in found if not e.window and e.value_dim % self.group]:
            raise self.fail(f"values have {bad[0]} channels, which groups of {self.group} do not divide")
        return found

    def prefill(self, program: Program, entry: KVLayer, parts: tuple[Partition, ...]) -> None:
        if len(parts) == 1:
            super().prefill(program, entry, parts)
            return
        stage, rows = program["prefill"], rows_of(program, entry)
        for part, split in zip(parts, (self.recent, self.old), strict=True):
            k, v, held, count = splice(stage, output(stage), split, rows.k, rows.v, rows.valid)
            for which, node in (("k", k), ("v", v)):
                self.emit(stage, entry, which, node, held, part, f"{self.name}.{entry.segment}", rows.attention.args[0])
            set_lengths(program, entry, part, count)

    def settled(self, valid: Tensor) -> Tensor:
        """valid[B, T]  ->  [B, T] bool: the tokens that are quantized"""
        count = valid.sum(1, keepdim=True)
        old = (count - self.residual).clamp(min=0) // self.group * self.group
        return valid & (valid.long().cumsum(1) <= old)

    def recent(self, k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        return gathered(k, v, valid & ~self.settled(valid), self.residual + self.group)

    def old(self, k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
        return gathered(k, v, self.settled(valid), valid.shape[1])
