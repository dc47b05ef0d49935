"""What tokens receive of the attention of a few probe rows."""

from __future__ import annotations

import torch
from torch import Tensor

from .taps import last_valid

F = torch.ops.foveate


def probes(valid: Tensor, recent: int, strided: int) -> Tensor:
    """valid[B, T]  ->  rows[B, recent + strided]: the last valid rows, and rows at equal distances; the first again where there are fewer"""
    last = last_valid(valid)
    first = last + 1 - valid.sum(1, keepdim=True)
    newest = torch.maximum(last - torch.arange(recent, device=valid.device)[None], first)
    spread = first + torch.arange(strided, device=valid.device)[None] * (last + 1 - first) // max(strided, 1)
    return torch.cat([newest, spread], 1)


def received(q: Tensor, k: Tensor, mask: Tensor | None, rows: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
    """rows[B, R]  ->  [B, T]: what all heads of these rows give to every token"""
    return F.attention_rows(q, k, mask, rows, scale, causal, softcap).sum((1, 2))


def onlookers(valid: Tensor, rows: Tensor, causal: bool) -> Tensor:
    """valid[B, T], rows[B, R]  ->  [B, T]: how many of the rows can see a token, at least 1"""
    at = torch.arange(valid.shape[1], device=valid.device)
    seen = rows[:, :, None] >= at if causal else torch.ones_like(rows, dtype=torch.bool)[:, :, None].expand(-1, -1, valid.shape[1])
    return seen.sum(1).clamp(min=1)
