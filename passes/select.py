"""Select: score the visual tokens at a layer, keep the best, cut there."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from ..graph.errors import GraphError
from ..graph.program import Program
from ..graph.sites import Site, role, site
from ..graph.splice import splice
from .base import Pass
from .cut import cut, require_visual

F = torch.ops.foveate
Layer = Annotated[int, Ge(0)]
Keep = Annotated[int, Ge(1)] | Annotated[float, Field(gt=0, le=1)]
ATTENTION_TAPS = ("q", "k", "v", "mask", "scale", "causal", "softcap")
SHARE = 1000  # shares are whole thousandths, so that a symbolic budget is integer arithmetic


def last_valid(valid: Tensor) -> Tensor:
    """valid[B, T] bool  ->  [B, 1]: the position of the last valid token"""
    return torch.where(valid, torch.arange(valid.shape[1], device=valid.device)[None], 0).amax(1, keepdim=True)


@dataclass(frozen=True)
class Select(Pass):
    """Keep the best visual tokens of every sample from the entry of `layer` on; text stays, order and positions stay, KV is entry(layer).

    rewrite:
        h[B, T, D], masks, cos, sin, ...  ->  i = compact(text or top(score, keep))[B, T - n + keep], and each of them gathered by i

    keep: visual tokens per sample (int), or a share of the sample's visual tokens in (0, 1], to a thousandth, rounded up.
    The last token of the prompt is never dropped, even if it is visual: it predicts the answer.
    A method overrides `score`; the names of its arguments say what it taps (see `taps`). A sample with fewer visual tokens keeps them all.
    """

    layer: Layer
    keep: Keep

    @abstractmethod
    def score(self, **taps: Any) -> Tensor:
        """-> [B, T], larger is better; read at valid visual tokens only."""

    def run(self, program: Program) -> bool:
        where = self.site(program)
        if isinstance(self.keep, float) and self.keep == 1.0:
            return False
        self._check_keep(program)
        cut(program, where, *self.choose(program, where))
        if isinstance(self.keep, int):
            require_visual(program, self.keep)
        return True

    def site(self, program: Program) -> Site:
        try:
            return site(program, self.layer)
        except GraphError as cause:
            raise self.fail(str(cause)) from cause

    def choose(self, program: Program, where: Site) -> tuple[Node, Any, Any]:
        """Insert score and selection before the site; -> keep[B, T] bool, the new length, the bound on kept visual tokens."""
        stage = program["prefill"]
        taps = self._named_taps(program, where)
        inputs = [role(program, "visual", where.first), role(program, "valid", where.first), where.hidden,
                  stage.placeholder("input_ids"), stage.placeholder(program.facts.features[0])]

        def select(visual: Tensor, valid: Tensor, hidden: Tensor, ids: Tensor, features: Tensor, *values: Any) -> tuple[Any, ...]:
            text = ids.shape[1] - features.shape[1]
            count = self.count(hidden.shape[1] - text)
            score = self.score(**dict(zip(taps, values, strict=True))).float()
            present = visual & valid
            score = torch.where(torch.arange(valid.shape[1], device=valid.device)[None] == last_valid(valid), float("inf"), score)
            budget = None if isinstance(self.keep, int) else self.count(present.sum(1))
            best = F.top_tokens(torch.where(present, score, float("-inf")), count, budget)
            return valid & (~visual | best), text + count, count

        return splice(stage, where.first, select, *inputs, *taps.values())

    def count(self, visual: Any) -> Any:
        """How many of `visual` (int or SymInt) tokens stay."""
        return self.keep if isinstance(self.keep, int) else (visual * round(self.keep * SHARE) + SHARE - 1) // SHARE

    def _named_taps(self, program: Program, where: Site) -> dict[str, Any]:
        names, found = list(inspect.signature(self.score).parameters), self.taps(program, where)
        if unknown := [n for n in names if n not in found]:
            if set(unknown) <= set(ATTENTION_TAPS):
                raise self.fail(f"reads the attention before layer {where.layer}, and there is none; the first layer it can cut at is {where.layer + 1}")
            raise self.fail(f"score asks for {unknown}; layer {where.layer} has the taps {sorted(found)}")
        return {n: found[n] for n in names}

    def taps(self, program: Program, where: Site) -> dict[str, Any]:
        """What a score may ask for: hidden[B, T, D], visual, valid [B, T], visual_index[B, T], and of the last attention before the site
        q[B, H, T, D], k, v [B, G, T, D], mask, scale, causal, softcap."""
        found: dict[str, Any] = {"hidden": where.hidden}
        found |= {name: role(program, name, where.first) for name in ("visual", "valid", "visual_index")}
        attention = None
        for node in program["prefill"].graph.nodes:
            if node is where.first:
                break
            if node.target is F.attention.default:
                attention = node
        if attention is not None:
            q, k, v, mask, _, _, scale, causal, _, softcap, _ = attention.args
            found |= dict(zip(ATTENTION_TAPS, (q, k, v, mask, scale, causal, softcap), strict=True))
        return found

    def _check_keep(self, program: Program) -> None:
        known = program.facts.visual_per_image
        if known is not None and isinstance(self.keep, int) and self.keep > known:
            raise self.fail(f"keep={self.keep} is more than the {known} visual tokens of an image")
