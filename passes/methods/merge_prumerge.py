"""LLaVA-PruMerge: keep what the CLS token attends to, let the neighbours of each kept token flow into it, sum up the rest in one token."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor

from ..select import Keep
from ..vision_plan import best, one_hot
from ..vision_select import Mode, VisionMerge
from ..vision_signals import cosine, evenly, rank


@dataclass(frozen=True)
class MergePruMerge(VisionMerge):
    """
    rewrite:
        a = softmax(q_cls k^T / sqrt(H D)) over all heads as one;  chosen = top(a) plus, for PruMerge+, evenly spaced others
        y_i = x_i + sum of a_j x_j over its `neighbours` nearest keys (cosine), for every chosen i;  y_last = sum of a_j x_j over all not
        chosen
        merge_tokens(patches, those weights)[images, keep] -> projector

    Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (ICCV 2025). The weights a_j are not normalised.
    Reads the last vision layer that the features come from; the published code reads the one behind it, which a captured tower does not have.
    fixed: `keep` tokens with the summary, `uniform` of them evenly spaced (PruMerge+), in reading order. How many tokens are outliers varies per
    picture, and a compiled prompt does not: the count is the budget.
    parity: the published count (attention above Q3 + 1.5 IQR, pooled over the batch) and order (by attention, then the grid of PruMerge+ if uniform >
    0, then the summary); rows up to `keep` are zeros.
    """

    name: ClassVar[str] = "merge-prumerge"
    paper: ClassVar[str] = "arXiv:2403.15388"

    keep: Keep = 0.056
    uniform: Annotated[float, Field(ge=0, lt=1)] = 0.0
    neighbours: Annotated[int, Ge(1)] = 32
    mode: Mode = "fixed"

    def weights(self, count: int, cls_joint: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        n = cls_joint.shape[1]
        kept, last = self.published(cls_joint, count) if self.mode == "parity" else (self.chosen(cls_joint, count - 1), None)
        rows = one_hot(kept, n)
        like = cosine(torch.ops.foveate.keep_tokens(keys, kept.clamp(min=0)), keys).masked_fill(rows > 0, float("-inf"))
        near = torch.zeros_like(like).scatter(-1, like.topk(min(self.neighbours, n - 1), dim=-1).indices, 1.0)
        merged = (rows + near * cls_joint[:, None]) * (kept >= 0)[..., None]
        rest = ((1 - rows.sum(1)) * cls_joint)[:, None]
        if last is None:
            return torch.cat([merged, rest], 1), torch.nn.functional.pad(kept, (0, 1), value=-1)
        at_end = (torch.arange(count, device=kept.device)[None] == last).float()[..., None]
        return torch.nn.functional.pad(merged, (0, 0, 0, 1)) + at_end * rest, torch.nn.functional.pad(kept, (0, 1), value=-1)

    def chosen(self, a: Tensor, size: int) -> Tensor:
        top = one_hot(best(a, size - round(self.uniform * size)), a.shape[1]).sum(1) > 0
        return torch.ops.foveate.compact_tokens(top | evenly(round(self.uniform * size), ~top), size)

    def published(self, a: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """-> kept[I, count - 1] by attention, -1 behind the last; the number of kept tokens[I, 1]. Arithmetic in float64, as Python's."""
        n = a.shape[1]
        low, high = (a.flatten().quantile(share) for share in (0.25, 0.75))
        ratio = (a > high + 1.5 * (high - low)).sum().double() / a.numel()
        place, size = rank(a), (n * ratio).floor()
        key = torch.where(place < size, place, 3 * n)
        if self.uniform:
            step = torch.div((1 / ratio).floor(), 3, rounding_mode="floor").clamp(min=1)
            at = torch.arange(n, device=a.device)[None]
            key = torch.where((key == 3 * n) & (at % step == 0) & (at < n - 1), n + at, key)
        ordered = key.sort(1)
        kept = torch.where(ordered.values < 3 * n, ordered.indices, -1)[:, : count - 1]
        return kept, (key < 3 * n).sum(1, keepdim=True).clamp(max=count - 1)
