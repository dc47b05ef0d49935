"""Bypass: some visual tokens skip a layer and rejoin behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..graph.kv_table import derive_kv
from ..graph.program import Program
from ..graph.retype import reroute, retype
from ..graph.sites import Site, layers, role
from ..graph.splice import splice
from ..graph.stage import sweep
from .cut import plan, shorten
from .reduce import Choice, Keep, Layer, Reduce

F = torch.ops.foveate


@dataclass(frozen=True)
class Bypass(Reduce):
    """In each of `layers` only text and the best `keep` visual tokens take part; the rest pass on their residual stream as it is.

    rewrite:
        h' = layer(h, masks, cos, ...)  ->  i = compact(text or top(score, keep));  h' = scatter_tokens(h, layer(h[i], masks[i], ...))

    Sequence, roles and positions behind the layer are as before; the cache of the layer holds only what took part (KV entry(layer),
    partial).
    """

    layers: tuple[Layer, ...]
    keep: Keep
    exact: ClassVar[bool] = True

    def run(self, program: Program) -> bool:
        if self.layers and max(self.layers) >= (last := max(layers(program["prefill"], program.facts.layer_path))):
            raise self.fail(f"layer {max(self.layers)} has no layer behind it where tokens could rejoin; "
                            f"the last that can be bypassed is {last - 1}")
        if both := [layer for layer in self.layers if layer - 1 in self.layers]:
            raise self.fail(f"layer {both[0]} chooses by the attention of layer {both[0] - 1}, which is bypassed too and sees only some tokens; "
                            "leave a layer between them")
        return super().run(program)

    def schedule(self) -> tuple[tuple[int, Keep], ...]:
        return tuple((layer, self.keep) for layer in sorted(set(self.layers)))

    def apply(self, program: Program, where: Site, choice: Choice) -> None:
        stage = program["prefill"]
        roles = [role(program, name, where.first) for name in ("visual", "valid", "visual_index")]
        index, valid, _, _, kept = splice(stage, where.first, plan, choice.keep, *roles, choice.length, choice.count)
        behind = self.site(program, where.layer + 1)
        nodes = list(stage.graph.nodes)
        later = set(nodes[nodes.index(behind.first) :])
        inside = Site(where.stage, where.layer, where.first, where.hidden, tuple(
            type(c)(c.node, c.axes, tuple(r for r in c.readers if r not in later)) for c in where.crossings))
        shorten(stage, inside, index, valid)
        joined = splice(stage, behind.first, F.scatter_tokens, where.hidden, behind.hidden, choice.keep)
        for crossing in behind.crossings:
            if crossing.node is behind.hidden:
                for reader in crossing.readers:
                    if reader in later:
                        reroute(reader, behind.hidden, joined)
        stage.add_output(f"kept.layer{where.layer}", kept)
        sweep(stage)
        retype(stage)
        stage.module.recompile()
        program.kv = derive_kv(program)

