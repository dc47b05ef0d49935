"""Where the visual sequence may shrink: for every layer, which values cross into it and which of their axes are the token axis."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch.fx import Node

from .errors import GraphError
from .program import Program, Stage
from .splice import splice


@dataclass(frozen=True)
class Crossing:
    """A value made before the site and read behind it. `axes` are its token axes; a SymInt has none."""

    node: Node
    axes: tuple[int, ...]
    readers: tuple[Node, ...]


@dataclass(frozen=True)
class Site:
    """The entry of one layer of one stage."""

    stage: str
    layer: int
    first: Node  # the first node of the layer
    hidden: Node  # the residual stream entering it, [B, T, D]
    crossings: tuple[Crossing, ...]

    @property
    def length(self) -> Any:
        """T, as an int or SymInt."""
        return self.hidden.meta["val"].shape[1]


def flow(stage: Stage) -> nx.DiGraph:
    """The stage as a graph of nodes; an edge runs from a value to its reader."""
    graph = nx.DiGraph()
    graph.add_nodes_from(stage.graph.nodes)
    graph.add_edges_from((source, node) for node in stage.graph.nodes for source in node.all_input_nodes)
    return graph


def layer_of(node: Node, pattern: re.Pattern[str]) -> int | None:
    """The layer that made the node, by its module path."""
    for path, _ in reversed(list((node.meta.get("nn_module_stack") or {}).values())):
        if found := pattern.search(path):
            return int(found[1])
    return None


def layers(stage: Stage, pattern: str) -> dict[int, Node]:
    """layer -> its first node. Layers must be contiguous and in order; a node out of place is a GraphError."""
    compiled, first, current = re.compile(pattern), {}, -1
    for node in stage.graph.nodes:
        layer = layer_of(node, compiled) if node.op == "call_function" else None
        if layer is None:
            continue
        if layer < current:
            raise GraphError(f"sites: node {node.name} of layer {layer} comes after layer {current} began; layers must not interleave")
        if layer not in first:
            first[layer] = node
        current = layer
    return first


def site(program: Program, layer: int, stage: str = "prefill") -> Site:
    """The site at the entry of `layer`; an unknown layer is a GraphError that names the ones there are."""
    pattern = program.facts.vision_layer_path if stage == "vision" else program.facts.layer_path
    firsts = layers(program[stage], pattern)
    if layer not in firsts:
        found = f"{min(firsts)}..{max(firsts)}" if firsts else "none"
        raise GraphError(f"no layer {layer} in {stage}; this program has {found}")
    first = firsts[layer]
    edges = _crossing_edges(program[stage], first)
    hidden = _residual(program[stage], edges, first, program.facts.hidden_size if stage != "vision" else None)
    length = hidden.meta["val"].shape[1]
    crossings = []
    for source, readers in edges.items():
        axes = token_axes(source, length)
        if axes or (isinstance(source.meta["val"], torch.SymInt) and depends_on(source.meta["val"], length)):
            crossings.append(Crossing(source, axes, tuple(readers)))
    return Site(stage, layer, first, hidden, tuple(crossings))


def token_axes(node: Node, length: Any) -> tuple[int, ...]:
    """The axes of a tensor that are as long as the token sequence, by symbol and never by value alone."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return ()
    return tuple(i for i, d in enumerate(value.shape) if same(d, length))


def same(a: Any, b: Any) -> bool:
    """Equal as expressions: two symbols that happen to have one value are different."""
    if isinstance(a, torch.SymInt) != isinstance(b, torch.SymInt):
        return False
    return a == b if isinstance(a, int) else a.node.expr == b.node.expr


def depends_on(value: torch.SymInt, length: Any) -> bool:
    """Does a crossing size contain the sequence length?"""
    return isinstance(length, torch.SymInt) and (value.node.expr == length.node.expr or bool(value.node.expr.free_symbols & length.node.expr.free_symbols))


def _crossing_edges(stage: Stage, first: Node) -> dict[Node, list[Node]]:
    graph = flow(stage)
    order = {node: i for i, node in enumerate(stage.graph.nodes)}
    behind = {node for node, i in order.items() if i >= order[first]}
    found: dict[Node, list[Node]] = {}
    for source, reader in sorted(nx.edge_boundary(graph, set(graph) - behind, behind), key=lambda e: (order[e[0]], order[e[1]])):
        if source.op != "get_attr" and reader.op != "output":  # what earlier layers return stays as long as it was
            found.setdefault(source, []).append(reader)
    return found


def _residual(stage: Stage, edges: dict[Node, list[Node]], first: Node, width: int | None) -> Node:
    """The [B, T, D] float value that the layer continues: the last such crossing value that is not made of positions and masks alone."""
    found = [n for n in edges if _is_hidden(n.meta.get("val"), width)]
    if not found:
        raise GraphError(f"sites: no [B, T, {width or 'D'}] residual crosses at {first.name}; crossing are {[n.name for n in edges]}")
    if len(found) == 1 or width is None:
        return found[-1]
    graph, told = flow(stage), {"position_ids", "attention_mask"}  # rotary cosines are as wide as the model where it has one head
    seen = [n for n in found if any(s.op == "placeholder" and s.meta.get("name", s.name) not in told for s in nx.ancestors(graph, n))]
    return (seen or found)[-1]


def _is_hidden(value: Any, width: int | None) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 3 and value.is_floating_point() and (width is None or value.shape[2] == width)


ROLES = ("visual", "valid", "visual_index")


def role(program: Program, name: str, before: Node) -> Node:
    """The node that says, for the token sequence as it is just before `before`, which tokens are what.

    visual[B, T] bool: comes from an image; valid[B, T] bool: is not padding; visual_index[B, T]: rank among the visual tokens of the sample
    as the prefill received them. A cut leaves the shortened role behind, so the nearest one is the right one.
    """
    stage = program["prefill"]
    _ensure_roles(program, stage)
    nearest = None
    for node in stage.graph.nodes:
        if node is before:
            break
        if node.meta.get("role") == name:
            nearest = node
    if nearest is None:
        raise GraphError(f"sites: role {name!r} is not known before {before.name}; roles are {ROLES}")
    return nearest


def _ensure_roles(program: Program, stage: Stage) -> None:
    if any("role" in node.meta for node in stage.graph.nodes):
        return
    token = program.facts.image_token_id

    def roles(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        visual = input_ids == token
        return visual, attention_mask != 0, visual.long().cumsum(1) - 1

    start = next(n for n in stage.graph.nodes if n.op == "call_function")
    nodes = splice(stage, start, roles, stage.placeholder("input_ids"), stage.placeholder("attention_mask"))
    for name, node in zip(ROLES, nodes, strict=True):
        node.meta["role"] = name
