"""Uniform pruning: evenly spaced patches, the control for spatial coverage at the vision side."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..select import Keep
from ..vision_plan import best
from ..vision_select import VisionSelect
from ..vision_signals import evenly


@dataclass(frozen=True)
class PruneUniform(VisionSelect):
    """Keep evenly spaced patches; the same tokens in every picture.

    rewrite:
        by order: token r of n stays when floor((r + 1) keep / n) > floor(r keep / n), as in `drop-uniform`
        by grid:  the first `keep` in the order of a Bayer dither matrix over rows and columns: half is a checkerboard, a quarter every
        second row and column;  keep_tokens(patches, those) -> projector

    By order, shares that divide a row alias with it: a quarter of 12 x 12 is three whole columns. By grid is the harder control.
    """

    name: ClassVar[str] = "prune-uniform"

    keep: Keep = 0.25
    by: Literal["order", "grid"] = "order"

    def reads(self) -> list[str]:
        return ["features", "grid"] if self.by == "grid" else ["features"]

    def choose(self, count: int, features: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        if grid is None:
            return best(evenly(count, torch.ones_like(features[..., 0], dtype=torch.bool)).float(), count)
        order = torch.tensor(dither(*grid), device=features.device, dtype=torch.float32)
        return best(torch.zeros_like(features[..., 0], dtype=torch.float32) - order, count)


def dither(rows: int, columns: int) -> list[int]:
    """The Bayer matrix entry of every cell, reading order: the lowest few of them are always evenly spread."""
    bits = max(rows, columns).bit_length()
    return [sum((((x ^ y) >> b & 1) * 2 + (y >> b & 1)) << 2 * (bits - 1 - b) for b in range(bits)) for y in range(rows) for x in range(columns)]
