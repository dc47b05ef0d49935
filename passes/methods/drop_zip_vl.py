"""ZipVL: as many tokens as it takes to hold a share of the attention."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..select import Keep, Layer, Staged


@dataclass(frozen=True)
class DropZipVl(Staged):
    """Keep the visual tokens that are looked at most, as many per sample and layer as hold `mass` of the attention that visual tokens
    receive.

    rewrite:
        a = sum_h attention_columns(q, k, weight 1 on valid rows)                              (the layer before each of `layers`)
        n = min{n : the n largest a hold mass * sum a};  i = compact(text or top(a / rows that can see the token, min(n, keep)))

    He et al., "ZipVL", 2024 (section 4). The count is data, the shape is its bound `keep`: rows beyond n are filler that no layer attends to.
    buckets: round n up to the next of these, so that a host that holds one engine per bucket meets few sizes. No code is published: what the paper
    calls important tokens is reduced here to the visual ones, and the rest is dropped (its second version evicts them too).
    One mode: no code is published.
    """

    name: ClassVar[str] = "drop-zip-vl"
    paper: ClassVar[str] = "arXiv:2410.08584"
    shapes: ClassVar[str] = "bound"
    exact: ClassVar[bool] = False
    everything: ClassVar[dict[str, Any]] = {"mass": 1.0}

    layers: tuple[Layer, ...] = (2,)
    keeps: tuple[Keep, ...] = (0.5,)
    mass: float = 0.975
    buckets: tuple[int, ...] = ()

    def idle(self, keep: Keep) -> bool:
        return super().idle(keep) and self.mass >= 1

    def received(self, q: Tensor, k: Tensor, mask: Tensor | None, valid: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
        return torch.ops.foveate.attention_columns(q, k, mask, valid.float(), scale, causal, softcap).sum(1)

    def score(self, q: Tensor, k: Tensor, mask: Tensor | None, valid: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
        onlookers = valid.sum(1, keepdim=True) - valid.long().cumsum(1) + 1 if causal else valid.sum(1, keepdim=True)
        return self.received(q, k, mask, valid, scale, causal, softcap) / onlookers.clamp(min=1)

    def limit(self, q: Tensor, k: Tensor, mask: Tensor | None, visual: Tensor, valid: Tensor, scale: float, causal: bool,
              softcap: float) -> Tensor:
        present = visual & valid
        a = torch.where(present, self.received(q, k, mask, valid, scale, causal, softcap), 0).sort(dim=1, descending=True).values
        short = a.cumsum(1) < self.mass * a.sum(1, keepdim=True)
        n = torch.where(present.any(1), short.sum(1) + 1, 0) if self.mass < 1 else present.sum(1)
        rounded = n
        for size in sorted(self.buckets, reverse=True):
            rounded = torch.where(n <= size, size, rounded)
        return rounded
