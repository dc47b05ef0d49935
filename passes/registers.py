"""Registers: learned tokens behind the visual ones, put in at the entry of the first layer of prefill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.errors import GraphError
from ..graph.kv_table import derive_kv
from ..graph.program import Program
from ..graph.retype import reroute, retype
from ..graph.sites import ROLES, Site, layers, role, site
from ..graph.splice import splice
from ..graph.stage import sweep
from .base import PassError
from .cut import gather, shortened

F = torch.ops.foveate
FIRST = -2  # visual_index of the first register, -3 of the second, ...; text has -1 or more


def is_register(visual_index: Tensor, visual: Tensor) -> Tensor:
    """[B, T] bool: the role `visual_index` marks registers, and every cut carries it along."""
    return (visual_index <= FIRST) & ~visual


def places(visual: Tensor, valid: Tensor, visual_index: Tensor, fractions: list[float]) -> tuple[Tensor, ...]:
    """Roles [B, T] before  ->  what follows from M registers behind the last visual token of every sample

    start[B]: where they are put; index, last [B, T + M]: the token whose position, and whose mask, every token has (itself, and for register j
    the visual token at fractions[j] of the image, and the last visual token); visual, valid, visual_index [B, T + M]. A sample without images
    gets its registers behind everything, as padding.
    """
    T, M = valid.shape[1], len(fractions)
    at = torch.arange(T, device=valid.device)[None]
    seen = visual & valid
    some = seen.any(1, keepdim=True)
    end = torch.where(seen, at, -1).amax(1, keepdim=True)
    start = torch.where(some, end + 1, T)
    slot = torch.arange(T + M, device=valid.device)[None]
    inside = (slot >= start) & (slot < start + M)
    old = torch.where(slot < start, slot, slot - M).clamp(0, T - 1)
    which = (slot - start).clamp(0, M - 1)
    count = seen.sum(1, keepdim=True)
    rank = (count * torch.tensor(fractions, device=valid.device)[None]).long()  # [B, M]
    anchor = F.keep_tokens(F.compact_tokens(seen, T), rank)
    index = torch.where(inside, anchor.gather(1, which), old)
    last = torch.where(inside, end.clamp(min=0), old)
    held = (inside & some) | (~inside & F.keep_tokens(valid, old))  # not `where`: backends choose among numbers, not among truth values
    return start.squeeze(1), index, last, F.keep_tokens(visual, old) & ~inside, held, torch.where(inside, FIRST - which, F.keep_tokens(visual_index, old))


def fill(y: Tensor, h: Tensor, index: Tensor, visual_index: Tensor, visual: Tensor) -> Tensor:
    """y[B, T + M, D] with the rows h[B, T, D] at index[B, T + M] added to its registers"""
    return y + torch.where(is_register(visual_index, visual)[..., None], F.keep_tokens(h, index), 0)


def insert_registers(program: Program, tokens: Node, fractions: list[float], who: str, filled: bool = False) -> None:
    """Prefill reads tokens[M, D] behind the visual tokens of every sample; text keeps its positions, so decode does not change.

    filled: to each is added what the visual token is whose position it takes.

    rewrite:
        h[B, S, D], masks, cos, sin  ->  [B, S + M, ..]: registers attend and are attended to as tokens right behind the last visual one, and are
        rotated by the positions of visual tokens spread over the image
    """
    stage, where = program["prefill"], site(program, 0)
    check_causal(program, who)
    roles = [role(program, name, where.first) for name in ("visual", "valid", "visual_index")]
    start, index, last, *new_roles = splice(stage, where.first, places, *roles, fractions)
    for node, name in zip(new_roles, ROLES, strict=True):
        node.meta["role"] = name
    valid = new_roles[1]
    masks = [c for c in where.crossings if len(c.axes) > 1]
    plain = Site(where.stage, where.layer, where.first, where.hidden, tuple(c for c in where.crossings if len(c.axes) <= 1))
    new: dict[Node, Any] = shortened(stage, plain, index, valid)
    for crossing in masks:
        new[crossing.node] = splice(stage, where.first, gather, crossing.node, last, valid, crossing.axes, 0)
    new[where.hidden] = splice(stage, where.first, F.insert_tokens, where.hidden, tokens, start)
    if filled:
        new[where.hidden] = splice(stage, where.first, fill, new[where.hidden], where.hidden, index, new_roles[2], new_roles[0])
    for crossing in where.crossings:
        for reader in crossing.readers:
            reroute(reader, crossing.node, new[crossing.node])
    sweep(stage)
    retype(stage)
    stage.module.recompile()
    program.kv = derive_kv(program)


def check_causal(program: Program, who: str) -> None:
    """Registers stand behind the image because of the causal order; attention that sees otherwise is refused by name."""
    starts = layers(program["prefill"], program.facts.layer_path)
    if not starts:
        raise PassError(f"{who}: the prefill of {program.facts.model_type} has no layers that can be told apart")
    for node in program["prefill"].graph.nodes:
        if node.target is F.attention.default:
            q_pos, causal, window = node.args[4], node.args[7], node.args[8]
            if not causal or window or q_pos is not None:
                kind = "sliding-window" if window or q_pos is not None else "not plain causal"
                raise PassError(f"{who}: the attention of layer {node.args[10]} of {program.facts.model_type} is {kind}; registers need plain causal attention")


def blind(program: Program, last: int) -> None:
    """In the layers before `last` no text behind an image attends to its visual tokens: what text learns of it comes through the registers.

    rewrite:
        attention(q, k, v, mask, causal)  ->  attention(q, k, v, mask & causal & ~(text row, visual column))
    """
    stage, starts = program["prefill"], layers(program["prefill"], program.facts.layer_path)
    made: dict[Any, Node] = {}
    for node in list(stage.graph.nodes):
        if node.target is not F.attention.default or not 0 <= node.args[10] < last:
            continue
        mask = node.args[3]
        if mask not in made:
            first = starts[min(starts)]
            roles = [role(program, name, first) for name in ("visual", "visual_index")]
            if not isinstance(mask, Node):
                raise GraphError(f"victor: the attention of layer {node.args[10]} has no mask to extend")
            made[mask] = splice(stage, first, _blind, mask, *roles)
        node.args = (*node.args[:3], made[mask], *node.args[4:7], False, *node.args[8:])
        node.meta["stale"] = True
    sweep(stage)
    retype(stage)
    stage.module.recompile()
    program.kv = derive_kv(program)


def _blind(mask: Tensor, visual: Tensor, visual_index: Tensor) -> Tensor:
    """mask bool[B, T] or [B, 1, T, T]  ->  bool[B, 1, T, T]"""
    at = torch.arange(visual.shape[1], device=visual.device)
    text = ~visual & ~is_register(visual_index, visual)
    seen = (at[None, :] <= at[:, None])[None] & ~(text[:, :, None] & visual[:, None, :])
    return seen[:, None] & (mask if mask.dim() == 4 else mask[:, None, None, :])


def scattered(count: int) -> list[float]:
    """Places in [0, 1) such that the first m of them are about evenly spread for every m: 1/2, 1/4, 3/4, 1/8, ... (van der Corput)."""
    return [sum(int(b) / 2 ** (i + 1) for i, b in enumerate(reversed(f"{j:b}"))) for j in range(1, count + 1)]


def even(count: int) -> list[float]:
    """The middles of `count` equal parts of [0, 1)."""
    return [(j + 0.5) / count for j in range(count)]
