"""Keys or values as codes and scales."""

import torch
from torch import Tensor

from ._define import op


@op
def quantize_kv(x: Tensor, bits: int, axis: int) -> tuple[Tensor, Tensor]:
    """x[B, G, T, D]  ->  codes int8[B, G, T, D], scale: absmax over `axis` (2 = per channel, 3 = per token), kept with size 1

    Symmetric, round half to even, clamped to +-(2^(bits-1) - 1).
    """
    top = float(2 ** (bits - 1) - 1)
    scale = x.float().abs().amax(axis, keepdim=True).clamp(min=1e-8) / top
    return (x.float() / scale).round().clamp(-top, top).to(torch.int8), scale
