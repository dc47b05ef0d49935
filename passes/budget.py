"""Budgets finer than a sample: how scores are made comparable so that every image gets its share."""

import torch
from torch import Tensor


def rank_in_group(score: Tensor, group: Tensor, present: Tensor) -> Tensor:
    """score[B, T], group[B, T] int, present[B, T] bool  ->  rank[B, T]: how many present tokens of the same group come first

    Higher scores first, ties by position. The k tokens of smallest rank over the whole row are split evenly over the groups, so minus the
    rank is a score.
    """
    at = torch.arange(score.shape[1], device=score.device)
    ahead = (score[:, None, :] > score[:, :, None]) | ((score[:, None, :] == score[:, :, None]) & (at[None, None] < at[None, :, None]))
    return (ahead & (group[:, None, :] == group[:, :, None]) & present[:, None, :]).sum(2)
