"""Codes and scales back to keys or values."""

from torch import Tensor

from ._define import op


@op
def dequantize_kv(codes: Tensor, scale: Tensor) -> Tensor:
    """codes int8[B, G, T, D], scale broadcastable  ->  x[B, G, T, D] = codes scale, in the scale's type"""
    return codes.to(scale.dtype) * scale
