"""UniformKV: every row of a layer is stored alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from ..graph.errors import GraphError
from ..graph.kv_format import Partition
from ..graph.program import KVLayer, Program
from .kv_store import StoreKV


@dataclass(frozen=True)
class UniformKV(StoreKV):
    """One partition. centred: a centre beside every scale. k_per, v_per: what shares a scale: channel, token (of a head), group:<channels of a
    token>. margin: how much wider than the prompt's range a per-channel range is, room for tokens that are yet to come; what exceeds it saturates,
    and the generation's clip rate says how much did. A scale per channel is the prompt's and stays; a new token brings its own otherwise.
    """

    code: ClassVar[str] = ""

    centred: bool = False
    k_per: str = "channel"
    v_per: str = "channel"
    margin: Annotated[float, Ge(1)] = 1.0

    def partitions(self, entry: KVLayer) -> tuple[Partition, ...]:
        return (Partition("", self.code, self.k_per, self.v_per, self.centred),)

    def widen(self, part: Partition) -> float:
        return self.margin

    def chosen(self, program: Program) -> list[KVLayer]:
        try:
            Partition("", self.code, self.k_per, self.v_per)
        except GraphError as cause:
            raise self.fail(str(cause).removeprefix("kv: ")) from cause
        found = super().chosen(program)
        for which, per, widths in (("keys", self.k_per, [e.head_dim for e in found]), ("values", self.v_per, [e.value_dim for e in found])):
            kind, _, size = per.partition(":")
            if kind == "block":
                raise self.fail(f"{which} cannot be stored per {per}: rows are appended one by one; possible are channel, token, group:<channels>")
            if kind == "group" and (bad := [w for w in widths if w % int(size)]):
                raise self.fail(f"{which} have {bad[0]} channels, which groups of {size} do not divide")
        return found
