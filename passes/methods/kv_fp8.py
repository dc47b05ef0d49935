"""Keys and values as 8-bit floats."""

from dataclasses import dataclass
from typing import ClassVar

from ...graph.program import KVLayer, Program
from ..kv_codecs import Code
from ..kv_uniform import UniformKV


@dataclass(frozen=True)
class KVFp8(UniformKV):
    """Store every row in E4M3, by default with one scale per channel.

    rewrite:
        prefill: k.l[B, G, T, D]  ->  s = margin max_t |k| / 448,  k.l = bytes(float8_e4m3fn(k / s)),  k.l.scale = s[B, G, 1, D]    (v alike)
        decode:  attention(q, kv_append(past, k))  ->  attention(q, kv_append(s float(past), s float8(k / s)))

    Three bits of mantissa: coarser than int8 where a channel is evenly filled, finer near zero. For targets that have the type.
    """

    name: ClassVar[str] = "kv-fp8"
    code: ClassVar[str] = "fp8"

    appended: Code = "fp8"

    def chosen(self, program: Program) -> list[KVLayer]:
        if self.centred:
            raise self.fail("centred: a float code has no centre; possible is centred=false")
        return super().chosen(program)
