"""Space to depth: neighbouring tokens side by side in one wider token, through a learned linear map."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from ..insert_vision import Initial, VisionInsertion, to_blocks
from ..vision_place import Place


@dataclass(frozen=True)
class SpaceToDepth(VisionInsertion):
    """Every `side` x `side` block of tokens becomes one: the block's features in a row, mapped back to their width before the projector.

    rewrite:
        x[I, n, D] -> projector  =>  linear(blocks(x)[I, n / side^2, side^2 D], W) -> projector

    W starts as [I I I I] / side^2: before training this is exactly average pooling. The trained form is that of InternVL and Qwen2-VL, the idea of
    patchifying before a compressor that of LTX-Video (HaCohen et al. 2024). W and the projector's first layer are one linear map.
    """

    name: ClassVar[str] = "space-to-depth"
    paper: ClassVar[str] = "arXiv:2501.00103"

    side: Annotated[int, Ge(2)] = 2

    def count(self, place: Place) -> int:
        return self.blocks(place, self.side)

    def initial(self, place: Place, width: int) -> Initial:
        k = self.side**2
        return {"weight": lambda: torch.eye(width).repeat(1, k) / k}

    def map(self, x: Tensor, place: Place, weight: Tensor) -> Tensor:
        return torch.nn.functional.linear(to_blocks(x, self.grid(place), self.side).flatten(2), weight)
