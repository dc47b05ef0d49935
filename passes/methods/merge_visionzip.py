"""VisionZip: dominant tokens stay, the rest is gathered into a few contextual ones."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..select import Keep
from ..vision_plan import best, one_hot
from ..vision_select import Mode, VisionMerge
from ..vision_signals import cosine


@dataclass(frozen=True)
class MergeVisionZip(VisionMerge):
    """
    rewrite:
        dominant = compact(top(sum_h attention of CLS (or received), keep - c)),  c = contextual keep
        of the others, every s-th is a target (s = n_rest // c), and the rest goes to the target with the most similar key (mean over heads)
        merge_tokens(patches, [one row per dominant token; one row per target]) -> projector

    Yang et al., "VisionZip: Longer is Better but Not Necessary in Vision Language Models" (CVPR 2025). 64 = 54 + 10, 128 = 108 + 20, 192 = 162 + 30.
    fixed: a contextual token is the mean of its target and what was assigned to it; patches only.
    parity: it is the target plus the mean of the assigned ones (about twice the norm), and the CLS token is the first dominant token.
    """

    name: ClassVar[str] = "merge-visionzip"
    paper: ClassVar[str] = "arXiv:2412.04467"

    keep: Keep = 0.112
    contextual: Annotated[float, Field(gt=0, lt=1)] = 0.156
    mode: Mode = "fixed"

    def reads(self) -> list[str]:
        return ["attended", "key_mean", *(["cls_feature"] if self.mode == "parity" else [])]

    def weights(self, count: int, attended: Tensor, key_mean: Tensor, cls_feature: Tensor | None = None) -> tuple[Tensor, Tensor]:
        n, extra = attended.shape[-1], int(self.mode == "parity")
        groups = max(1, round(count * self.contextual))
        dominant = best(attended.sum(1), count - groups - extra)
        rest = torch.ops.foveate.compact_tokens(one_hot(dominant, n).sum(1) == 0, n - dominant.shape[1])
        step = max(1, rest.shape[1] // groups)
        target = rest[:, : step * groups : step]
        of_rest, of_target = (torch.ops.foveate.keep_tokens(key_mean, i) for i in (rest, target))
        to = one_hot(cosine(of_rest, of_target).argmax(-1), groups)
        free = ~(rest[..., None] == target[:, None]).any(-1)
        assigned = to.transpose(1, 2) * free[:, None]  # [I, groups, rest]
        size = assigned.sum(-1, keepdim=True)
        spread = assigned @ one_hot(rest, n)
        row = one_hot(target, n) + spread / size.clamp(min=1) if extra else (one_hot(target, n) + spread) / (1 + size)
        weight, kept = torch.cat([one_hot(dominant, n), row], 1), torch.cat([dominant, target], 1)
        if extra:
            weight = torch.nn.functional.pad(weight, (1, 0, 1, 0))
            weight = weight + one_hot(torch.zeros_like(kept[:, :1]), n + 1) * (torch.arange(count, device=kept.device) == 0)[None, :, None]
            kept = torch.nn.functional.pad(kept, (1, 0), value=-1)
        return weight, kept
