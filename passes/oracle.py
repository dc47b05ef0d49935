"""The mask-only oracle: the same selection with nothing gathered, dropped columns masked. What a cut must equal, by another route."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.program import Program, Stage
from ..graph.retype import reroute, retype
from ..graph.sites import role
from ..graph.splice import splice
from .base import PassError
from .bypass import Bypass
from .reduce import Reduce

ATTENTION = torch.ops.foveate.attention.default


def mask_only(program: Program, selections: list[Reduce]) -> Program:
    """A clone in which each selection only hides its dropped tokens from every attention at and behind its layers.

    Scores of a later stage see the tokens that earlier ones left, and merged tokens are in the stream as in the cut. Positions and sequence
    length stay, so logits of the last token must equal those of the cut, and the K/V rows of kept tokens too. Layers that mix neighbours
    without attention (short convolutions) have no such oracle. Behind a bypassed layer, tokens that did not take part get back what they
    went in with.
    """
    hidden = program.clone()
    for selection in selections:
        for layer, keep in selection.schedule():
            if not selection.idle(keep):
                _hide(hidden, selection, layer, keep)
    return hidden


def _hide(program: Program, selection: Reduce, layer: int, keep: float) -> None:
    stage, where = program["prefill"], selection.site(program, layer)
    choice = selection.choose(program, where, keep)
    where = selection.rewritten(program, where, choice)
    behind = selection.site(program, layer + 1) if isinstance(selection, Bypass) else None
    _mask(stage, where.first, behind.first if behind else None, choice.keep)
    if behind is None:
        _leave(program, where.first, choice.keep)
    else:
        joined = splice(stage, behind.first, lambda x, y, k: torch.where(k[..., None], y, x), where.hidden, behind.hidden, choice.keep)
        for crossing in behind.crossings:
            for reader in crossing.readers if crossing.node is behind.hidden else ():
                reroute(reader, behind.hidden, joined)
    retype(stage)
    stage.module.recompile()


def _leave(program: Program, first: Node, keep: Node) -> None:
    """What is dropped is neither visual nor valid for the methods behind."""
    stage = program["prefill"]
    visual = role(program, "visual", first)
    still = splice(stage, first, lambda a, b: a & b, visual, keep)
    valid = splice(stage, first, lambda a, b: a & b, role(program, "valid", first), keep)
    still.meta["role"], valid.meta["role"] = "visual", "valid"


def _mask(stage: Stage, first: Node, end: Node | None, keep: Node) -> None:
    masks: dict[Node, Node] = {}
    behind = False
    for node in list(stage.graph.nodes):
        behind = (behind or node is first) and node is not end
        if behind and node.target is ATTENTION:
            mask = node.args[3]
            if not isinstance(mask, Node):
                raise PassError(f"oracle: {node.name} has no mask to hide tokens with")
            if mask not in masks:
                masks[mask] = splice(stage, node, _and_keys, mask, keep)
            reroute(node, mask, masks[mask])


def _and_keys(mask: Tensor, keep: Tensor) -> Tensor:
    seen = keep if mask.dim() == 2 else keep[:, None, None, :]
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, torch.finfo(mask.dtype).min)
