"""Experimental: one bit per element, the sign within a group of channels."""

from dataclasses import dataclass
from typing import ClassVar

from ..kv_uniform import UniformKV


@dataclass(frozen=True)
class KVSign(UniformKV):
    """Store the sign of every element, and the mean magnitude of each group.

    rewrite:
        k.l[B, G, T, D]  ->  c = mean_t k per channel,  k.l = sign(k - c),  k.l.scale = mean_t |k - c|
        v.l  ->  the same over groups of 16 channels of a token

    The group-wise sign code of WeTok (Zhuang et al., 2025, arXiv:2508.05599), here as a cache format: 1 bit and a scale per group. Experimental:
    it is lossy beyond what answers survive on their own; meant for rows that would otherwise be evicted (`lo: sign` of kv-mikv, kv-zipcache).
    """

    name: ClassVar[str] = "kv-sign"
    paper: ClassVar[str] = "arXiv:2508.05599"
    code: ClassVar[str] = "sign"

    centred: bool = True
    v_per: str = "group:16"
