"""Keys and values of the prompt in 4 bits, one scale and centre per channel; of what is generated in 8."""

from dataclasses import dataclass
from typing import ClassVar

from ..kv_uniform import UniformKV


@dataclass(frozen=True)
class KVInt4(UniformKV):
    """Store every row as 4-bit codes, by default about the middle of its channel's range in the prompt.

    rewrite:
        prefill: k.l[B, G, T, D]  ->  z, s = middle and step of min..max over t,  k.l.lo = round((k - z) / s),  k.l.lo.scale, k.l.lo.center
                                      w = margin max_t |k| / 127,  k.l = round(k / w) of the last token,  k.l.scale = w [B, G, 1, D]
        decode:  attention(q, kv_append(past, k))  ->  attention(q, cat([z + s past.lo, kv_append(w past, w round(k / w))]))

    The centre costs nothing at run time: softmax does not see a shift of all keys, and a shift of all values shifts the output.
    """

    name: ClassVar[str] = "kv-int4"
    code: ClassVar[str] = "int4"

    centred: bool = True
