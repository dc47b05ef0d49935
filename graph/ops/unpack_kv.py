"""Several codes to a byte, back to one each."""

import torch
from torch import Tensor

from ._define import op


@op
def unpack_kv(packed: Tensor, bits: int, width: int) -> Tensor:
    """packed int8[..., ceil(width bits / 8)]  ->  codes int8[..., width]; the reverse of `pack_kv`, by float arithmetic that every target has"""
    byte = packed.float() + 128
    digits = [(byte / 2 ** (bits * i)).floor() for i in range(8 // bits)]
    above = [*digits[1:], torch.zeros_like(byte)]
    unsigned = torch.stack([d - a * 2**bits for d, a in zip(digits, above, strict=True)], -1).flatten(-2)[..., :width]
    return (unsigned * 2 - 1 if bits == 1 else unsigned - 2 ** (bits - 1)).to(torch.int8)
