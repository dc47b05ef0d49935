"""FastV: after layer k - 1, the last token's attention says which visual tokens matter."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..select import Keep, Layer, Select, last_valid


@dataclass(frozen=True)
class DropFastV(Select):
    """Keep the visual tokens that the last prompt token attends to most, averaged over heads, in the layer before `layer`.

    rewrite:
        p[B, H, 1, T] = attention_rows(q, k, last valid row)     (layer - 1; its own attention stays fused)
        i = compact(text or top(mean_h p, keep));  every value crossing into `layer` is gathered by i

    Chen et al., "An Image is Worth 1/2 Tokens After Layer 2", ECCV 2024 (section 4). Defaults: layer 2, half of the tokens.
    Differences from the published code: batches and several images, original positions for the kept tokens (as in its inference path), and the cache
    of the layers before `layer` keeps every token.
    One mode: on one image and one sample both choose the same tokens; the differences above are no quirks worth keeping.
    """

    name: ClassVar[str] = "drop-fastv"
    paper: ClassVar[str] = "arXiv:2403.06764"

    layer: Layer = 2
    keep: Keep = 0.5

    def score(self, q: Tensor, k: Tensor, mask: Tensor | None, valid: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
        return torch.ops.foveate.attention_rows(q, k, mask, last_valid(valid), scale, causal, softcap)[:, :, 0].mean(1)
