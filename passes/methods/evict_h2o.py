"""H2O: the cache keeps heavy hitters, the tokens with the most accumulated attention, and the newest ones."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kv_evict import EvictKV


@dataclass(frozen=True)
class EvictH2O(EvictKV):
    """Keep the rows that all rows of the prompt attend to most.

    rewrite:
        a[t] = sum_(h, i) attention(q, k)[h, i, t]                                  (attention_columns: a second pass, one head at a time)
        k.l, v.l  ->  rows of text, sinks, recent, top(a, keep)

    Zhang et al., "H2O: Heavy-Hitter Oracle", NeurIPS 2023. Once after the prompt, not at every step; one list per layer. The sum favours early
    tokens, which more rows can see: kv-zipcache's score does not.
    """

    name: ClassVar[str] = "evict-h2o"
    paper: ClassVar[str] = "arXiv:2306.14048"

    def importance(self, q: Tensor, k: Tensor, mask: Tensor | None, valid: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
        return torch.ops.foveate.attention_columns(q, k, mask, valid.float(), scale, causal, softcap).sum(1)
