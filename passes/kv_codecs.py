"""Codes: how rows become codes and codes rows. One entry per code of graph/kv_format.py."""

from __future__ import annotations

import torch
from torch import Tensor

from ..graph.kv_format import BITS, Partition

F = torch.ops.foveate


def states(x: Tensor, valid: Tensor, part: Partition, which: str, margin: float) -> tuple[Tensor, ...]:
    """x[B, G, T, D], valid[B, T]  ->  (scale,) or (scale, center), as the partition stores them"""
    scale, center = F.kv_scale(x, valid, BITS[part.code], part.per(which), part.centred, margin)
    return (scale, center) if part.centred else (scale,)


def encode(x: Tensor, state: tuple[Tensor, ...], part: Partition, which: str) -> Tensor:
    """x[B, G, T, D]  ->  codes int8[B, G, T, D]"""
    return F.quantize_kv(x, state[0], state[1] if part.centred else None, BITS[part.code], part.block(which))


def decode(codes: Tensor, state: tuple[Tensor, ...], part: Partition, which: str, dtype: torch.dtype) -> Tensor:
    """codes[B, G, T, D]  ->  x[B, G, T, D]"""
    if part.code == "float":
        return codes
    return F.dequantize_kv(codes, state[0], state[1] if part.centred else None, part.block(which)).to(dtype)
