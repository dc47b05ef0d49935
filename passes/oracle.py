"""The mask-only oracle: the same selection with nothing gathered, dropped columns masked. What a cut must equal, by another route."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.program import Program
from ..graph.retype import reroute, retype
from ..graph.sites import role
from ..graph.splice import splice
from .base import PassError
from .reduce import Reduce

ATTENTION = torch.ops.foveate.attention.default


def mask_only(program: Program, selections: list[Reduce]) -> Program:
    """A clone in which each selection only hides its dropped tokens from every attention at and behind its layers.

    Scores of a later stage see the tokens that earlier ones left, and merged tokens are in the stream as in the cut. Positions and sequence length
    stay, so logits of the last token must equal those of the cut, and the K/V rows of kept tokens too. Layers that mix neighbours without attention
    (short convolutions) have no such oracle.
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
    visual = role(program, "visual", where.first)
    still = splice(stage, where.first, lambda a, b: a & b, visual, choice.keep)
    valid = splice(stage, where.first, lambda a, b: a & b, role(program, "valid", where.first), choice.keep)
    still.meta["role"], valid.meta["role"] = "visual", "valid"
    masks: dict[Node, Node] = {}
    behind = False
    for node in list(stage.graph.nodes):
        behind = behind or node is where.first
        if behind and node.target is ATTENTION:
            mask = node.args[3]
            if not isinstance(mask, Node):
                raise PassError(f"oracle: {node.name} has no mask to hide tokens with")
            if mask not in masks:
                masks[mask] = splice(stage, node, _and_keys, mask, choice.keep)
            reroute(node, mask, masks[mask])
    retype(stage)
    stage.module.recompile()


def _and_keys(mask: Tensor, keep: Tensor) -> Tensor:
    seen = keep if mask.dim() == 2 else keep[:, None, None, :]
    return mask & seen if mask.dtype == torch.bool else torch.where(seen, mask, torch.finfo(mask.dtype).min)
