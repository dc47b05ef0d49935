"""VTC-CLS: the CLS token's attention, summed over many vision layers."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from ..select import Keep
from ..vision_select import VisionSelect


@dataclass(frozen=True)
class PruneVtcCls(VisionSelect):
    """
    rewrite:
        p_l[images, H, 1, 1 + n] = attention_rows(q_l, k_l, row 0)     for every vision layer l >= start
        i = compact(top(sum_l mean_h p_l[1:], keep));  keep_tokens(patches, i) -> projector

    Wang et al., "[CLS] Token Tells Everything Needed for Training-free Efficient MLLMs" (2024). 256, 128 or 64 patches of 576. Which layer to start
    from is an argument of the published scripts without a recommended value; 0 sums all layers that the features come from.
    One mode: the same tokens as the published code.
    """

    name: ClassVar[str] = "prune-vtc-cls"
    paper: ClassVar[str] = "arXiv:2412.05819"

    keep: Keep = 0.25
    start: Annotated[int, Ge(0)] = 0

    def score(self, cls_layers: Tensor) -> Tensor:
        if self.start >= cls_layers.shape[1]:
            raise self.fail(f"start={self.start}, and the features come from the vision layers 0..{cls_layers.shape[1] - 1}")
        return cls_layers[:, self.start :].mean(2).sum(1)
