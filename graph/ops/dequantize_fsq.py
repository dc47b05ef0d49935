"""Finite scalar codes back to keys or values (experimental)."""

from torch import Tensor

from ._define import op
from .quantize_kv import spread


@op
def dequantize_fsq(codes: Tensor, scale: Tensor, center: Tensor | None, levels: int, block: int) -> Tensor:
    """codes int8[B, G, T, D]  ->  x[B, G, T, D] = center + scale atanh(2 codes / levels), in the scale's type"""
    top = (levels - 1) // 2
    y = codes.float().clamp(-top, top) * (2 / levels)  # rows that hold nothing yet are finite too
    x = (((1 + y) / (1 - y)).log() / 2).to(scale.dtype) * spread(scale, codes, block)
    return x if center is None else x + spread(center, codes, block)
