"""Random pruning: the control that every selector at the vision side has to beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..select import Keep
from ..vision_plan import best
from ..vision_select import VisionSelect
from .drop_random import DropRandom


@dataclass(frozen=True)
class PruneRandom(VisionSelect):
    """Keep patches at random: the same ones for the same seed in every picture, and those that `drop-random` keeps of one picture.

    rewrite:
        i = compact(top(hash(index, seed), keep));  keep_tokens(patches, i) -> projector
    """

    name: ClassVar[str] = "prune-random"

    keep: Keep = 0.25
    seed: int = 0

    def choose(self, count: int, features: Tensor) -> Tensor:
        place = torch.ones_like(features[..., 0], dtype=torch.int64).cumsum(1) - 1
        return best(DropRandom(seed=self.seed).score(place), count)
