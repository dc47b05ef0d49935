"""GlobalCom2: the thumbnail decides how many tokens of each crop stay, and has a say in which."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from ..select import Keep
from ..vision_signals import Signals, bilinear, rank
from ..vision_views import Views, VisionViews


@dataclass(frozen=True)
class PruneGlobalCom2(VisionViews):
    """
    rewrite:
        b = mean_h logits of CLS on the thumbnail;  p = softmax over crops of (sum of b in the crop's rectangle / temperature)
        the thumbnail keeps its top floor(keep);  crop c keeps floor(n_c min(1, keep/n (1 + p_c - 1/C))) by b_c/|b_c| + g_c/|g_c|,
        g_c = the thumbnail's b, resized to all crops (bilinear), cut to crop c;  keep_tokens(projected tokens, i)

    Liu et al., "Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration" (AAAI 2026); 25%, temperature 10. See
    VisionViews for rows and columns; newline tokens stay and count. A padded crop: g is resized to all crops, not to the unpadded part.
    fixed: tokens that flooring leaves go to the best-scored ones anywhere. parity: they are lost (rows of zeros), the thumbnail's come by falling b.
    """

    name: ClassVar[str] = "prune-globalcom2"
    paper: ClassVar[str] = "arXiv:2501.05179"
    after_projector: ClassVar[bool] = True
    newlines: ClassVar[bool] = True

    keep: Keep = 0.25
    rows: Annotated[int, Ge(1)] = 2
    columns: Annotated[int, Ge(1)] = 2
    temperature: Annotated[float, Field(gt=0)] = 10.0

    def reads(self) -> list[str]:
        return ["cls_logits", "grid"]

    def shares(self, count: int, signals: Signals, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        score, here = self.group(signals.cls_logits.mean(1), signals), views.present[:, 1:]  # [G, views, n]
        base, n = score[:, 0], score.shape[2]
        combined = torch.cat([base[:, None], normalize(score[:, 1:] * here, dim=-1) + normalize(self.guide(base, views.grid) * here, dim=-1)], 1)
        first = views.tokens * n // views.whole
        scale = (first / n * (1 + self.weight(base, views.grid) - 1 / (self.shared - 1))).clamp(max=1)
        quota = torch.cat([torch.full_like(scale[:, :1], first), (here.sum(2) * scale).floor()], 1)
        return combined, quota, -rank(combined).float()

    def published(self, place: Tensor, at: Tensor, n: int) -> Tensor:
        return torch.where(at < n, place, at)

    def weight(self, base: Tensor, grid: tuple[int, int]) -> Tensor:
        """base[G, n] -> p[G, crops]; cells that do not divide the grid go to the last crop"""
        place = torch.arange(base.shape[1], device=base.device)
        row = (place // grid[1] // max(grid[0] // self.rows, 1)).clamp(max=self.rows - 1)
        column = (place % grid[1] // max(grid[1] // self.columns, 1)).clamp(max=self.columns - 1)
        owner = (row * self.columns + column)[:, None] == torch.arange(self.rows * self.columns, device=base.device)
        return ((base.double() @ owner.double()) / self.temperature).softmax(1)

    def guide(self, base: Tensor, grid: tuple[int, int]) -> Tensor:
        """base[G, n] -> g[G, crops, n]"""
        rows, columns = (bilinear(size, size * times, base.device) for size, times in zip(grid, (self.rows, self.columns), strict=True))
        wide = rows @ base.float().unflatten(1, grid) @ columns.T
        return wide.unflatten(1, (self.rows, grid[0])).unflatten(3, (self.columns, grid[1])).permute(0, 1, 3, 2, 4).flatten(3, 4).flatten(1, 2)
