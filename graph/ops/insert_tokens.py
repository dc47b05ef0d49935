"""Put learned tokens between others: registers, meta tokens."""

import torch
from torch import Tensor

from ._define import op


@op
def insert_tokens(x: Tensor, tokens: Tensor, at: Tensor) -> Tensor:
    """x[B, T, D], tokens[M, D], at[B]  ->  y[B, T + M, D]: row b gets `tokens` before its position at[b]"""
    B, T, D = x.shape
    M = tokens.shape[0]
    slot = torch.arange(T + M, device=x.device)[None]
    inside = (slot >= at[:, None]) & (slot < at[:, None] + M)
    source = torch.where(slot < at[:, None], slot, slot - M).clamp(0, T - 1)
    kept = x.gather(1, source[..., None].expand(B, T + M, D))
    new = tokens[(slot - at[:, None]).clamp(0, M - 1)]
    return torch.where(inside[..., None], new.to(x.dtype), kept)
