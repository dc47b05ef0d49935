"""Keys and values in 8 bits, one scale per channel."""

from dataclasses import dataclass
from typing import ClassVar

from ..kv_uniform import UniformKV


@dataclass(frozen=True)
class KVInt8(UniformKV):
    """Store every row as int8 codes; by default the scales of a layer, head and channel come from the prompt and stay.

    rewrite:
        prefill: k.l[B, G, T, D]  ->  s = margin max_t |k| / 127,  k.l = round(k / s),  k.l.scale = s[B, G, 1, D]      (v alike)
        decode:  attention(q, kv_append(past, k))  ->  attention(q, kv_append(s past, s round(k / s)))

    Eight bits have room for tokens that leave the prompt's ranges: a margin of 5 costs nothing that the testbed could show.
    """

    name: ClassVar[str] = "kv-int8"
    code: ClassVar[str] = "int8"
