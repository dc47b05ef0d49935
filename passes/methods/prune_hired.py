"""HiRED: the thumbnail says which views of a picture deserve tokens, the CLS token says which tokens."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor

from ..select import Keep
from ..vision_plan import Plan, best, grouped
from ..vision_select import Mode, VisionSelect
from ..vision_signals import Signals, rank


@dataclass(frozen=True)
class PruneHiRED(VisionSelect):
    """
    rewrite:
        one view (rows = columns = 0):  i = compact(top(sum_h attention of CLS, keep))
        thumbnail + rows x columns crops, consecutive images of the stage: the thumbnail gets `alpha` of the budget, each crop a part of
        the rest by
        how many of the thumbnail's most attended tokens (first vision layer) lie in it;  i = top by CLS attention (last layer) per view
        keep_tokens(patches, i) -> projector

    Arif et al., "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language Models" (AAAI 2025);
    20%, alpha 0.5.
    fixed: a crop's part of the thumbnail is its rectangle, and what flooring or a full view leaves goes to the most attended tokens
    anywhere.
    parity: the published reshape takes stretches of the raster for crops, and leftovers are lost (rows of zeros at the end).
    Families that assemble padded crops and newline tokens inside their vision stage do not bring one feature per patch and are refused.
    """

    name: ClassVar[str] = "prune-hired"
    paper: ClassVar[str] = "arXiv:2408.10945"

    keep: Keep = 0.2
    rows: Annotated[int, Ge(0)] = 0
    columns: Annotated[int, Ge(0)] = 0
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.5
    mode: Mode = "fixed"

    @property
    def shared(self) -> int:
        return 1 + self.rows * self.columns

    def reads(self) -> list[str]:
        return ["cls", "cls_first", "grid"] if self.shared > 1 else ["cls"]

    def plan(self, count: int, signals: Signals) -> Plan:
        score = grouped(signals.cls.sum(1), self.shared)  # [G, views, n]
        if self.shared == 1:
            return Plan(best(score.flatten(1), count))
        n, whole = score.shape[2], min(int(count * self.alpha), score.shape[2])
        salient = rank(grouped(signals.cls_first.sum(1), self.shared)[:, 0]) < int(n * (1 - self.alpha))
        inside = (salient.float() @ self.crops(signals.grid, n).to(salient.device))  # [G, crops]
        part = inside / inside.sum(1, keepdim=True) * min(count - whole, (self.shared - 1) * n)
        quota = torch.cat([torch.full_like(part[:, :1], whole), part.floor().clamp(max=n)], 1)
        within = (rank(score) < quota[..., None]).flatten(1)
        if self.mode == "fixed":
            return Plan(best(torch.where(within, 2.0 * score.amax() + score.flatten(1), score.flatten(1)), count))
        kept = torch.ops.foveate.compact_tokens(within, count)
        held = torch.arange(count, device=kept.device)[None] < within.sum(1, keepdim=True)
        return Plan(torch.where(held, kept, -1), holes=True)

    def crops(self, grid: tuple[int, int] | None, n: int) -> Tensor:
        """[n, crops]: which crop a token of the thumbnail lies in"""
        place = torch.arange(n)
        if self.mode == "parity" or grid is None:
            owner = place * self.rows * self.columns // n
        else:
            owner = (place // grid[1]) * self.rows // grid[0] * self.columns + (place % grid[1]) * self.columns // grid[1]
        return (owner[:, None] == torch.arange(self.rows * self.columns)).float()
