"""Keys and values in 2 bits: a storage format, for contexts that fit in no other way."""

from dataclasses import dataclass
from typing import ClassVar

from ..kv_uniform import UniformKV


@dataclass(frozen=True)
class KVInt2(UniformKV):
    """Store every row as one of four levels, values token by token.

    rewrite:
        prefill: k.l[B, G, T, D]  ->  z, s = middle and step of min..max over t,  k.l = round((k - z) / s),  k.l.scale, k.l.center [B, G, 1, D]
                 v.l  ->  the same over groups of 32 channels of a token,  v.l.scale, v.l.center [B, G, T, D / 32]
        decode:  as kv-int4; the new row brings the scale and centre of its values

    Saves memory, not time, on every target so far. Two bits for all tokens cost accuracy: kv-zipcache and kv-mikv give them to the tokens that
    matter least.
    """

    name: ClassVar[str] = "kv-int2"
    code: ClassVar[str] = "int2"

    centred: bool = True
    v_per: str = "group:32"
