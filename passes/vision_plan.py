"""A plan: what becomes of the n tokens of every image. Decided once, applied to every tensor of those tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

F = torch.ops.foveate


@dataclass(frozen=True)
class Plan:
    """What becomes of n tokens: kept[I, K] says which token row k is, or stands for, -1 = none (a row of zeros, or a summary of many).

    weight[I, K, n or 1 + n]: rows are weighted sums (of CLS and tokens, where it has 1 + n columns); without it rows are copies.
    """

    kept: Tensor
    weight: Tensor | None = None
    holes: bool = False  # some rows may be empty

    def apply(self, x: Tensor) -> Tensor:
        """x[I, n, D] -> [I, K, D]; every tensor of the same tokens goes through the same plan"""
        if self.weight is not None:
            return F.merge_tokens(x, self.weight)
        if not self.holes:
            return F.keep_tokens(x, self.kept)
        return torch.where(self.kept[..., None] >= 0, F.keep_tokens(x, self.kept.clamp(min=0)), 0.0)


def best(score: Tensor, count: int) -> Tensor:
    """score[I, n] -> index[I, count] of the best, ascending"""
    return F.compact_tokens(F.top_tokens(score, count, None), count)


def one_hot(index: Tensor, n: int) -> Tensor:
    """index[I, K] -> [I, K, n] float32; an index of -1 is a row of zeros"""
    return (index[..., None] == torch.arange(n, device=index.device)).float()


def grouped(x: Tensor, size: int) -> Tensor:
    """x[I, ...] -> [G + 1, size, ...]: consecutive images together, the last group filled up with the last image, and one spare group

    The spare one keeps the number of groups a symbol: with fewer images than `size` in the example it would be traced as the number 1. No
    grouping, no spare.
    """
    if size == 1:
        return x[:, None]
    index = torch.arange(groups(x.shape[0], size) + 1, device=x.device)[:, None] * size + torch.arange(size, device=x.device)[None]
    return x[index.clamp(max=x.shape[0] - 1)]


def groups(images: Any, size: int) -> Any:
    """G, the number of groups that hold all images (int or SymInt)"""
    return (images + size - 1) // size


def per_image(kept: Tensor, shared: int, n: int) -> Tensor:
    """kept[G, K] over the tokens of a group -> [images, n] per image, -1 where a token went"""
    if shared == 1:
        return kept
    stays = (kept[..., None] == torch.arange(shared * n, device=kept.device)).any(1)
    return torch.where(stays.unflatten(1, (shared, n)), torch.arange(n, device=kept.device), -1).flatten(0, 1)
