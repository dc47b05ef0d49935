"""Greedy max-min: every next token is the one farthest from those already chosen."""

import torch
from torch import Tensor

from ._define import op


@op
def farthest_tokens(x: Tensor, k: int, repeat: bool) -> Tensor:
    """x[B, T, D], 1 <= k <= T  ->  index[B, k], in the order of choice, by cosine distance

    First the token that is farthest from its nearest other, then k - 1 times the one whose nearest chosen token is farthest: a running
    minimum,
    one row of the distances per step, no recomputation. Ties go to the lower index. `repeat` lets a chosen token be chosen again, which
    happens
    when every other one is a duplicate of a chosen one.
    """
    x = x.float()
    x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    distance = 1 - x @ x.transpose(1, 2)
    place = torch.arange(x.shape[1], device=x.device)[None]
    nearest = distance.masked_fill(place == place.T, float("inf")).amin(1)
    chosen = []
    for step in range(k):
        best = nearest.argmax(1, keepdim=True)
        chosen.append(best)
        row = distance.gather(1, best[..., None].expand(-1, 1, x.shape[1])).squeeze(1)
        nearest = row if step == 0 else nearest.minimum(row)
        if not repeat:
            nearest = nearest.masked_fill(place == best, -1.0)  # below every distance, so it stays the minimum from here on
    return torch.cat(chosen, 1)
