"""Thin out near-duplicates: remove the most redundant of every second candidate, a few at a time."""

import torch
from torch import Tensor

from ._define import op


@op
def thin_tokens(x: Tensor, order: Tensor, k: int, step: int) -> Tensor:
    """x[B, T, D], order[B, R] candidates, 1 <= k <= R  ->  index[B, k], the candidates that stay

    Again and again: pair the candidates at even places with those at odd places, remove the `step` even ones that are most similar
    (cosine) to an
    odd one, and go on with [remaining even ones by falling similarity, odd ones]. The cosines are computed once and gathered.
    """
    x = x.float()
    x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    cosine = x @ x.transpose(1, 2)
    while order.shape[1] > k:
        even, odd = order[:, ::2], order[:, 1::2]
        gone = min(step, order.shape[1] - k, even.shape[1])
        if odd.shape[1] == 0:
            raise ValueError(f"thin_tokens: one candidate cannot be thinned to {k}")
        rows = cosine.gather(1, even[..., None].expand(-1, -1, x.shape[1]))
        likeness = rows.gather(2, odd[:, None].expand(-1, even.shape[1], -1)).amax(-1)
        by_likeness = likeness.sort(dim=1, descending=True, stable=True).indices[:, gone:]
        order = torch.cat([even.gather(1, by_likeness), odd], 1)
    return order.clone()
