"""Segmented exits: the prefill in pieces, so that the host decides between them, for each prompt, whether the visual tokens leave here.

DyVTE (Wu et al., 2024, arXiv:2411.19628) asks a trained router after every layer; no graph can hold that choice and save its time, since both
branches of a select are computed. Here the prefill is cut at a few layers. Behind each there are two pieces: the next segment, and the whole
rest without visual tokens (`exit-vision` at that layer). One of them is run; the other costs disk and memory, no time. What crosses between
pieces stays with the host. In place of the trained router every segment returns how much of the last row's attention still falls on visual
tokens; the threshold is the caller's, from calibration (`exit_layers` says how safe each layer is).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from ..graph.program import Program, Stage
from ..graph.sites import layers as layers_of
from ..graph.sites import role, site
from ..graph.splice import splice
from . import taps
from .base import PassError
from .methods.exit_vision import ExitVision

F = torch.ops.foveate
Values = dict[str, Tensor]
Call = Callable[[str, Stage, Values], Values]


@dataclass(frozen=True)
class Segments:
    """through[i] runs the layers before layers[i] (the last: to the end); leave[i]: everything from layers[i] on, without visual tokens.

    `lengths` of the cache follow from which was run, as after any cut: they are in kv_lengths.
    """

    layers: tuple[int, ...]
    through: tuple[Stage, ...]
    leave: tuple[Stage, ...]

    @property
    def stages(self) -> dict[str, Stage]:
        """By name, to be lowered one by one."""
        return {f"prefill.{i}": s for i, s in enumerate(self.through)} | {f"prefill.{i}.exit": s for i, s in enumerate(self.leave)}

    def run(self, feeds: Mapping[str, Tensor], leaves: Callable[[int, Tensor], bool], call: Call | None = None) -> tuple[Values, int | None]:
        """Prefill outputs, and the layer at which visual tokens left (None: they stayed).

        leaves(layer, looks[B]): the host's decision for the batch; call(name, stage, inputs): who runs a piece, by default eager PyTorch.
        """
        call = call or (lambda name, stage, values: stage.run(values))
        held = dict(feeds)
        for i, stage in enumerate(self.through):
            held |= call(f"prefill.{i}", stage, {n: held[n] for n in stage.inputs})
            if i < len(self.leave) and leaves(self.layers[i], held[f"looks.layer{self.layers[i]}"]):
                out = call(f"prefill.{i}.exit", self.leave[i], {n: held[n] for n in self.leave[i].inputs})
                return _returned(held | out, feeds), self.layers[i]
        return _returned(held, feeds), None


def segments(program: Program, layers: Sequence[int]) -> Segments:
    """The prefill of a program in len(layers) + 1 segments and as many exits; the program stays as it is."""
    found = sorted(layers_of(program["prefill"], program.facts.layer_path))
    if not layers or list(layers) != sorted(set(layers)) or layers[0] <= found[0] or layers[-1] > found[-1]:
        raise PassError(f"segments: layers must ascend within {found[0] + 1}..{found[-1]}, got {list(layers)}")
    whole = program.clone()
    for layer in layers:
        _look(whole, layer)
    exits = [whole.clone() for _ in layers]
    for layer, short in zip(layers, exits, strict=True):
        ExitVision(layer=layer).run(short)
    stage = whole["prefill"]
    nodes = list(stage.graph.nodes)
    starts = [0, *(nodes.index(site(whole, layer).first) for layer in layers), len(nodes)]
    inside = [{n.name for n in nodes[a:b]} for a, b in itertools.pairwise(starts)]
    before: list[set[str]] = [set().union(*inside[: i + 1]) for i in range(len(layers))]
    later = [_part(e["prefill"], {n.name for n in e["prefill"].graph.nodes} - seen, set()) for e, seen in zip(exits, before, strict=True)]
    through: list[Stage] = []
    asked = {name for piece in later for name in piece.inputs}
    for names in reversed(inside):  # from the back, so that a segment returns what the ones behind it ask for
        through.insert(0, _part(stage, names, asked))
        asked |= set(through[0].inputs)
    return Segments(tuple(layers), tuple(through), tuple(later))


def _look(program: Program, layer: int) -> None:
    """looks.layer<l>[B]: the share of the last valid row's attention, in the layer before, that falls on visual tokens; mean over heads"""
    where, stage = site(program, layer), program["prefill"]
    read = taps.collect(program, where, ["q"])

    def looks(q: Tensor, k: Tensor, mask: Tensor | None, scale: float, causal: bool, softcap: float, visual: Tensor, valid: Tensor) -> Tensor:
        row = F.attention_rows(q, k, mask, taps.last_valid(valid), scale, causal, softcap)[:, :, 0].mean(1)
        return torch.where(visual & valid, row, 0).sum(1)

    names = ("q", "k", "mask", "scale", "causal", "softcap")
    values = [read[n] for n in names]
    node = splice(stage, where.first, looks, *values, role(program, "visual", where.first), role(program, "valid", where.first))
    stage.add_output(f"looks.layer{layer}", node)
    stage.module.recompile()


def _part(stage: Stage, names: set[str], asked: set[str]) -> Stage:
    """The nodes of these names as a stage of their own: what they read from outside is an input `at.<node>` (or the stage's own input);
    it returns the stage's outputs among them and what is `asked` for. Sizes are computed anew."""
    graph, image = Graph(), {}
    inputs = {n: n.meta.get("name", n.name) for n in stage.graph.nodes if n.op == "placeholder"}
    held = [n for n in stage.graph.nodes if n.name in names and n.op == "call_function"]
    outside: list[Node] = []
    sizes: list[Node] = []
    queue = [n for node in held for n in node.all_input_nodes]
    while queue:
        node = queue.pop()
        if node.op == "get_attr" or (node.name in names and node.op == "call_function") or node in outside or node in sizes:
            continue
        if isinstance(node.meta.get("val"), torch.Tensor):
            outside.append(node)
        else:
            sizes.append(node)
            queue += node.all_input_nodes
    order = {n: i for i, n in enumerate(stage.graph.nodes)}
    for node in sorted(outside, key=order.__getitem__):
        name = inputs.get(node, f"at.{node.name}")
        image[node] = graph.placeholder(name.replace(".", "_"))
        image[node].meta = {"val": node.meta["val"], "name": name}
    for node in sorted([*held, *sizes], key=order.__getitem__):
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source not in image:
                image[source] = graph.node_copy(source)
        image[node] = graph.node_copy(node, image.__getitem__)
    inner = set(held)
    returned = [(name, node) for name, node in stage.output_nodes.items() if node in inner]
    returned += [(f"at.{node.name}", node) for node in held if f"at.{node.name}" in asked]
    graph.output(tuple(image[node] for _, node in returned))
    return Stage(GraphModule(stage.module, graph), [name for name, _ in returned])


def _returned(held: Values, feeds: Mapping[str, Tensor]) -> Values:
    return {n: v for n, v in held.items() if n not in feeds and not n.startswith(("at.", "looks."))}


__all__ = ["Segments", "segments"]
