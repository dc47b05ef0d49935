"""MustDrop's prefill and decode stages: drop what no question token needs, as a whole or singly, and trim the cache of the layers before.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...graph.program import Program
from ..evict import evict_dropped
from ..select import Keep, Layer, Staged

TINY = 1e-15


@dataclass(frozen=True)
class DropMustDrop(Staged):
    """Drop a visual token when the question's attention to it is below `global_share` of the sum over visual tokens AND no single question
    token gives it `individual` or more.

    rewrite:
        a[B, R, T] = mean_h attention_rows(q, k, question rows)                                   (the layer before each of `layers`)
        need = max(sum_r a / (global_share sum_rj a), max_r a / individual);  i = compact(text or top(need, min(#(need >= 1), keep)))
        k.l, v.l of the cache, first of `layers` <= l < last  ->  gathered by what the last stage kept       (evict: true)

    Liu et al., "Multi-Stage Vision Token Dropping", 2024 (sections 3.3, 3.4). Defaults: after layers 2, 6, 10, 14, thresholds of its 192-token
    setting. The count is data, the shape is its bound `keeps`, rows beyond it are filler. The vision stage is merge-must-drop. Not here: the
    key set that the CLS token saves. The published code renumbers positions, so that its evicted rows no longer fit: ours are the
    original ones.
    One mode: with the same thresholds both keep the same tokens; the renumbered positions are not reproduced.
    """

    name: ClassVar[str] = "drop-must-drop"
    paper: ClassVar[str] = "arXiv:2411.10803"
    shapes: ClassVar[str] = "bound"
    exact: ClassVar[bool] = False
    everything: ClassVar[dict[str, Any]] = {"individual": 0.0}

    layers: tuple[Layer, ...] = (3, 7, 11, 15)
    keeps: tuple[Keep, ...] = (1.0, 1.0, 1.0, 1.0)
    global_share: float = 1e-3
    individual: float = 1e-3
    evict: bool = True

    def idle(self, keep: Keep) -> bool:
        return super().idle(keep) and (self.global_share <= 0 or self.individual <= 0)

    def run(self, program: Program) -> bool:
        changed = super().run(program)
        if changed and self.evict:
            evict_dropped(program, self.layers[0], self.layers[-1])
        return changed

    def score(self, q: Tensor, k: Tensor, mask: Tensor | None, rows: Tensor, row_weight: Tensor, visual: Tensor, valid: Tensor,
              scale: float, causal: bool, softcap: float) -> Tensor:
        a = torch.ops.foveate.attention_rows(q, k, mask, rows, scale, causal, softcap).mean(1) * (row_weight > 0)[:, :, None]
        a = torch.where((visual & valid)[:, None], a, 0)
        together = a.sum(1) / (max(self.global_share, TINY) * a.sum((1, 2)).clamp(min=TINY)[:, None])
        return torch.maximum(together, a.amax(1) / max(self.individual, TINY))

    def limit(self, q: Tensor, k: Tensor, mask: Tensor | None, rows: Tensor, row_weight: Tensor, visual: Tensor, valid: Tensor,
              scale: float, causal: bool, softcap: float) -> Tensor:
        if self.idle(1.0):
            return (visual & valid).sum(1)
        need = self.score(q, k, mask, rows, row_weight, visual, valid, scale, causal, softcap)
        return (visual & valid & (need >= 1)).sum(1)
