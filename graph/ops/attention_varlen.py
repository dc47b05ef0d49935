"""Attention inside packed segments: the windows and frames of Qwen-VL-like vision towers."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._define import op


def _shape(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@partial(op, fake=_shape)
def attention_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float, layer: int) -> Tensor:
    """q, k, v[1, H, S, D], cu_seqlens[segments + 1]  ->  y[1, S, H, D]; token i sees the tokens of its own segment."""
    segment = (torch.arange(q.shape[2], device=q.device)[:, None] >= cu_seqlens[None, 1:]).sum(1)
    logits = (q.float() @ k.float().transpose(-1, -2)) * scale
    logits = logits.masked_fill(segment[:, None] != segment[None], -1e30)
    return (logits.softmax(-1) @ v.float()).to(q.dtype).transpose(1, 2).contiguous()
