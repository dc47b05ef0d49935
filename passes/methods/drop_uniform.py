"""Uniform drop: every n-th visual token, the control for spatial coverage."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..select import Keep, Layer, Select


@dataclass(frozen=True)
class DropUniform(Select):
    """Keep evenly spaced visual tokens in reading order.

    rewrite:
        token r of n stays when floor((r + 1) keep / n) > floor(r keep / n);  every value crossing into `layer` is gathered
    """

    name: ClassVar[str] = "drop-uniform"

    layer: Layer = 2
    keep: Keep = 0.5

    def score(self, visual: Tensor, valid: Tensor, budget: Tensor) -> Tensor:
        present = visual & valid
        n = present.sum(1, keepdim=True)
        rank = present.long().cumsum(1) - 1
        keep = budget[:, None]
        stays = ((rank + 1) * keep) // n.clamp(min=1) > (rank * keep) // n.clamp(min=1)
        return stays.float()
