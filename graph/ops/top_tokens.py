"""Mark the best tokens of every row."""

import torch
from torch import Tensor

from ._define import op


@op
def top_tokens(score: Tensor, k: int) -> Tensor:
    """score[B, T], 0 <= k <= T  ->  mask[B, T] bool: True for the k largest of each row; ties go to the lower index, NaN ranks last"""
    score = torch.where(score.isnan(), float("-inf"), score.float())
    best = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(score, dtype=torch.bool).scatter(1, best, torch.ones_like(best, dtype=torch.bool))
