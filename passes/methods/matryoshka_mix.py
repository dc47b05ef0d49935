"""Matryoshka mixing: learned constant weights turn the n tokens of an image into m, and the first of them alone are worth having."""

from dataclasses import dataclass
from math import isqrt
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from ..insert_vision import Initial, VisionInsertion
from ..vision_place import Place


@dataclass(frozen=True)
class MatryoshkaMix(VisionInsertion):
    """Token j of an image is a learned weighted sum of its projected tokens; the weights do not depend on the picture.

    rewrite:
        x[I, n, D] = projector(...)  =>  y[I, tokens, D],  y[i, j, channels of group g] = sum_t A[g, j, t] x[i, t, channels of g]

    Hu et al., "Matryoshka Query Transformer" (2024): after training, their resampler's attention is constant, an affine map; here that map is
    learned directly behind the model's own projector. A starts as averages over regions of the picture, from coarse to fine: the whole, its quarters,
    their quarters. `table`: the tokens are the first of so many rows (elastic: one training serves several numbers). `groups` of channels have
    weights of their own.
    """

    name: ClassVar[str] = "matryoshka-mix"
    paper: ClassVar[str] = "arXiv:2405.19315"
    elastic: ClassVar[str] = "tokens"
    after_projector: ClassVar[bool] = True

    tokens: Annotated[int, Ge(1)] = 36
    table: Annotated[int, Ge(0)] = 0
    groups: Annotated[int, Ge(1)] = 1

    def count(self, place: Place) -> int:
        if self.table and self.table < self.tokens:
            raise self.fail(f"tokens={self.tokens} is more than the table of {self.table}")
        if max(self.table, self.tokens) > place.n:
            raise self.fail(f"{max(self.table, self.tokens)} tokens are more than the {place.n} visual tokens of an image")
        return self.tokens

    def initial(self, place: Place, width: int) -> Initial:
        if width % self.groups:
            raise self.fail(f"groups={self.groups} do not divide the width {width}")
        rows, grid = self.table or self.tokens, self.grid(place)
        start = averages(grid, rows) if self.table else regions(grid, rows)
        return {"weight": lambda: start.repeat(self.groups, 1, 1)}

    def map(self, x: Tensor, place: Place, weight: Tensor) -> Tensor:
        parts = x.reshape(x.shape[0], x.shape[1], self.groups, -1).transpose(1, 2)  # [I, G, n, D / G]
        mixed = weight[:, : self.tokens].clone() @ parts
        return mixed.transpose(1, 2).flatten(2)


def regions(grid: tuple[int, int], count: int) -> Tensor:
    """[count, n]: averages over a count's near-square division of the picture"""
    down = max(d for d in range(1, isqrt(count) + 1) if count % d == 0)
    return _pooled(grid, down, count // down)


def averages(grid: tuple[int, int], count: int) -> Tensor:
    """[count, n]: averages over the picture, its quarters, their quarters, ..., as many as asked"""
    side, rows = 1, []
    while sum(len(r) for r in rows) < count:
        rows.append(_pooled(grid, side, side))
        side *= 2
    return torch.cat(rows)[:count]


def _pooled(grid: tuple[int, int], down: int, across: int) -> Tensor:
    rows, columns = grid
    y, x = torch.arange(rows), torch.arange(columns)
    found = []
    for i in range(down):
        for j in range(across):
            inside = _part(y, i, down, rows)[:, None] & _part(x, j, across, columns)[None]
            found.append(inside.flatten().float() / inside.sum())
    return torch.stack(found)


def _part(at: Tensor, index: int, parts: int, size: int) -> Tensor:
    """Which of `size` places belong to part `index`; with more parts than places, parts share them."""
    low = index * size // parts
    return (at >= low) & (at < max(low + 1, (index + 1) * size // parts))
