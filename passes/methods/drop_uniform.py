"""Uniform drop: every n-th visual token, the control for spatial coverage."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..select import Keep, Layer, Select

GOLDEN = 40503  # 2^16 / golden ratio: multiples of it are evenly spread modulo 2^16, however many


@dataclass(frozen=True)
class DropUniform(Select):
    """Keep evenly spaced visual tokens in reading order.

    rewrite:
        token r of n stays when floor((r + 1) keep / n) > floor(r keep / n);  every value crossing into `layer` is gathered
        staggered: the tokens with the smallest r GOLDEN mod 2^16 stay

    Shares that divide the rows of a picture alias with them: a quarter of 12 x 12 tokens is three whole columns. `staggered` shifts every
    row against the one before, without knowing the grid: the harder control.
    """

    name: ClassVar[str] = "drop-uniform"

    layer: Layer = 2
    keep: Keep = 0.5
    staggered: bool = False

    def score(self, visual: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
        present = visual & valid
        n = present.sum(1, keepdim=True)
        rank = present.long().cumsum(1) - 1
        if self.staggered:
            return -torch.where(present, rank * GOLDEN % (1 << 16), 0).float()
        keep = budget[:, None]
        stays = ((rank + 1) * keep) // n.clamp(min=1) > (rank * keep) // n.clamp(min=1)
        return stays.float()
