"""PyramidDrop: drop more visual tokens at every stage, by the last token's attention in the layer that comes next."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..select import Keep, Layer, Staged


@dataclass(frozen=True)
class DropPyramid(Staged):
    """Keep the visual tokens that the last prompt token attends to most in the layer behind the cut, at several layers.

    rewrite:
        p[B, H, 1, T] = attention_rows(q of the last valid row, k)    (both projected by layer k itself, from the stream before its cut)
        i = compact(text or top(mean_h p, keep));  every value crossing into layer k is gathered by i

    Xing et al., "PyramidDrop", CVPR 2025 (section 3.2). Defaults: half, a quarter, an eighth of the prompt's visual tokens from layers 8, 16, 24.
    Only one row's query is projected; k costs one projection per stage.
    mode: fixed rounds shares up and keeps original positions; parity rounds down, as int(N ratio) of the published code does, and numbers the tokens
    anew behind every stage, with decode positions to match.
    """

    name: ClassVar[str] = "drop-pyramid"
    paper: ClassVar[str] = "arXiv:2410.17247"

    layers: tuple[Layer, ...] = (8, 16, 24)
    keeps: tuple[Keep, ...] = (0.5, 0.25, 0.125)
    mode: Literal["fixed", "parity"] = "fixed"

    @property
    def compact(self) -> bool:
        return self.mode == "parity"

    def count(self, keep: Keep, visual: Any) -> Any:
        return super().count(keep, visual) if self.mode == "fixed" or isinstance(keep, int) else visual * round(keep * 1000) // 1000

    def score(self, next_q: Tensor, next_k: Tensor, valid: Tensor, next_scale: float, next_softcap: float) -> Tensor:
        row = torch.zeros_like(next_q[:, 0, :, 0], dtype=torch.int64)  # the only one there is; it sees every valid token
        return torch.ops.foveate.attention_rows(next_q, next_k, valid, row, next_scale, False, next_softcap)[:, :, 0].mean(1)
