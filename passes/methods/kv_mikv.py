"""MiKV: what an eviction policy would drop is kept in few bits instead."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...graph.kv_format import Partition
from ..kv_mixed import LO, Code, MixedKV, Share


@dataclass(frozen=True)
class KVMiKV(MixedKV):
    """The tokens with the most accumulated attention stay in `hi` codes; the would-be-evicted ones are kept in `lo` codes, token by token.

    rewrite:
        a[t] = sum_(h, i) attention(q, k)[h, i, t]                                                          (H2O's accumulated attention)
        k.l, v.l  ->  hi: text, sinks, recent, top(a, important);  lo: the others, one scale and centre per token
        balanced:  k / w is stored, w = sqrt(max_t |k| / max_t |q|) per channel, so that outlier channels cost no resolution

    Yang et al., "No Token Left Behind", 2024. The accumulated score favours early tokens; kv-zipcache's does not. Queries of all heads that
    share a key head share one balancer.
    """

    name: ClassVar[str] = "kv-mikv"
    paper: ClassVar[str] = "arXiv:2402.18096"

    hi: Code = "int8"
    lo: Code = "int2"
    important: Share = 0.25
    balanced: bool = True

    def low(self) -> Partition:
        return Partition(LO, self.lo, "token", "token", centred=True, balanced="k" if self.balanced else "")

    def importance(self, q: Tensor, k: Tensor, mask: Tensor | None, valid: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
        return torch.ops.foveate.attention_columns(q, k, mask, valid.float(), scale, causal, softcap).sum(1)
