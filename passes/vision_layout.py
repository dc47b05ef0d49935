"""Packed pictures: which tower token becomes which row of the vision stage's output, where tiles, windows, mergers and separators lie between.

Families that bake one picture's geometry (tiles laid out with newlines, packed windows in another order, merged 2 x 2 patches) all have one
thing in common: behind the last attention nothing mixes rows. So the map is found, not declared: the part of the graph behind that attention
runs on random numbers, and gradients of the rows that have bit b of their number set tell bit b of every token's row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.program import Stage
from .base import PassError


class Mixed(PassError):
    """A token flows into several rows, or the map cannot be computed; the caller names the method."""


@dataclass(frozen=True)
class Layout:
    """owner[views][T]: the row that a token of the tower becomes (part of), -1 for none (CLS, padding cut away); rows: how many there are."""

    owner: tuple[tuple[int, ...], ...]
    rows: int

    def sources(self) -> list[list[int]]:
        """Per row the tokens (flat over views) that it is made of; a separator has none."""
        found: list[list[int]] = [[] for _ in range(self.rows)]
        for token, row in enumerate(row for view in self.owner for row in view):
            if row >= 0:
                found[row].append(token)
        return found

    @property
    def separators(self) -> list[bool]:
        return [not tokens for tokens in self.sources()]

    def pool(self, x: Tensor) -> Tensor:
        """x[views, C, T] -> [1, C, rows]: the mean over each row's tokens; 0 at separators"""
        sources = self.sources()
        most = max(map(len, sources))
        index = torch.tensor([s + [0] * (most - len(s)) for s in sources], device=x.device)
        weight = torch.tensor([[1 / len(s)] * len(s) + [0.0] * (most - len(s)) if s else [0.0] * most for s in sources], device=x.device)
        flat = x.transpose(0, 1).flatten(1)  # [C, views T]
        return (flat[:, index.flatten()].unflatten(1, (self.rows, most)) * weight).sum(-1)[None]

    def of_row(self, x: Tensor) -> Tensor:
        """x[1, views T] -> [1, rows]: the value of each row's first token; separators get that of token 0, which the caller overwrites"""
        return x[:, torch.tensor([s[0] if s else 0 for s in self.sources()], device=x.device)]

    def mosaic(self) -> tuple[int, int] | None:
        """(rows, columns) of the tiles behind the first view, the overview; None where there is but one view, or they make no grid"""
        held = [[row for row in view if row >= 0] for view in self.owner[1:]]
        if not all(held):
            return None
        spans = [(min(rows), max(rows)) for rows in held]
        columns = sum(low <= spans[0][1] and high >= spans[0][0] for low, high in spans) if spans else 0
        return (len(spans) // columns, columns) if columns and len(spans) % columns == 0 else None


def find_layout(stage: Stage, attention: Node, rows: Node, skip: int) -> Layout:
    """The layout behind the tower's last attention, without the first `skip` tokens of a view.

    Mixed: a token flows into several rows, or the geometry is not fixed.
    """
    shape = attention.meta["val"].shape
    if not all(isinstance(d, int) for d in shape) or not isinstance(rows.meta["val"].shape[0], int):
        raise Mixed("the vision stage was captured without a fixed geometry")
    leaf = _noise(attention.meta["val"], 0).requires_grad_()
    with torch.enable_grad():
        out = _replay(stage, attention, rows, leaf)
        out = (out * _noise(out, 1)).flatten(1).sum(1)  # a sum over channels alone would vanish behind a LayerNorm
    count = int(rows.meta["val"].shape[0])
    number = torch.arange(count)
    owner, reached = torch.zeros(shape[:2], dtype=torch.int64), torch.zeros(shape[:2], dtype=torch.bool)
    for bit in range(max(1, math.ceil(math.log2(count)))):
        chosen = (number >> bit) & 1
        ones, zeros = (torch.autograd.grad((out * side).sum(), leaf, retain_graph=True)[0].flatten(2).abs().amax(2) > 0 for side in (chosen, 1 - chosen))
        if (ones & zeros).any():
            raise Mixed("its projector mixes patches, so that no token stands for a place on the picture")
        owner, reached = owner + (ones.long() << bit), reached | ones | zeros
    return Layout(tuple(map(tuple, torch.where(reached, owner, -1)[:, skip:].tolist())), count)


def _replay(stage: Stage, attention: Node, wanted: Node, leaf: Tensor) -> Tensor:
    """`wanted` from `leaf` at the attention: weights and other activations are random, integers are the graph's own."""
    nodes = list(stage.graph.nodes)
    behind = {attention}
    for node in nodes[nodes.index(attention) + 1 :]:
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    needed, queue = {wanted}, [wanted]
    while queue:
        node = queue.pop()
        if node is attention or (node not in behind and _drawn(node)):
            continue
        new = [n for n in node.all_input_nodes if n not in needed]
        needed |= set(new)
        queue += new
    values: dict[Node, Any] = {}
    for i, node in enumerate(n for n in nodes if n in needed):
        if node is attention:
            values[node] = leaf
        elif node not in behind and _drawn(node):
            values[node] = _noise(node.meta["val"], i + 2)
        elif node.op == "get_attr":
            values[node] = _constant(stage, str(node.target))
        elif node.op == "placeholder":
            raise Mixed(f"its rows follow from the input {node.name}")
        else:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[wanted]


def _drawn(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(tuple(like.shape), generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def _constant(stage: Stage, path: str) -> Tensor:
    owner, _, name = path.rpartition(".")
    value = getattr(stage.module.get_submodule(owner), name)
    if value.device.type == "meta":
        raise Mixed(f"the constant {path} of its geometry has no values on the meta device")
    return value.detach().cpu()


__all__ = ["Layout", "Mixed", "find_layout"]
