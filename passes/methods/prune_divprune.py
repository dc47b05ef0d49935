"""DivPrune: the tokens that are as different from one another as possible."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..select import Keep
from ..vision_select import Mode, VisionSelect


@dataclass(frozen=True)
class PruneDivPrune(VisionSelect):
    """
    rewrite:
        i = sort(farthest_tokens(projected tokens, keep));  keep_tokens(projected tokens, i)

    Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (CVPR 2025): greedy max-min over cosine distances.
    Needs no attention: any tower. Default: 9.8% of the tokens.
    fixed: a token is chosen once. parity: where all others duplicate a chosen token, the published code chooses one again; the output repeats it.
    """

    name: ClassVar[str] = "prune-divprune"
    paper: ClassVar[str] = "arXiv:2503.02175"
    after_projector: ClassVar[bool] = True

    keep: Keep = 0.098
    mode: Mode = "fixed"

    def choose(self, count: int, features: Tensor) -> Tensor:
        return torch.ops.foveate.farthest_tokens(features, count, self.mode == "parity").sort(1).values
