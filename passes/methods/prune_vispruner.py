"""VisPruner: some tokens for their attention, the others for being unlike the rest."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor

from ..select import Keep
from ..vision_plan import one_hot
from ..vision_select import VisionSelect


@dataclass(frozen=True)
class PruneVisPruner(VisionSelect):
    """
    rewrite:
        order = argsort(mean_h attention of CLS, falling)
        i = order[:important keep] with thin_tokens(patches, order[important keep:], the rest of keep, step), ascending
        keep_tokens(patches, i) -> projector

    Zhang et al., "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs" (ICCV 2025). Duplicates go `step` at a
    time, the even half against the odd half of the candidates. Published settings: 128 patches with important 0.5, 64 with 0.75.
    Difference: the published loop fails on an odd number of candidates; here the even half may be one longer. Everything else is the same.
    One mode: the same tokens as the published code wherever that runs.
    """

    name: ClassVar[str] = "prune-vispruner"
    paper: ClassVar[str] = "arXiv:2412.01818"

    keep: Keep = 0.25
    important: Annotated[float, Field(ge=0, le=1)] = 0.5
    step: Annotated[int, Ge(1)] = 8

    def choose(self, count: int, features: Tensor, cls: Tensor) -> Tensor:
        order = cls.mean(1).sort(dim=1, descending=True, stable=True).indices
        first = int(count * self.important)
        chosen = order[:, :first]
        if count > first:
            others = torch.ops.foveate.thin_tokens(features, order[:, first:].contiguous(), count - first, self.step)
            chosen = torch.cat([chosen, others], 1)
        return torch.ops.foveate.compact_tokens(one_hot(chosen, order.shape[1]).sum(1) > 0, count)
