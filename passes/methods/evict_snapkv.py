"""SnapKV: the cache keeps the tokens that the end of the prompt looks at, with their neighbours."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from ..kv_evict import EvictKV
from ..kv_saliency import probes, received


@dataclass(frozen=True)
class EvictSnapKV(EvictKV):
    """Keep the rows that the last `window` tokens attend to most, pooled over neighbours.

    rewrite:
        a[t] = sum_(h, r) attention_rows(q, k, last `window` rows)[h, r, t],  s = mean of a over `pool` neighbours
        k.l, v.l  ->  rows of text, sinks, recent, top(s, keep)

    Li et al., "SnapKV", NeurIPS 2024. One list per layer where the published code has one per head; positions stay the original ones, as there.
    """

    name: ClassVar[str] = "evict-snapkv"
    paper: ClassVar[str] = "arXiv:2404.14469"

    window: Annotated[int, Ge(1)] = 32
    pool: Annotated[int, Ge(1)] = 5

    def importance(self, q: Tensor, k: Tensor, mask: Tensor | None, valid: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
        a = received(q, k, mask, probes(valid, self.window, 0), scale, causal, softcap)
        near = torch.nn.functional.pad(a, (self.pool // 2, self.pool - 1 - self.pool // 2))
        return sum((near[:, i : i + a.shape[1]] for i in range(self.pool)), torch.zeros_like(a)) / self.pool
