"""Keys or values by finite scalar quantization (experimental): evenly spaced levels behind a squashing function."""

import torch
from torch import Tensor

from ._define import op
from .quantize_kv import spread


@op
def quantize_fsq(x: Tensor, scale: Tensor, center: Tensor | None, levels: int, block: int) -> Tensor:
    """x[B, G, T, D], levels odd  ->  codes int8[B, G, T, D] = round(levels / 2 tanh((x - center) / scale)), within +-(levels - 1) / 2

    Mentzer et al., "Finite Scalar Quantization", 2023: the levels are dense about the centre and wide apart in the tails.
    """
    shifted = x.float() if center is None else x.float() - spread(center, x, block).float()
    top = (levels - 1) // 2
    return (torch.tanh(shifted / spread(scale, x, block).float()) * (levels / 2)).round().clamp(-top, top).to(torch.int8)
