"""Experimental: finite scalar quantization of keys and values, 15 levels behind a tanh."""

from dataclasses import dataclass
from typing import ClassVar

from ..kv_uniform import UniformKV


@dataclass(frozen=True)
class KVFsq(UniformKV):
    """Store every element as one of 15 levels that are dense about its channel's mean.

    rewrite:
        k.l[B, G, T, D]  ->  c = mean_t k,  s = 2 mean_t |k - c|,  k.l = round(7.5 tanh((k - c) / s)),  k.l.scale, k.l.center [B, G, 1, D]
        decode:  attention over c + s atanh(k.l / 7.5)                                                                          (v alike)

    Mentzer et al., "Finite Scalar Quantization", 2023. Experimental: what lies beyond 3.4 mean deviations saturates, so it suits channels
    without outliers.
    """

    name: ClassVar[str] = "kv-fsq"
    paper: ClassVar[str] = "arXiv:2309.15505"
    code: ClassVar[str] = "fsq4"

    centred: bool = True
