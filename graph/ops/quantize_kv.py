"""Keys or values as codes."""

from functools import partial

import torch
from torch import Tensor

from ._define import op


def spread(state: Tensor, x: Tensor, block: int) -> Tensor:
    """A scale or centre of any granularity, broadcastable against x[B, G, T, D]; block: tokens that share one, 0 = one each or all."""
    if block:
        state = state.repeat_interleave(block, 2)[:, :, : x.shape[2]]
    if state.shape[3] not in (1, x.shape[3]):
        state = state.repeat_interleave(x.shape[3] // state.shape[3], 3)
    return state


def _shape(x: Tensor, scale: Tensor, center: Tensor | None, bits: int, block: int) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


@partial(op, fake=_shape)
def quantize_kv(x: Tensor, scale: Tensor, center: Tensor | None, bits: int, block: int) -> Tensor:
    """x[B, G, T, D], scale and center as `kv_scale` makes them  ->  codes int8[B, G, T, D] = round((x - center) / scale)

    Round half to even, clamped to [-2^(bits-1), 2^(bits-1) - 1]; 1 bit: -1 or 1. Sub-byte codes are values here; `pack_kv` packs them.
    """
    shifted = x.float() if center is None else x.float() - spread(center, x, block).float()
    if bits == 1:
        return torch.where(shifted < 0, -1, 1).to(torch.int8)
    top = 2 ** (bits - 1)
    return (shifted / spread(scale, x, block).float()).round().clamp(-top, top - 1).to(torch.int8)
