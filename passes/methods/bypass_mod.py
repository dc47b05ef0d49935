"""Mixture of depths for visual tokens: in chosen layers only the best of every frame take part."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import rank_in_group
from ..bypass import Bypass
from ..select import Keep, Layer, last_valid


@dataclass(frozen=True)
class BypassMod(Bypass):
    """In each of `layers`, the visual tokens that the last prompt token attends to least, frame by frame, skip the layer and rejoin behind
    it.

    rewrite:
        s = mean_h attention_rows(q, k, last valid row)                          (the layer before)
        i = compact(text or top(-rank of s within the image, keep));  h' = scatter_tokens(h, layer(h[i], masks[i], cos[i], ...))

    Wu et al., "VideoLLM-MoD", NeurIPS 2024 (section 3.3): 20 % per frame, every other layer. Its router is a trained vector per layer, for which no
    weights are published; attention stands in for it here, and kept tokens are not weighted by their score. Any K/V of a layer are those that took
    part.
    One mode: nothing is published to be in parity with.
    """

    name: ClassVar[str] = "bypass-mod"
    paper: ClassVar[str] = "arXiv:2408.16730"

    layers: tuple[Layer, ...] = (3, 5, 7, 9, 11, 13, 15)
    keep: Keep = 0.2

    def score(self, q: Tensor, k: Tensor, mask: Tensor | None, visual: Tensor, valid: Tensor, image: Tensor, scale: float, causal: bool,
              softcap: float) -> Tensor:
        s = torch.ops.foveate.attention_rows(q, k, mask, last_valid(valid), scale, causal, softcap)[:, :, 0].mean(1)
        return -rank_in_group(s, image, visual & valid).float()
