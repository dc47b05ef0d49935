"""Codes of less than a byte, several to a byte."""

import torch
from torch import Tensor

from ._define import op


@op
def pack_kv(codes: Tensor, bits: int) -> Tensor:
    """codes int8[..., D], bits 1, 2 or 4  ->  packed int8[..., ceil(D bits / 8)]

    Byte minus 128 of sum_i u_i 2^(bits i) with u = code + 2^(bits-1) (1 bit: code > 0), the first element lowest: with 4 bits the layout of
    GroupQueryAttention's uint8 caches, and int8 so that every target has the type.
    """
    each = 8 // bits
    unsigned = (codes > 0).int() if bits == 1 else codes.int() + 2 ** (bits - 1)
    unsigned = torch.nn.functional.pad(unsigned, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    weight = torch.tensor([2 ** (bits * i) for i in range(each)], dtype=torch.int32, device=codes.device)
    return ((unsigned * weight).sum(-1) - 128).to(torch.int8)
