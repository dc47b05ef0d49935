"""Attention patterns that are not plain causal, as masks that a cut can gather on both dimensions."""

from __future__ import annotations

import torch
from torch import Tensor


def image_block_masks(valid: Tensor, visual: Tensor, window: int | None) -> dict[str, Tensor]:
    """valid, visual: bool[B, S] -> masks bool[B, 1, S, S] by layer type: causal, plus both directions inside each run of visual tokens.

    The window of `sliding_attention` applies to both: a token sees fewer than `window` positions back.
    """
    run = (~visual).long().cumsum(1)  # equal for the visual tokens of one run: no other token comes between them
    together = (run[:, :, None] == run[:, None]) & visual[:, :, None] & visual[:, None]
    at = torch.arange(valid.shape[1], device=valid.device)
    distance = (at[:, None] - at[None])[None]
    seen = ((distance >= 0) | together) & valid[:, None]
    masks = {"full_attention": seen[:, None]}
    return masks | ({"sliding_attention": (seen & (distance < window))[:, None]} if window else {})
