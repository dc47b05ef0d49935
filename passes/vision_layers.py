"""Fewer tokens inside the vision tower (W1): everything behind a point works on the shorter sequence, fixed sizes in the graph follow."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.errors import GraphError
from ..graph.program import Program, Stage
from ..graph.retype import reroute, retype
from ..graph.sites import layer_of, layers, site
from ..graph.splice import splice
from ..graph.stage import sweep
from .base import PassError
from .vision_place import find_place
from .vision_positions import number

ATTENTION = torch.ops.foveate.attention.default
aten = torch.ops.aten
SHAPED = (aten.view.default, aten.reshape.default, aten.expand.default, aten._unsafe_view.default)
Fail = Callable[[str], PassError]


def tower(program: Program, fail: Fail) -> tuple[dict[int, Node], Node]:
    """(layer -> its first node, the patches behind the tower); refused where tokens of an image are not one sequence with one feature per
    patch behind it."""
    place = find_place(program, ("grid",), False, fail)
    if place.flat or program.facts.features_per_image not in (None, program.facts.tokens_per_image):
        raise fail(f"works inside the tower, and {program.facts.model_type} merges patches behind it")
    return layers(program["vision"], program.facts.vision_layer_path), place.nodes[0]


def entry(program: Program, layer: int, fail: Fail) -> tuple[Node, Node]:
    """(first node, residual stream[images, T, D]) of a vision layer; an unknown one is refused with those there are."""
    try:
        where = site(program, layer, "vision")
    except GraphError as cause:
        raise fail(str(cause)) from cause
    return where.first, where.hidden


def attention_in(program: Program, layer: int, fail: Fail) -> Node:
    """The attention node of a vision layer."""
    stage, pattern = program["vision"], re.compile(program.facts.vision_layer_path)
    found = [n for n in stage.graph.nodes if n.target is ATTENTION and layer_of(n, pattern) == layer]
    if not found:
        raise fail(f"vision layer {layer} has no foveate.attention node of its own")
    return found[0]


def residual_after(stage: Stage, attention: Node, fail: Fail) -> Node:
    """The sum that puts the attention's output on the residual stream."""
    behind = {attention}
    for node in list(stage.graph.nodes)[list(stage.graph.nodes).index(attention) + 1 :]:
        if behind.isdisjoint(node.all_input_nodes):
            continue
        behind.add(node)
        if node.target is aten.add.Tensor and len(node.all_input_nodes) == 2 and node.meta["val"].dim() == 3:
            if any(n not in behind for n in node.all_input_nodes):
                return node
    raise fail(f"no residual sum [images, T, D] behind {attention.name}")


def substitute(stage: Stage, old: Node, new: Node, readers: Collection[Node], among: Collection[Node] | None = None) -> None:
    """Let `readers` of `old` read `new`, a sequence of another length, and set the sizes that follow, in all that depends on them (or
    `among` them).

    Sizes that are fixed numbers in view, reshape and expand are those of the old length; which axis is the tokens' is tracked from `old`
    on.
    """
    length = new.meta["val"].shape[1]
    axis: dict[Node, int] = {old: 1}
    lengths: dict[Node, int] = {old: length}
    for node in list(stage.graph.nodes):
        inputs = [n for n in node.all_input_nodes if n in axis and (n is not old or node in readers)]
        if not inputs or (among is not None and node not in among):
            continue
        source = inputs[0]
        found = _axis(node, source, axis[source])
        if found is not None:
            axis[node], lengths[node] = found, lengths[source] + node.meta["val"].shape[found] - source.meta["val"].shape[axis[source]]
            if node.target in SHAPED and isinstance(node.args[1][found], int) and node.args[1][found] > 0:
                node.update_arg(1, [lengths[node] if i == found else a for i, a in enumerate(node.args[1])])
        if old in inputs:
            reroute(node, old, new)
        node.meta["stale"] = True


def _axis(node: Node, source: Node, axis: int) -> int | None:
    """Which axis of node's value is the token axis of `source`; None when it is gone or folded into another."""
    value, before = node.meta.get("val"), source.meta["val"]
    if not isinstance(value, torch.Tensor):
        return None
    if node.target in (aten.transpose.int, aten.permute.default):
        places = list(range(before.dim()))
        if node.target is aten.permute.default:
            places = [p % before.dim() for p in node.args[1]]
        else:
            a, b = (d % before.dim() for d in node.args[1:3])
            places[a], places[b] = places[b], places[a]
        return places.index(axis)
    if node.target is ATTENTION:
        return 1
    if node.target in (aten.unsqueeze.default,):
        return axis + (node.args[1] % (before.dim() + 1) <= axis)
    if node.target is aten.slice.Tensor or (value.dim() == before.dim() and node.target not in SHAPED):
        return axis
    if node.target in SHAPED or node.target is aten.flatten.using_ints:
        size, ahead = str(before.shape[axis]), _product(before, axis)
        return next((i for i in range(value.dim()) if str(value.shape[i]) == size and _product(value, i) == ahead), None)
    return None


def _product(value: Tensor, axis: int) -> str:
    product: Any = 1
    for size in value.shape[:axis]:
        product = product * size
    return str(product)


def finish(program: Program, features: Node, kept: Node, order: bool = True) -> None:
    """After the last change: `kept`[images, K], the patch that each token before the projector stands for (-1: none), becomes an output.

    order: put the tokens in the order of those patches (tokens without patch last) and at their positions, so that the language model reads
    them as a picture.
    """
    stage = program["vision"]
    retype(stage)
    count = int(kept.meta["val"].shape[1])
    if order:
        readers, nodes = list(features.users), list(stage.graph.nodes)

        def arrange(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
            place = torch.where(kept < 0, 1 << 30, kept).sort(dim=1, stable=True).indices
            return torch.ops.foveate.keep_tokens(x, place), kept.gather(1, place)

        arranged, kept = splice(stage, max(features, kept, key=nodes.index).next, arrange, features, kept)
        for reader in readers:
            reroute(reader, features, arranged)
    stage.add_output("kept.vision", kept)
    sweep(stage)
    retype(stage)
    stage.module.recompile()
    program.facts = replace(program.facts, features_per_image=count)
    number(program, original=order)
