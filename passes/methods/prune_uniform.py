"""Uniform pruning: every n-th patch, the control for spatial coverage at the vision side."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..select import Keep
from ..vision_plan import best
from ..vision_select import VisionSelect
from ..vision_signals import evenly


@dataclass(frozen=True)
class PruneUniform(VisionSelect):
    """Keep evenly spaced patches in reading order; the same tokens as `drop-uniform` keeps inside the language model.

    rewrite:
        token r of n stays when floor((r + 1) keep / n) > floor(r keep / n);  keep_tokens(patches, those) -> projector
    """

    name: ClassVar[str] = "prune-uniform"

    keep: Keep = 0.25

    def choose(self, count: int, features: Tensor) -> Tensor:
        return best(evenly(count, torch.ones_like(features[..., 0], dtype=torch.bool)).float(), count)
