"""Replay: a part of a stage's graph once more, on other values."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.fx import Node

from ..graph.errors import GraphError
from ..graph.program import Stage
from ..graph.retype import retype

F = torch.ops.foveate
OUTSIDE = -1  # the layer of attention that has no cache


def replay(stage: Stage, before: Node, wanted: Node, given: Mapping[Node, Node], mask: Node | None = None,
           weight: Callable[[Node], Node | None] = lambda node: None) -> Node:
    """What leads from the nodes of `given` to `wanted`, copied before the node `before` and fed with what `given` says; returns the new `wanted`.

    mask: what attention sees in the copy, bool[B, T], and what sizes of the stage's [B, S] inputs become sizes of. weight: another node for a
    `get_attr` node, or None for the same tensor. Nothing of the copy is cached, and it belongs to no layer. A value that depends on another input
    of the stage is a GraphError that names it.
    """
    order = {node: i for i, node in enumerate(stage.graph.nodes)}
    needed, waiting = set(), [wanted]
    while waiting:
        node = waiting.pop()
        if node in needed or node in given:
            continue
        if node.op == "placeholder":
            raise GraphError(f"reads the input {node.meta.get('name', node.name)}, which cannot be given to a copy")
        needed.add(node)
        if mask is not None and _is_size(node):
            continue
        waiting += [n for n in node.all_input_nodes if not (mask is not None and node.target is F.attention.default and n is node.args[3])]
    new = dict(given)
    with stage.graph.inserting_before(before):
        for node in sorted(needed, key=order.__getitem__):
            if node.op == "get_attr":
                new[node] = weight(node) or stage.graph.get_attr(str(node.target))
                new[node].meta.setdefault("val", node.meta["val"])
            elif node.target is F.kv_store.default:
                new[node] = new[node.args[0]]
            elif mask is not None and _is_size(node):
                new[node] = stage.graph.call_function(node.target, (mask, node.args[1]))
            elif order[node] > order[before] or any(n in new for n in node.all_input_nodes):
                copied = stage.graph.node_copy(node, lambda n: new.get(n, n))
                copied.meta = {}
                if node.target is F.attention.default:
                    copied.args = (*copied.args[:3], mask if mask is not None else copied.args[3], *copied.args[4:10], OUTSIDE)
                new[node] = copied
    retype(stage)
    return new[wanted]


def _is_size(node: Node) -> bool:
    """The length of an input that is a row of tokens."""
    return node.target is torch.ops.aten.sym_size.int and node.args[0].op == "placeholder" and node.args[0].meta["val"].dim() == 2
