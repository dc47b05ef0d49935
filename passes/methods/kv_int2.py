"""Keys and values in 2 bits: a storage format, for contexts that fit in no other way."""

from dataclasses import dataclass
from typing import ClassVar

from ..kv_uniform import UniformKV


@dataclass(frozen=True)
class KVInt2(UniformKV):
    """Store every row of the prompt as one of four levels, values token by token.

    rewrite:
        prefill: k.l[B, G, T, D]  ->  z, s = middle and step of 0.8 (min..max over t),  k.l.lo = round((k - z) / s),  k.l.lo.scale, k.l.lo.center
                 v.l  ->  min..max over groups of 32 channels of a token,  v.l.lo.scale, v.l.lo.center [B, G, T, D / 32]
                 k.l, v.l: the last token and what is generated, in 8 bits as kv-int4 has them
        decode:  as kv-int4

    Saves memory, not time, on every target so far. Two bits for all tokens cost accuracy: kv-zipcache and kv-mikv give them to the tokens that
    matter least.
    """

    name: ClassVar[str] = "kv-int2"
    code: ClassVar[str] = "int2"

    centred: bool = True
    v_per: str = "group:32"
