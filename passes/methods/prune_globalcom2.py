"""GlobalCom2: the thumbnail decides how many tokens of each crop stay, and has a say in which."""

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
class PruneGlobalCom2(VisionSelect):
    """
    rewrite:
        b = mean_h logits of CLS on the thumbnail;  p = softmax over crops of (sum of b in the crop's rectangle / temperature)
        the thumbnail keeps its top floor(keep);  crop c keeps floor(n min(1, keep/n (1 + p_c - 1/C))) by b_c/|b_c| + g_c/|g_c|,
        g_c = the thumbnail's b, resized to all crops (bilinear), cut to crop c;  keep_tokens(projected tokens, i)

    Liu et al., "Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration" (AAAI 2026); 25%, temperature
    10.
    The stage's images are, in turn, a thumbnail and its rows x columns crops, all of the same size without padding.
    fixed: tokens that flooring leaves go to the best-scored ones anywhere. parity: they are lost (rows of zeros), the thumbnail's come by
    falling b.
    """

    name: ClassVar[str] = "prune-globalcom2"
    paper: ClassVar[str] = "arXiv:2501.05179"
    after_projector: ClassVar[bool] = True

    keep: Keep = 0.25
    rows: Annotated[int, Ge(1)] = 2
    columns: Annotated[int, Ge(1)] = 2
    temperature: Annotated[float, Field(gt=0)] = 10.0
    mode: Mode = "fixed"

    @property
    def shared(self) -> int:
        return 1 + self.rows * self.columns

    def reads(self) -> list[str]:
        return ["cls_logits", "grid"]

    def plan(self, count: int, signals: Signals) -> Plan:
        score = grouped(signals.cls_logits.mean(1), self.shared)  # [G, views, n]
        n, base = score.shape[2], score[:, 0]
        combined = torch.cat([base[:, None], _unit(score[:, 1:]) + _unit(self.guide(base, signals.grid))], 1)
        share = count // self.shared / n
        scale = (share * (1 + self.weight(base, signals.grid) - 1 / (self.shared - 1))).clamp(max=1)
        quota = torch.cat([torch.full_like(scale[:, :1], count // self.shared), (n * scale).floor()], 1)
        place = rank(combined)
        within = (place < quota[..., None]).flatten(1)
        if self.mode == "fixed":
            return Plan(best(torch.where(within, 2.0 * n, 0.0) - place.flatten(1), count))
        at = torch.arange(self.shared * n, device=score.device)[None]
        key = torch.where(within, torch.where(at < n, place.flatten(1), at), 2 * self.shared * n)
        order = key.sort(1)
        return Plan(torch.where(order.values < 2 * self.shared * n, order.indices, -1)[:, :count], holes=True)

    def weight(self, base: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """base[G, n] -> p[G, crops]; cells that do not divide the grid go to the last crop"""
        assert grid is not None
        place = torch.arange(base.shape[1], device=base.device)
        row = (place // grid[1] // max(grid[0] // self.rows, 1)).clamp(max=self.rows - 1)
        column = (place % grid[1] // max(grid[1] // self.columns, 1)).clamp(max=self.columns - 1)
        owner = (row * self.columns + column)[:, None] == torch.arange(self.rows * self.columns, device=base.device)
        return ((base.double() @ owner.double()) / self.temperature).softmax(1)

    def guide(self, base: Tensor, grid: tuple[int, int] | None) -> Tensor:
        """base[G, n] -> g[G, crops, n]"""
        assert grid is not None
        rows, columns = (_bilinear(size, size * times, base.device) for size, times in zip(grid, (self.rows, self.columns), strict=True))
        wide = rows @ base.float().unflatten(1, grid) @ columns.T
        return wide.unflatten(1, (self.rows, grid[0])).unflatten(3, (self.columns, grid[1])).permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


def _bilinear(size: int, wanted: int, device: torch.device) -> Tensor:
    """[wanted, size]: the weights of a resize along one axis, corners not aligned (a constant; a resize operator is another thing on each
    backend)"""
    weight = [[0.0] * size for _ in range(wanted)]
    for i in range(wanted):
        at = max((i + 0.5) * size / wanted - 0.5, 0.0)
        low = int(at)
        weight[i][low] += 1 - (at - low)
        weight[i][min(low + 1, size - 1)] += at - low
    return torch.tensor(weight, device=device)
