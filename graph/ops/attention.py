"""Scaled dot-product attention of one layer, as one node."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._define import op


def attention_logits(q: Tensor, k: Tensor, mask: Tensor | None, q_pos: Tensor | None, k_pos: Tensor | None,
                     scale: float, causal: bool, window: int, softcap: float) -> Tensor:
    """q[B, H, S, D], k[B, G, T, D] -> masked logits[B, H, S, T] in float32; shared by `attention` and `attention_rows`."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1) if k.shape[1] != q.shape[1] else k
    logits = (q.float() @ k.float().transpose(-1, -2)) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is not None:
        if mask.dim() == 2:
            mask = mask[:, None, None, :]
        logits = logits.masked_fill(~mask, -1e30) if mask.dtype == torch.bool else logits + mask
    if causal:
        if q_pos is None or k_pos is None:
            k_pos = torch.arange(k.shape[2], device=q.device)[None]
            q_pos = torch.arange(q.shape[2], device=q.device)[None] + (k.shape[2] - q.shape[2])
        distance = q_pos[:, None, :, None] - k_pos[:, None, None, :]
        seen = distance >= 0
        if window:
            seen = seen & (distance < window)
        logits = logits.masked_fill(~seen, -1e30)
    return logits


def _shape(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@partial(op, fake=_shape)
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_pos: Tensor | None, k_pos: Tensor | None,
              scale: float, causal: bool, window: int, softcap: float, layer: int) -> Tensor:
    """q[B, H, S, D], k[B, G, T, D], v[B, G, T, Dv]  ->  y[B, S, H, Dv] = softmax(q k^T scale) v

    mask: None, bool[B, T] (True = key is valid) or bool/float[B or 1, 1 or H, S, T]. causal: query i sees keys with k_pos <= q_pos;
    without positions both end at the same token (bottom-right aligned). window: sees fewer than `window` positions back; 0 = all.
    layer: index in its tower, -1 when it has none. softmax in float32 whatever the inputs.
    """
    p = attention_logits(q, k, mask, q_pos, k_pos, scale, causal, window, softcap).softmax(-1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1) if v.shape[1] != q.shape[1] else v
    return (p @ v.float()).to(q.dtype).transpose(1, 2).contiguous()
