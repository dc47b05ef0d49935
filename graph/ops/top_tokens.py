"""Mark the best tokens of every row."""

import torch
from torch import Tensor

from ._define import op


@op
def top_tokens(score: Tensor, k: int, budget: Tensor | None) -> Tensor:
    """score[B, T], 0 <= k <= T  ->  mask[B, T] bool: True for the k largest of each row, or the budget[b] largest where that is fewer

    Ties go to the lower index, NaN ranks last.
    """
    score = torch.where(score.isnan(), float("-inf"), score.float())
    order = score.sort(dim=1, descending=True, stable=True).indices
    # no slice [:, :k]: traced with a symbolic T whose sample is shorter than k, it would be dropped as "the whole row"
    taken = (torch.arange(score.shape[1], device=score.device)[None] < k).expand(order.shape)
    if budget is not None:
        taken = taken & (torch.arange(score.shape[1], device=score.device)[None] < budget[:, None])
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, order, taken)
