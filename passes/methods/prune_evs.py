"""EVS: of every frame of a video, only what changed since the frame before."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from ..select import Keep
from ..vision_plan import best, grouped
from ..vision_select import VisionSelect


@dataclass(frozen=True)
class PruneEvs(VisionSelect):
    """
    rewrite:
        d[video, t, n] = 1 - cos(x_t, x_{t-1}), and 255 in frame 0;  i = compact(top(d over all frames, frames keep));  keep_tokens(x, i)

    "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference" (2025). The vision stage is given the frames as images:
    `frames` consecutive images are one video and share the budget; the first frame stays whole where the budget allows. Default: 30% stay. A prompt
    must place the frames of a video side by side: together they bring frames * keep tokens, but not the same number each.
    One mode: the same tokens as the published code.
    """

    name: ClassVar[str] = "prune-evs"
    paper: ClassVar[str] = "arXiv:2510.14624"
    after_projector: ClassVar[bool] = True

    keep: Keep = 0.3
    frames: Annotated[int, Ge(2)] = 8

    @property
    def shared(self) -> int:
        return self.frames

    def budget(self, n: int, grid: tuple[int, int] | None) -> int:
        return max(super().budget(n, grid), -(-n // self.frames))  # never less than the first frame

    def choose(self, count: int, features: Tensor) -> Tensor:
        x = grouped(features.float(), self.frames)
        x = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-8)
        change = 1 - (x[:, 1:] * x[:, :-1]).sum(-1)
        return best(torch.cat([torch.full_like(change[:, :1], 255.0), change], 1).flatten(1), count)
