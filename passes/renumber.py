"""Compact positions, as published code numbers them: behind a cut the kept tokens count 0, 1, 2, ... anew, and decode goes on from there.

Layers of one model then disagree about where a token stands; that is what the published methods were measured with (mode parity).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.program import Program, Stage
from ..graph.retype import reroute, retype
from ..graph.sites import layers
from ..graph.splice import splice
from ..graph.stage import sweep

ROLE = "positions"


def count_anew(stage: Stage, first: Node, index: Node) -> None:
    """In prefill: what is read at and behind `first`, where index[B, K] gathers the kept tokens, counts them 0..K-1."""
    _read(stage, first, splice(stage, first, _from_zero, index, stage.placeholder("position_ids")))


def decode_by_length(program: Program, layer: int) -> None:
    """In decode: from `layer` on, the new token stands behind the rows that the layer has cached."""
    stage = program["decode"]
    first = layers(stage, program.facts.layer_path)[layer]
    row = next(i for i, entry in enumerate(program.kv) if entry.layer >= layer)
    _read(stage, first, splice(stage, first, lambda lengths: lengths[row][:, None], stage.placeholder("lengths")))
    sweep(stage)
    retype(stage)
    stage.module.recompile()


def _from_zero(index: Tensor, position_ids: Tensor) -> Tensor:
    return torch.arange(index.shape[1], device=index.device)[None].expand(index.shape[0], -1).to(position_ids.dtype)


def _read(stage: Stage, first: Node, positions: Node) -> None:
    """Let every reader at or behind `first` read what follows from the positions before, computed from `positions` instead."""
    nodes = list(stage.graph.nodes)
    place = {n: i for i, n in enumerate(nodes)}
    old = next((n for n in reversed(nodes[: place[positions]]) if n.meta.get("role") == ROLE), stage.placeholder("position_ids"))
    positions.meta["role"] = ROLE
    other, follows = {n for n in nodes if n.op == "placeholder"} - {old}, {old}
    for node in (n for n in nodes[: place[first]] if n.op == "call_function" and n is not old):
        if not other.isdisjoint(n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), torch.SymInt)):
            other.add(node)
        elif not follows.isdisjoint(node.all_input_nodes):
            follows.add(node)
    new: dict[Node, Node] = {old: positions}
    for node in [n for n in nodes if n in follows]:  # all before `first`; what lies behind follows by itself
        for reader in [u for u in node.users if place.get(u, -1) >= place[first] and u.op != "output"]:
            reroute(reader, node, _again(stage, first, node, new, follows))


def _again(stage: Stage, before: Node, node: Node, new: dict[Node, Node], follows: set[Node]) -> Node:
    """A copy of `node`, and of what lies between it and the positions, before the node `before`."""
    if node not in follows:
        return node
    if node not in new:
        for source in node.all_input_nodes:
            _again(stage, before, source, new, follows)
        with stage.graph.inserting_before(before):
            new[node] = stage.graph.node_copy(node, lambda n: new.get(n, n))
        new[node].meta = {}
    return new[node]
