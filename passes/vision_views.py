"""AnyRes: the thumbnail and the crops of a picture share one budget; every view gets a quota and spends it on its best tokens."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from ..graph.program import Program
from .vision_place import Place
from .vision_plan import Plan, grouped
from .vision_select import Mode, VisionReduce, VisionSelect
from .vision_signals import Signals, rank

F = torch.ops.foveate


@dataclass(frozen=True)
class Views:
    """present[G, V, n] bool: tokens that there are (crops may be padded); grid of a view; tokens: how many of the budget are for tokens, of all
    that there are."""

    present: Tensor
    grid: tuple[int, int]
    tokens: int
    whole: int


@dataclass(frozen=True)
class VisionViews(VisionSelect):
    """
    rewrite:
        score, quota, spare = shares(views);  i = those with rank(score) < quota in their view, and, up to keep, the best by `spare` anywhere
        keep_tokens(tokens, i)

    rows, columns: of the crops. The stage's images are, in turn, a thumbnail and its crops, all whole (`keep` is their mean); or the family
    packs them into one picture (LLaVA-NeXT, LLaVA-OneVision): then rows and columns are found, `keep` is of all rows of the picture, what lies
    in the padding is nobody's, and newline tokens all stay or all go (`newlines`).
    """

    shapes: ClassVar[str] = "split"
    views: ClassVar[bool] = True
    newlines: ClassVar[bool] = False

    rows: Annotated[int, Ge(0)] = 0
    columns: Annotated[int, Ge(0)] = 0
    mode: Mode = "fixed"

    @abstractmethod
    def shares(self, count: int, signals: Signals, views: Views) -> tuple[Tensor, Tensor, Tensor]:
        """-> score[G, V, n], quota[G, V], spare[G, V, n]: who gets what is left over, best first"""

    @property
    def shared(self) -> int:
        return 1 + self.rows * self.columns

    def fitted(self, program: Program, place: Place) -> VisionReduce:
        if place.layout is None:
            return self
        model, found = program.facts.model_type, place.layout.mosaic() or (0, 0)
        if max(map(len, place.layout.sources())) > 1 or place.grid is None or place.grid[0] * place.grid[1] != len(place.layout.owner[0]):
            raise self.fail(f"needs a token per patch and square views; {model} has other ones")
        if self.rows * self.columns and (self.rows, self.columns) != found:
            raise self.fail(f"rows={self.rows} and columns={self.columns}, and {model} was captured with {found[0]} x {found[1]} crops")
        return replace(self, rows=found[0], columns=found[1])

    def plan(self, count: int, signals: Signals) -> Plan:
        layout = signals.layout
        views = self._views(count, signals)
        score, quota, spare = self.shares(count, signals, views)
        place = rank(torch.where(views.present, score, float("-inf")))
        within = ((place < quota[..., None]) & views.present).flatten(1)
        order = torch.where(within, within.shape[1], 0) - rank(spare.flatten(1))
        if layout is not None:
            order, within = self._on_rows(order, within, signals)
        if self.mode == "fixed":
            return Plan(F.compact_tokens(F.top_tokens(order.float(), count, None), count))
        at = torch.arange(within.shape[1], device=score.device)[None]
        key = torch.where(within, at if layout is not None else self.published(place.flatten(1), at, score.shape[2]), 2 * within.shape[1])
        picked = key.sort(1)
        return Plan(torch.where(picked.values < 2 * within.shape[1], picked.indices, -1)[:, :count], holes=True)

    def published(self, place: Tensor, at: Tensor, n: int) -> Tensor:
        """The order in which the published code returns tokens that stay: as they lie, unless overridden."""
        return at

    def group(self, x: Tensor, signals: Signals) -> Tensor:
        """x[images, ...] -> [G, V, ...]"""
        return x[None] if signals.layout is not None else grouped(x, self.shared)

    def _views(self, count: int, signals: Signals) -> Views:
        assert signals.grid is not None  # find_place refuses a picture without one
        device, n = signals.features.device, signals.grid[0] * signals.grid[1]
        if signals.layout is None:
            return Views(torch.ones(1, self.shared, n, dtype=torch.bool, device=device), signals.grid, count, self.shared * n)
        there = [[row >= 0 for row in view] for view in signals.layout.owner]
        lines = sum(signals.layout.separators) if self.newlines else 0
        if count < lines:
            raise self.fail(f"keep={self.keep} is less than the {lines} newline tokens that it leaves in the picture")
        return Views(torch.tensor(there, device=device)[None], signals.grid, count - lines, sum(map(sum, there)))

    def _on_rows(self, order: Tensor, within: Tensor, signals: Signals) -> tuple[Tensor, Tensor]:
        """From tokens of all views to rows of the picture."""
        layout = signals.layout
        assert layout is not None
        lines = torch.tensor(layout.separators, device=order.device)
        ends = 2 * order.shape[1] if self.newlines else -2 * order.shape[1]
        return torch.where(lines, ends, layout.of_row(order)), torch.where(lines, self.newlines, layout.of_row(within))
