"""Which rows of a partition that nothing is appended to are valid."""

import torch
from torch import Tensor

from ._define import op


@op
def kv_held(past: Tensor, lengths: Tensor, layer: int) -> Tensor:
    """past[B, G, P, D], lengths[layers, B]  ->  valid[B, P]: the first lengths[layer, b] rows (`kv_mask` without the new one)"""
    return torch.arange(past.shape[2], device=past.device)[None] < lengths[layer][:, None]
