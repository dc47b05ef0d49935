"""Recycle: the best of the dropped tokens are clustered, and each cluster lives on as one token in the place of its centre.

DPC-kNN as SparseVLM uses it (Rodriguez & Laio 2014; arXiv:2410.04417, section 3.4), per sample, static shapes, ties to the earlier token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

F = torch.ops.foveate
FAR = 1e30


def candidates(dropped: Any) -> Any:
    """How many of `dropped` tokens are clustered: 30 %, and one."""
    return 3 * dropped // 10 + 1


def clusters(dropped: Any) -> Any:
    """How many clusters they form: a tenth of the candidates, and one."""
    return candidates(dropped) // 10 + 1


def recycle(hidden: Tensor, score: Tensor, best: Tensor, present: Tensor, most: Any) -> tuple[Tensor, Tensor]:
    """hidden[B, T, D], score, best, present [B, T]; `most` bounds the dropped tokens  ->  best with the cluster centres, hidden with their
    means in place
    """
    dropped = present & ~best
    p = dropped.sum(1)
    m, c = torch.minimum(candidates(p), p), torch.minimum(clusters(p), p)
    M = candidates(most)
    again = F.top_tokens(torch.where(dropped, score, float("-inf")), M, m) & dropped
    index = F.compact_tokens(again, M)
    there = torch.arange(index.shape[1], device=index.device)[None] < m[:, None]
    x = F.keep_tokens(hidden, index)
    centre, owner = cluster(x, there, c)
    own = owner[:, None, :] == torch.arange(index.shape[1], device=index.device)[None, :, None]
    member = own & there[:, None, :] & centre[:, :, None]
    merged = F.merge_tokens(x, member.float() / member.sum(2, keepdim=True).clamp(min=1))
    slot = (again.long().cumsum(1) - 1).clamp(min=0)
    lives = again & centre.gather(1, slot)
    return best | lives, torch.where(lives[..., None], F.keep_tokens(merged, slot), hidden)


def cluster(x: Tensor, there: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """x[B, M, D], there[B, M] bool, count[B]  ->  centre[B, M] bool, owner[B, M]: the index of the centre that a token belongs to

    density = exp(-mean squared distance to the `count` nearest, itself among them); a centre is dense and far from anything denser.
    """
    M = x.shape[1]
    at = torch.arange(M, device=x.device)
    pair = there[:, :, None] & there[:, None, :]
    distance = torch.where(pair, distances(x, there), FAR)
    near = distance.sort(dim=2).values
    counted = at[None, None] < count[:, None, None]
    density = (-torch.where(counted & (near < FAR), near * near, 0).sum(2) / count[:, None].clamp(min=1)).exp()
    other, own = density[:, None, :], density[:, :, None]
    denser = (other > own) | ((other == own) & (at[None, None] < at[None, :, None]))
    farthest = torch.where(pair, distance, 0).amax((1, 2))
    lonely = torch.where(denser & pair, distance, FAR).amin(2)
    score = torch.minimum(lonely, farthest[:, None]) * density
    centre = F.top_tokens(torch.where(there, score, float("-inf")), M, count) & there
    nearest = torch.where(centre[:, None, :], distance, FAR).argmin(2)
    return centre, torch.where(centre, at[None], nearest)


def distances(x: Tensor, there: Tensor) -> Tensor:
    """x[B, M, D]  ->  |x_i - x_j| / sqrt(D) [B, M, M] by the Gram matrix of the centred rows, so that nothing of size M x M x D exists"""
    x = x.float()
    held = there[..., None]
    x = torch.where(held, x - (x * held).sum(1, keepdim=True) / held.sum(1, keepdim=True).clamp(min=1), 0)
    square = (x * x).sum(2)
    gram = x @ x.transpose(1, 2)
    gram = (gram + gram.transpose(1, 2)) / 2  # mutual nearest neighbours are equally dense, bit for bit
    apart = ~torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    return torch.where(apart, (square[:, :, None] + square[:, None, :] - 2 * gram).clamp(min=0), 0).sqrt() / x.shape[2] ** 0.5
