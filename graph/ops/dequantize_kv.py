"""Codes, scales and centres back to keys or values."""

from functools import partial

import torch
from torch import Tensor

from ._define import op
from .quantize_kv import spread


def _shape(codes: Tensor, scale: Tensor, center: Tensor | None, block: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@partial(op, fake=_shape)
def dequantize_kv(codes: Tensor, scale: Tensor, center: Tensor | None, block: int) -> Tensor:
    """codes int8[B, G, T, D]  ->  x[B, G, T, D] = codes scale + center, in the scale's type; scale, center and block as in `quantize_kv`"""
    x = codes.to(scale.dtype) * spread(scale, codes, block)
    return x if center is None else x + spread(center, codes, block)
