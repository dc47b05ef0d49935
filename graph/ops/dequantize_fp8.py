"""8-bit floats back to keys or values."""

import torch
from torch import Tensor

from ._define import op
from .quantize_kv import spread


@op
def dequantize_fp8(codes: Tensor, scale: Tensor, block: int) -> Tensor:
    """codes int8[B, G, T, D], the bytes of float8_e4m3fn  ->  x[B, G, T, D] in the scale's type"""
    byte = codes.float()
    rest = torch.where(byte < 0, byte + 128, byte)
    e = (rest / 8).floor()
    m = rest - 8 * e
    a = torch.where(e > 0, (8 + m) * torch.exp2(e - 10), m * 2.0**-9)
    return torch.where(byte < 0, -a, a).to(scale.dtype) * spread(scale, codes, block)
