"""Which rows of past + new are valid."""

import torch
from torch import Tensor

from ._define import op


@op
def kv_mask(past: Tensor, lengths: Tensor, layer: int) -> Tensor:
    """past[B, G, P, D], lengths[layers, B]  ->  valid[B, P + 1]: the first lengths[layer, b] past rows, and the new one"""
    inside = torch.arange(past.shape[2], device=past.device)[None] < lengths[layer][:, None]
    return torch.cat([inside, inside.new_ones(inside.shape[0], 1)], 1)
