"""Where a vision-side method works: on the patches before the projector, or on the tokens that it returns."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

import torch
from torch.fx import Node

from ..graph.program import Program, Stage
from ..graph.retype import new_value
from ..graph.sites import layer_of
from .base import PassError
from .vision_layout import Layout, Mixed, find_layout
from .vision_signals import FROM_ATTENTION, FROM_CLS

F = torch.ops.foveate
Fail = Callable[[str], PassError]


@dataclass(frozen=True)
class Place:
    """`nodes` carry the tokens: one [images, n, Dv] before the projector, or the returned [images * n, D], one per feature (`flat`).

    packed: one picture of fixed geometry per run, its n rows made of tiles, windows or merged patches; `layout` says how, where it was asked.
    """

    nodes: tuple[Node, ...]
    flat: bool
    n: int
    grid: tuple[int, int] | None
    merge: int  # patches per token along one axis
    skip: int
    attentions: tuple[Node, ...]
    cls: Node | None  # [images, 1 + n, Dv], what the patches were sliced from
    packed: bool = False
    layout: Layout | None = None


def find_place(program: Program, names: Collection[str], after_projector: bool, fail: Fail, views: bool = False) -> Place:
    """Before the projector where there is one patch per token, so that the projector works less; else behind it, patches pooled per token.

    views: the method works on the tiles of a packed picture, not on its rows.
    Refused by name: no fixed number of tokens per image, a CLS or attention asked for that is not there, tokens that an earlier pass
    already chose or merged when their attention is asked for.
    """
    stage, facts = program["vision"], program.facts
    n, known, wants = facts.visual_per_image, facts.tokens_per_image, set(names) & FROM_ATTENTION
    reduced = facts.features_per_image not in (None, known)
    if n is None and isinstance(stage.output_nodes[facts.features[0]].meta["val"].shape[0], int):
        return _packed(program, names, fail, views)
    if n is None or (facts.vision_grid is None and not reduced and wants | (set(names) & {"grid"})):
        raise fail(f"needs images of a fixed grid; {facts.model_type} was captured without one")
    _check_cls(program, names, fail)
    if reduced and (wants or "grid" in names):
        raise fail(f"reads the grid of patches, and an earlier pass left {n} of {known} tokens per image")
    patches = facts.vision_grid[0] * facts.vision_grid[1] if facts.vision_grid and not reduced else n
    flat = after_projector or reduced or facts.vision_grid is None or patches != n or len(facts.features) > 1
    merge = _merge(facts.vision_grid, n, wants, fail, facts.model_type) if facts.vision_grid and not reduced else 1
    grid = (facts.vision_grid[0] // merge, facts.vision_grid[1] // merge) if facts.vision_grid and not reduced else None
    attentions = _attentions(stage, patches + facts.has_cls, fail) if wants or not flat else ()
    if flat:
        nodes = tuple(stage.output_nodes[name] for name in facts.features)
        return Place(nodes, True, n, grid, merge, int(facts.has_cls), attentions, None)
    features = _patches(stage, attentions[-1], n, fail)
    return Place((features,), False, n, grid, 1, int(facts.has_cls), attentions, _sliced_from(features, n))


def _packed(program: Program, names: Collection[str], fail: Fail, views: bool) -> Place:
    """Behind the projector of a picture whose geometry is fixed; attention is pooled onto its rows by the layout found there."""
    stage, facts, skip = program["vision"], program.facts, int(program.facts.has_cls)
    nodes = tuple(stage.output_nodes[name] for name in facts.features)
    n = int(nodes[0].meta["val"].shape[0])
    _check_cls(program, names, fail)
    if "grid" in names and not views:
        raise fail(f"reads the grid of patches, and {facts.model_type} packs a picture's tokens in an order of its own")
    if not set(names) & FROM_ATTENTION and not views:
        return Place(nodes, True, n, None, 1, skip, (), None, True)
    pattern = re.compile(facts.vision_layer_path or "$.")
    towers = tuple(node for node in stage.graph.nodes if node.target in (F.attention.default, F.attention_varlen.default)
                   and layer_of(node, pattern) is not None)
    if not towers:
        raise fail(f"found no attention in the vision layers of {facts.model_type}")
    try:
        layout = find_layout(stage, towers[-1], nodes[0], skip)
    except Mixed as cause:
        raise fail(f"cannot tell which patches the tokens of {facts.model_type} stand for: {cause}") from cause
    side = isqrt(len(layout.owner[0]))
    read = towers if facts.has_cls else towers[-1:]  # only the CLS is read in several layers
    return Place(nodes, True, n, (side, side) if views else None, 1, skip, read, None, True, layout)


def _check_cls(program: Program, names: Collection[str], fail: Fail) -> None:
    if set(names) & FROM_CLS and not program.facts.has_cls:
        raise fail(f"needs a vision tower with a CLS token; that of {program.facts.model_type} has none")


def _merge(grid: tuple[int, int], n: int, wants: Collection[str], fail: Fail, model: str) -> int:
    patches = grid[0] * grid[1]
    side = isqrt(max(patches // n, 1))
    if n * side * side == patches and grid[0] % side == 0 and grid[1] % side == 0:
        return side
    if wants:
        raise fail(f"needs one feature per patch, or per square block of patches; {model} makes {n} of {patches} patches")
    return 1


def _attentions(stage: Stage, tokens: int, fail: Fail) -> tuple[Node, ...]:
    found = [node for node in stage.graph.nodes if node.target is F.attention.default]
    if not found:
        raise fail("the vision stage has no foveate.attention node (packed windows are another dialect op)")
    if any(node.args[0].meta["val"].shape[2] != tokens for node in found):
        raise fail(f"needs every vision layer to attend over all {tokens} tokens of an image; here they attend over "
                   f"{sorted({str(node.args[0].meta['val'].shape[2]) for node in found})}")
    return tuple(found)


def _patches(stage: Stage, last: Node, n: int, fail: Fail) -> Node:
    """The patches as the projector gets them: what the last vision layer returns, or, with a CLS token, the [images, n, Dv] sliced from
    it."""
    nodes = list(stage.graph.nodes)
    behind: set[Node] = {last}
    found = None
    for node in nodes[nodes.index(last) + 1 :]:
        if behind.isdisjoint(node.all_input_nodes):
            continue
        behind.add(node)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1] == n:
            if not _in_layer(node, last):
                return found or node
            found = node  # without a CLS token: the last value of the layer
    raise fail(f"no [images, {n}, D] value behind the last vision attention {last.name}")


def _in_layer(node: Node, last: Node) -> bool:
    """Made by the layer that the last attention belongs to: its output projection, residual sums and MLP."""
    layer = next((p for p in reversed(module_paths(last)) if p.rsplit(".", 1)[-1].isdigit()), None)
    return layer is not None and any(p == layer or p.startswith(f"{layer}.") for p in module_paths(node))


def module_paths(node: Node) -> list[str]:
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _sliced_from(features: Node, n: int) -> Node | None:
    source = features.args[0] if features.args else None
    value = source.meta.get("val") if isinstance(source, Node) else None
    return source if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1] == n + 1 else None


def external(program: Program, name: str, images: Any, width: Any, dtype: torch.dtype) -> Node:
    """The stage input `name`[images, width], listed in facts.vision_extra: text in the space of the tokens, or saliency per token."""
    stage, facts = program["vision"], program.facts
    node = stage.add_input(name, new_value(stage, (images, width), dtype))
    if name not in facts.vision_extra:
        program.facts = replace(facts, vision_extra=(*facts.vision_extra, name))
        if "vision" in program.example:
            count = next(iter(program.example["vision"].values())).shape[0]
            drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(0)).to(dtype)
            program.example = program.example | {"vision": program.example["vision"] | {name: drawn}}
    return node


__all__ = ["Place", "external", "find_place"]
