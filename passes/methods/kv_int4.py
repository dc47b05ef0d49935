"""Keys and values in 4 bits, one scale and centre per channel."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from ..kv_uniform import UniformKV


@dataclass(frozen=True)
class KVInt4(UniformKV):
    """Store every row as 4-bit codes, by default about the middle of its channel's range in the prompt.

    rewrite:
        prefill: k.l[B, G, T, D]  ->  z, s = middle and step of min..max over t,  k.l = round((k - z) / s),  k.l.scale, k.l.center [B, G, 1, D]
        decode:  attention(q, kv_append(past, k))  ->  attention(q, kv_append(z + s past, z + s round((k - z) / s)))

    The centre costs nothing at run time: softmax does not see a shift of all keys, and a shift of all values shifts the output.
    """

    name: ClassVar[str] = "kv-int4"
    code: ClassVar[str] = "int4"

    centred: bool = True
    margin: Annotated[float, Ge(1)] = 1.4
