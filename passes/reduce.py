"""Reduce: at the entry of one or more layers, score the visual tokens, decide how many stay and what becomes of the rest, cut there."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from ..graph.errors import GraphError
from ..graph.program import Program
from ..graph.retype import reroute
from ..graph.sites import Site, role, site
from ..graph.splice import splice
from . import taps
from .base import Pass
from .budget import rank_in_group
from .cut import cut, require_visual
from .taps import last_valid

F = torch.ops.foveate
Layer = Annotated[int, Ge(0)]
Keep = Annotated[int, Ge(1)] | Annotated[float, Field(gt=0, le=1)]
SHARE = 1000  # shares are whole thousandths, so that a symbolic budget is integer arithmetic


def share(keep: Any, visual: Any) -> Any:
    """How many of `visual` (int, SymInt or Tensor) tokens stay: `keep` of them, or that share, to a thousandth, rounded up."""
    return keep if isinstance(keep, int) else (visual * round(keep * SHARE) + SHARE - 1) // SHARE


@dataclass(frozen=True)
class Choice:
    """What a method decided at a site."""

    keep: Node  # [B, T] bool: the tokens that stay
    length: Any  # of the sequence behind the cut
    count: Any  # bound on the visual tokens that stay
    hidden: Node | None = None  # [B, T, D], what the stream becomes where dropped tokens were merged into kept ones


@dataclass(frozen=True)
class Reduce(Pass):
    """A method inside the language model: TAP -> BUDGET -> SELECT -> DISPOSE -> BOOK at every (layer, keep) of its schedule.

    TAP      `score` says what it reads by the names of its arguments (see taps.py)
    BUDGET   `keep`: tokens per sample, or a share of the visual tokens in the prompt; `limit`, where a method has one, lowers it per sample
    SELECT   the best by score, ties to the earlier token; the prompt's last token stays even if visual: it predicts the answer
    DISPOSE  dropped, or merged into kept ones where a method overrides `merge`
    BOOK     original positions, order kept, KV entry(layer)
    """

    place: ClassVar[str] = "llm"
    shapes: ClassVar[str] = "fixed"
    exact: ClassVar[bool] = True  # keeps exactly the budget; False: the budget is a bound and the data decide
    everything: ClassVar[dict[str, Any]] = {}  # parameters under which the data ask for every token, so that the budget alone decides
    per_image = False  # not a field; where a method has it as a parameter: every image of a sample gets an equal part of the budget
    of_prompt: ClassVar[bool] = False  # a share is of the visual tokens in the prompt, or (False) of those left at the site

    @property
    def compact(self) -> bool:
        """Kept tokens are numbered anew behind every cut, as some published code does."""
        return False

    @abstractmethod
    def schedule(self) -> tuple[tuple[int, Keep], ...]:
        """The cuts, by ascending layer."""

    @abstractmethod
    def score(self, **taps: Any) -> Tensor:
        """-> [B, T], larger is better; read at valid visual tokens only."""

    limit: ClassVar[Callable[..., Tensor] | None] = None  # a method's own: (self, **taps) -> [B], how many tokens the data ask for
    merge: ClassVar[Callable[..., tuple[Tensor, Tensor]] | None] = None  # (self, hidden, score, best, present, most) -> best, hidden

    def merged(self, dropped: Any) -> Any:
        """How many more tokens than the budget stay when `dropped` (int, SymInt or Tensor) visual tokens go through `merge`."""
        return 0

    def count(self, keep: Keep, visual: Any) -> Any:
        """The budget of a stage, of `visual` tokens in the prompt."""
        return share(keep, visual)

    def idle(self, keep: Keep) -> bool:
        """Can this stage change nothing, whatever the data?"""
        return isinstance(keep, float) and keep == 1.0

    def run(self, program: Program) -> bool:
        stages = [(layer, keep) for layer, keep in self.schedule() if not self.idle(keep)]
        for layer, keep in self.schedule():
            self.site(program, layer)
            self._check_keep(program, keep)
        for layer, keep in stages:
            where = self.site(program, layer)
            self.apply(program, where, self.choose(program, where, keep))
            if isinstance(keep, int):
                require_visual(program, keep)
        return bool(stages)

    def apply(self, program: Program, where: Site, choice: Choice) -> None:
        if self.compact and program.facts.positions.get("kind") == "mrope":
            raise self.fail(f"mode parity numbers positions anew, and those of {program.facts.model_type} have three axes")
        cut(program, self.rewritten(program, where, choice), choice.keep, choice.length, choice.count, self.compact)

    def rewritten(self, program: Program, where: Site, choice: Choice) -> Site:
        """Let the layers behind the site read the merged stream; returns the site as it is then."""
        if choice.hidden is None:
            return where
        for crossing in where.crossings:
            if crossing.node is where.hidden:
                for reader in crossing.readers:
                    reroute(reader, where.hidden, choice.hidden)
        return self.site(program, where.layer)

    def site(self, program: Program, layer: int) -> Site:
        try:
            return site(program, layer)
        except GraphError as cause:
            raise self.fail(str(cause)) from cause

    def choose(self, program: Program, where: Site, keep: Keep) -> Choice:
        """Insert score and selection before the site."""
        stage, merging = program["prefill"], self.merge is not None
        counted = self.of_prompt and not isinstance(keep, int)
        found = self._taps(program, where, ["original"] if counted else [])
        names = list(found)
        roles = [role(program, name, where.first) for name in ("visual", "valid")]
        inputs = [*roles, where.hidden, stage.placeholder("input_ids"), stage.placeholder(program.facts.features[0])]

        def select(visual: Tensor, valid: Tensor, hidden: Tensor, ids: Tensor, features: Tensor, *values: Any) -> tuple[Any, ...]:
            text = ids.shape[1] - features.shape[1]
            here = hidden.shape[1] - text  # bound on the visual tokens at the site
            read, present = dict(zip(names, values, strict=True)), visual & valid
            bound, budget = self.count(keep, features.shape[1] if counted else here), None
            if not isinstance(keep, int) or self.limit or merging or "budget" in self._asked():
                left = present.sum(1)
                whole = read["original"] if counted else left
                budget = read["budget"] = left.clamp(max=bound) if isinstance(keep, int) else self.count(keep, whole)
            best, merged = self.decide(read, visual, valid, hidden, bound, budget, here - bound)
            bound = bound + self.merged(here - bound)
            return valid & (~visual | best), text + bound, bound, *([merged] if merging else [])

        return Choice(*splice(stage, where.first, select, *inputs, *found.values()))

    def decide(self, read: dict[str, Any], visual: Tensor, valid: Tensor, hidden: Tensor, bound: Any, budget: Tensor | None,
               most: Any) -> tuple[Tensor, Tensor]:
        """From taps `read` to which visual tokens stay, [B, T], and the stream after merging; `most` bounds how many go through `merge`."""
        score = self.score(**{n: read[n] for n in _names(self.score)}).float()
        if self.per_image:
            score = -rank_in_group(score, read["image"], visual & valid).float()
        if self.limit:
            budget = torch.minimum(budget, self.limit(**{n: read[n] for n in _names(self.limit)}))
        at = torch.arange(valid.shape[1], device=valid.device)[None]
        score = torch.where(at == last_valid(valid), float("inf"), score)
        best = F.top_tokens(torch.where(visual & valid, score, float("-inf")), bound, budget)
        return self.merge(hidden, score, best & visual & valid, visual & valid, most) if self.merge else (best, hidden)

    def _asked(self) -> list[str]:
        return [*_names(self.score), *(_names(self.limit) if self.limit else []), *(["image"] if self.per_image else [])]

    def _taps(self, program: Program, where: Site, more: list[str]) -> dict[str, Any]:
        names = list(dict.fromkeys(n for n in [*self._asked(), *more] if n != "budget"))
        found = taps.collect(program, where, names)
        if unknown := [n for n in names if n not in found]:
            if set(unknown) <= set(taps.ATTENTION):
                raise self.fail(f"reads the attention before layer {where.layer}, and there is none; "
                                f"the first layer it can cut at is {where.layer + 1}")
            if unknown == ["image"]:
                raise self.fail(f"needs to know which image a token is of, and images of {program.facts.model_type} bring no fixed number of tokens")
            raise self.fail(f"score asks for {unknown}; layer {where.layer} has the taps {sorted(found)}")
        return {n: found[n] for n in names}

    def _check_keep(self, program: Program, keep: Keep) -> None:
        known = program.facts.visual_per_image
        if known is not None and isinstance(keep, int) and keep > known:
            raise self.fail(f"keep={keep} is more than the {known} visual tokens of an image")


def _names(method: Any) -> list[str]:
    return list(inspect.signature(method).parameters)
