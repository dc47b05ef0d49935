"""Greedy maximum a posteriori of a determinantal point process: relevant tokens that are unlike each other."""

import torch
from torch import Tensor

from ._define import op


@op
def dpp_tokens(kernel: Tensor, k: int, floor: float) -> Tensor:
    """kernel[B, T, T] positive semidefinite, 1 <= k <= T  ->  index[B, k], in the order of choice

    Each step takes the token with the largest gain in log-determinant and updates the gains from one row of the kernel (Chen et al. 2018).
    Gains below `floor` count as `floor`, so that a kernel of lower rank than k chooses the remaining tokens by index; floor = 0 is the
    published
    arithmetic, which divides by zero there.
    """
    kernel = kernel.float()
    place = torch.arange(kernel.shape[1], device=kernel.device)[None]
    gain = torch.where(place == place.T, kernel, 0.0).sum(-1)  # the diagonal
    rows: list[Tensor] = []
    chosen = []
    for _ in range(k):
        best = gain.argmax(1, keepdim=True)
        chosen.append(best)
        row = kernel.gather(1, best[..., None].expand(-1, 1, kernel.shape[1])).squeeze(1)
        if rows:
            known = torch.stack(rows, 1)
            row = row - (known.gather(2, best[:, None].expand(-1, known.shape[1], 1)) * known).sum(1)
        row = row / gain.gather(1, best).clamp(min=floor).sqrt()
        rows.append(row)
        gain = gain - row.square()
        if floor:
            gain = torch.where(gain.isneginf(), gain, gain.clamp(min=floor))
        gain = gain.masked_fill(place == best, float("-inf"))
    return torch.cat(chosen, 1)
