"""FasterVLM: keep the patches that the CLS token of the vision tower attends to most, before the language model sees any."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..select import Keep
from ..vision_select import VisionSelect


@dataclass(frozen=True)
class PruneVisionCls(VisionSelect):
    """
    rewrite:
        p[images, H, 1, 1 + n] = attention_rows(q, k, row 0)     (the last vision layer that the features come from)
        i = compact(top(mean_h p[1:], keep));  keep_tokens(patches, i) -> projector

    The CLS score of FasterVLM (Zhang et al. 2024, section 3.2), 144, 58 or 29 patches of 576; ties go to the earlier patch, kept patches stay in
    reading order. The published code projects all patches and masks afterwards, which gives the same tokens. Towers without a CLS token are refused.
    One mode: the same tokens as the published code.
    """

    name: ClassVar[str] = "prune-vision-cls"
    paper: ClassVar[str] = "arXiv:2412.01818"

    keep: Keep = 0.5

    def score(self, cls: Tensor) -> Tensor:
        return cls.mean(1)
