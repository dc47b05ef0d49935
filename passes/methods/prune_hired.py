"""HiRED: the thumbnail says which views of a picture deserve tokens, the CLS token says which tokens."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..select import Keep
from ..vision_plan import Plan, best
from ..vision_signals import Signals, rank
from ..vision_views import Views, VisionViews


@dataclass(frozen=True)
class PruneHiRED(VisionViews):
    """
    rewrite:
        one view:  i = compact(top(sum_h attention of CLS, keep))
        thumbnail + crops: the thumbnail gets `alpha` of the budget, each crop a part of the rest by how many of the thumbnail's most
        attended tokens (first vision layer) lie in it;  i = top by CLS attention (last layer) per view;  keep_tokens(patches, i)

    Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models" (AAAI 2025); 20%, alpha
    0.5. See VisionViews for rows and columns; newline tokens go, as published.
    fixed: a crop's part of the thumbnail is its rectangle, and what flooring or a full view leaves goes to the most attended tokens anywhere.
    parity: the published reshape takes stretches of the raster for crops, and leftovers are lost (rows of zeros at the end).
    """

    name: ClassVar[str] = "prune-hired"
    paper: ClassVar[str] = "arXiv:2408.10945"

    keep: Keep = 0.2
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def reads(self) -> list[str]:
        return ["cls", "cls_first", "grid"] if self.shared > 1 else ["cls"]

    def plan(self, count: int, signals: Signals) -> Plan:
        return super().plan(count, signals) if self.shared > 1 or signals.layout is not None else Plan(best(signals.cls.sum(1), count))

    def shares(self, count: int, signals: Signals, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        score, n = self.group(signals.cls.sum(1), signals), views.present.shape[2]  # [G, views, n]
        whole = min(int(count * self.alpha), n) if self.shared > 1 else count
        salient = rank(self.group(signals.cls_first.sum(1), signals)[:, 0]) < int(n * (1 - self.alpha))
        inside = salient.float() @ self.crops(views.grid, n).to(score.device)  # [G, crops]
        part = inside / inside.sum(1, keepdim=True) * min(count - whole, (self.shared - 1) * n)
        return score, torch.cat([torch.full_like(score[:, :1, 0], whole), part.floor().clamp(max=n)], 1), score

    def crops(self, grid: tuple[int, int], n: int) -> Tensor:
        """[n, crops]: which crop a token of the thumbnail lies in"""
        place = torch.arange(n)
        owner = (place // grid[1]) * self.rows // grid[0] * self.columns + (place % grid[1]) * self.columns // grid[1]
        if self.mode == "parity":
            owner = place * self.rows * self.columns // n
        return (owner[:, None] == torch.arange(self.rows * self.columns)).float()
