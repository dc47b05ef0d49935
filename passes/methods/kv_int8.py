"""Keys and values in 8 bits, one scale per channel."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from ...graph.kv_format import Partition
from ...graph.program import KVLayer
from ..kv_store import StoreKV


@dataclass(frozen=True)
class KVInt8(StoreKV):
    """Store every row as int8 codes; the scales of a layer, head and channel come from the prompt and stay.

    rewrite:
        prefill: k.l[B, G, T, D]  ->  s = margin max_t |k| / 127,  k.l = round(k / s),  k.l.scale = s[B, G, 1, D]      (v alike)
        decode:  attention(q, kv_append(past, k))  ->  attention(q, kv_append(s past, s round(k / s)))

    margin: room for tokens that are yet to come; what exceeds it saturates, and the generation's clip rate says how much did.
    """

    name: ClassVar[str] = "kv-int8"

    centred: bool = False
    margin: Annotated[float, Ge(1)] = 1.1

    def partitions(self, entry: KVLayer) -> tuple[Partition, ...]:
        return (Partition(code="int8", centred=self.centred),)

    def widen(self, part: Partition) -> float:
        return self.margin
