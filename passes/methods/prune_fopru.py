"""FoPru: the patches, or whole rows of patches, that receive most attention from all others."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..select import Keep
from ..vision_plan import best
from ..vision_select import VisionSelect


@dataclass(frozen=True)
class PruneFoPru(VisionSelect):
    """
    rewrite:
        c[images, n] = mean_h attention_columns(q, k)            (last vision layer, mean over all queries)
        by token: i = compact(top(c, keep));  by row: all tokens of the floor(keep / columns) rows with the largest sum
        keep_tokens(patches, i) -> projector

    Jiang et al., "FoPru: Focal Pruning for Efficient Large Vision-Language Models" (2024). Needs no CLS token. No official code was found: the layer
    (the last one that the features come from) and the ratios are ours. The paper also averages over keys instead of queries; a softmax row sums to
    one, so that mean says nothing and is left out. By row, `keep` has to leave at least one row and whole rows: it is rounded down to them.
    One mode: no code is published.
    """

    name: ClassVar[str] = "prune-fopru"
    paper: ClassVar[str] = "arXiv:2411.14164"

    keep: Keep = 0.25
    by: Literal["token", "row"] = "token"

    def reads(self) -> list[str]:
        return ["received", "grid"] if self.by == "row" else ["received"]

    def budget(self, n: int, grid: tuple[int, int] | None) -> int:
        count = super().budget(n, grid)
        if self.by == "token" or grid is None:
            return count
        if count < grid[1]:
            raise self.fail(f"keep={self.keep} is less than one row of {grid[1]} tokens")
        return count - count % grid[1]

    def choose(self, count: int, received: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        score = received.mean(1)
        if grid is None:
            return best(score, count)
        rows = best(score.unflatten(1, grid).sum(-1), count // grid[1])
        return (rows[..., None] * grid[1] + torch.arange(grid[1], device=rows.device)).flatten(1)
