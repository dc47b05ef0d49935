"""Keep the patches that the CLS token of the vision tower attends to most, before the language model sees any."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...graph.program import Program
from ..select import Keep
from ..vision_select import VisionSelect


@dataclass(frozen=True)
class PruneVisionCls(VisionSelect):
    """
    rewrite:
        p[images, H, 1, 1 + n] = attention_rows(q, k, row 0)     (the last vision layer that the features come from)
        i = compact(top(mean_h p[1:], keep));  keep_tokens(patches, i) -> projector

    The CLS score of FasterVLM (Zhang et al. 2024, section 3.2) and of VTC-CLS; ties go to the earlier patch, kept patches stay in reading order.
    Towers without a CLS token are refused.
    """

    name: ClassVar[str] = "prune-vision-cls"
    paper: ClassVar[str] = "arXiv:2412.01818"

    keep: Keep = 0.5

    def run(self, program: Program) -> bool:
        if not program.facts.has_cls:
            raise self.fail(f"needs a vision tower with a CLS token; that of {program.facts.model_type} has none")
        return super().run(program)

    def score(self, q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        first = torch.zeros_like(q[:, 0, :1, 0], dtype=torch.int64)
        return torch.ops.foveate.attention_rows(q, k, mask, first, scale, False, 0.0)[:, :, 0, 1:].mean(1)
