"""Turn a keep mask into a gather index: kept tokens first, in their order."""

import torch
from torch import Tensor

from ._define import op


@op
def compact_tokens(keep: Tensor, size: int) -> Tensor:
    """keep[B, T] bool  ->  index[B, size]: the positions where `keep` holds, ascending, then T - 1 in the places left over

    `size` must be at least the largest number of kept tokens in a row; it may be symbolic.
    """
    B, T = keep.shape
    rank = keep.long().cumsum(1) - 1
    slot = torch.where(keep & (rank < size), rank, size)  # one spare slot swallows what is dropped
    position = torch.arange(T, device=keep.device)[None].expand(B, T)
    index = torch.full((B, size + 1), 1, dtype=torch.int64, device=keep.device) * (T - 1)
    return index.scatter(1, slot, position)[:, :size].contiguous()
