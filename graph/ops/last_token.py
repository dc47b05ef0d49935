"""The last valid row: what predicts the next token."""

import torch
from torch import Tensor

from ._define import op


@op
def last_token(x: Tensor, mask: Tensor) -> Tensor:
    """x[B, T, D], mask[B, T] bool  ->  y[B, D] = x[b, last t with mask[b, t]]; padding may be left or right"""
    position = torch.arange(x.shape[1], device=x.device)[None]
    last = torch.where(mask, position, 0).amax(1)
    return x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1)
