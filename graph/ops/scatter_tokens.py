"""Put processed tokens back among those that bypassed a layer."""

import torch
from torch import Tensor

from ._define import op


@op
def scatter_tokens(x: Tensor, y: Tensor, keep: Tensor) -> Tensor:
    """x[B, T, D], y[B, K, D], keep[B, T] bool  ->  z[B, T, D]: the i-th token with keep[b] becomes y[b, i], the others stay x

    The inverse of gathering by compact_tokens(keep, K): rows of y beyond the number of kept tokens are filler and go nowhere, so K may be a
    bound.
    """
    slot = (keep.long().cumsum(1) - 1).clamp(0, y.shape[1] - 1)
    return torch.where(keep[..., None], y.gather(1, slot[..., None].expand(*slot.shape, y.shape[2])).to(x.dtype), x)
