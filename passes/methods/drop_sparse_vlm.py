"""SparseVLM: text tokens that speak of the image rate the visual tokens, and the best of the dropped are recycled."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..recycle import clusters, recycle
from ..select import Keep, Layer, Staged


@dataclass(frozen=True)
class DropSparseVlm(Staged):
    """Keep the visual tokens that the raters, question tokens close to the image at the input, attend to; merge some of the rest.

    rewrite:
        p[B, H, R, T] = attention_rows(q, k, text rows);  s = sum_r raters[r] mean_h p[h, r]      (the layer before each of `layers`)
        best = top(s, keep);  of the p dropped, the int(0.3 p) + 1 best form DPC-kNN clusters, a tenth as many, and one
        h[centre of a cluster] = mean of the cluster;  every value crossing into the layer is gathered by compact(text or best or centres)

    Zhang et al., "SparseVLM", ICML 2025. Defaults: v1.5's list for 192 tokens, after layers 2, 6, 15 (recipes: 192, 128, 96, 64); the first version's
    rank rule is those lists, chosen by the host. A merged token stands at its centre's place and position; the published code appends it behind the
    kept ones and renumbers positions, which is not reproduced. recycle: false drops the rest.
    mode: fixed breaks ties of the clustering by order (the published code adds noise); parity also drops at least one token per stage, as it does.
    """

    name: ClassVar[str] = "drop-sparse-vlm"
    paper: ClassVar[str] = "arXiv:2410.04417"

    layers: tuple[Layer, ...] = (3, 7, 16)
    keeps: tuple[Keep, ...] = (300, 200, 110)
    recycle: bool = True
    mode: Literal["fixed", "parity"] = "fixed"

    def score(self, q: Tensor, k: Tensor, mask: Tensor | None, rows: Tensor, raters: Tensor, scale: float, causal: bool,
              softcap: float) -> Tensor:
        p = torch.ops.foveate.attention_rows(q, k, mask, rows, scale, causal, softcap).mean(1)
        return (raters[:, None] @ p)[:, 0]

    def limit(self, visual: Tensor, valid: Tensor) -> Tensor:
        return (visual & valid).sum(1) - (1 if self.mode == "parity" else 0)

    def merged(self, dropped: Any) -> Any:
        return clusters(dropped) if self.recycle else 0

    def merge(self, hidden: Tensor, score: Tensor, best: Tensor, present: Tensor, most: Any) -> tuple[Tensor, Tensor]:
        return recycle(hidden, score, best, present, most) if self.recycle else (best, hidden)
