"""SparseVLM: text tokens that speak of the image rate the visual tokens, and the best of the dropped are recycled."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ...graph.program import Program
from ..recycle import clusters, recycle
from ..select import Keep, Layer, Staged

F = torch.ops.foveate


@dataclass(frozen=True)
class DropSparseVlm(Staged):
    """Keep the visual tokens that the raters, question tokens close to the image at the input, attend to; merge some of the rest.

    rewrite:
        p[B, H, R, T] = attention_rows(q, k, text rows);  s = sum_r raters[r] mean_h p[h, r]      (the layer before each of `layers`)
        best = top(s, keep);  of the p dropped, the int(0.3 p) + 1 best form DPC-kNN clusters, a tenth as many, and one
        h[centre of a cluster] = mean of the cluster;  every value crossing into the layer is gathered by compact(text or best or centres)

    Zhang et al., "SparseVLM", ICML 2025. Defaults: v1.5's list for 192 tokens, after layers 2, 6, 15 (recipes: 192, 128, 96, 64); the first version's
    rank rule is those lists, chosen by the host. A merged token stands at its centre's place; the published code appends it behind the kept ones.
    recycle: false drops the rest.
    version 2 (SparseVLM+): p is divided by what rotary positions alone make of it, ones rotated for both places; only the `heads` share of heads that
    looks at the image most counts; nothing is recycled, positions stay (recipes: sparsevlm2-192 ...). The published code takes 14 of 28 heads.
    mode: fixed breaks ties of the clustering by order (the published code adds noise) and keeps original positions; parity also drops at least one
    token per stage and, in version 1, numbers the tokens anew behind every stage, as published.
    """

    name: ClassVar[str] = "drop-sparse-vlm"
    paper: ClassVar[str] = "arXiv:2410.04417"

    layers: tuple[Layer, ...] = (3, 7, 16)
    keeps: tuple[Keep, ...] = (300, 200, 110)
    recycle: bool = True
    version: Literal[1, 2] = 1
    heads: Annotated[float, Field(gt=0, le=1)] = 0.5
    mode: Literal["fixed", "parity"] = "fixed"

    @property
    def compact(self) -> bool:
        return self.mode == "parity" and self.version == 1

    def run(self, program: Program) -> bool:
        if self.version == 2 and program.facts.positions.get("kind") == "mrope":
            raise self.fail(f"version 2 corrects for rotary positions of one axis, and those of {program.facts.model_type} have three")
        return super().run(program)

    def score(self, q: Tensor, k: Tensor, mask: Tensor | None, rows: Tensor, raters: Tensor, rope: Tensor | None, visual: Tensor, valid: Tensor,
              scale: float, causal: bool, softcap: float) -> Tensor:
        p = F.attention_rows(q, k, mask, rows, scale, causal, softcap)
        if self.version == 1:
            return (raters[:, None] @ p.mean(1))[:, 0]
        if rope is not None:
            p = p / gravity(rope.float(), rows)[:, None]
        heads = (raters[:, None, None] @ p)[:, :, 0]  # [B, H, T]
        looks = torch.where((visual & valid)[:, None], heads, 0).sum(2)
        chosen = F.top_tokens(looks, max(1, round(self.heads * looks.shape[1])), None).float()
        return (chosen[:, :, None] * heads).sum(1) / chosen.sum(1, keepdim=True)

    def limit(self, visual: Tensor, valid: Tensor) -> Tensor:
        return (visual & valid).sum(1) - (1 if self.mode == "parity" else 0)

    def merged(self, dropped: Any) -> Any:
        return clusters(dropped) if self.recycle and self.version == 1 else 0

    def merge(self, hidden: Tensor, score: Tensor, best: Tensor, present: Tensor, most: Any) -> tuple[Tensor, Tensor]:
        return recycle(hidden, score, best, present, most) if self.recycle and self.version == 1 else (best, hidden)


def gravity(rope: Tensor, rows: Tensor) -> Tensor:
    """rope[B, T, 2 d], rows[B, R] -> [B, R, T]: the product, over sqrt d, of ones rotated to both places"""
    cos, sin = rope.chunk(2, -1)
    half = cos.shape[-1] // 2
    ones = torch.cat([cos[..., :half] - sin[..., :half], cos[..., half:] + sin[..., half:]], -1)
    return F.keep_tokens(ones, rows) @ ones.transpose(1, 2) * cos.shape[-1] ** -0.5
