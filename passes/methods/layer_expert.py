"""Layer experts: in chosen layers a learned router says which visual tokens of every image take part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ...graph.program import Program
from ...graph.retype import retype
from ...graph.sites import Site, layers, role, site
from ...graph.splice import splice
from ..budget import rank_in_group
from ..bypass import Bypass
from ..insert import Insertion
from ..reduce import Keep, Layer

F = torch.ops.foveate


@dataclass(frozen=True)
class _Routed(Bypass):
    """The bypass of one layer, scored by a node that is there already."""

    score_node: Any = None

    def score(self, routed: Tensor) -> Tensor:
        return routed

    def _taps(self, program: Program, where: Site, more: list[str]) -> dict[str, Any]:
        return {"routed": self.score_node}


@dataclass(frozen=True)
class LayerExpert(Insertion):
    """In each of `layers`, the visual tokens that a learned vector likes least skip the layer, image by image, and rejoin behind it.

    rewrite:
        s = h w;  i = compact(text or top(-rank of s within the image, keep))
        h' = scatter_tokens(h, layer(h[i], ...));  visual rows: h + 2 sigmoid(s / rms(h)) (h' - h)

    The router of VideoLLM-MoD (Wu et al. 2024). How its outputs are weighted is not published; here the factor is near 1 at the start and gives the
    router its gradient. The cache of such a layer holds what took part.
    """

    name: ClassVar[str] = "layer-expert"
    paper: ClassVar[str] = "arXiv:2408.16730"

    layers: tuple[Layer, ...] = (3, 5, 7, 9, 11, 13, 15)
    keep: Keep = 0.2

    def run(self, program: Program) -> bool:
        known = sorted(layers(program["prefill"], program.facts.layer_path))
        for layer in sorted(set(self.layers)):
            if layer not in known[:-1]:
                raise self.fail(f"layer {layer} cannot be bypassed; this program has {known[0]}..{known[-1]}, and behind the last no token could rejoin")
        for layer in sorted(set(self.layers)):
            self._route(program, layer)
        return bool(self.layers)

    def _route(self, program: Program, layer: int) -> None:
        stage, where = program["prefill"], site(program, layer)
        width, per_image = program.facts.hidden_size, program.facts.visual_per_image
        router = self.learn(program, "prefill", where.first, f"layer{layer}.router", lambda: self.noise(f"layer{layer}", width, std=width**-0.5))
        roles = [role(program, name, where.first) for name in ("visual", "valid", "visual_index")]

        def rate(h: Tensor, w: Tensor, visual: Tensor, valid: Tensor, rank: Tensor) -> Tensor:
            image = rank.clamp(min=0) // per_image if per_image else torch.zeros_like(rank)
            return -rank_in_group((h.float() * w.float()).sum(-1), image, visual & valid).float()

        def mix(h: Tensor, y: Tensor, w: Tensor, visual: Tensor) -> Tensor:
            s = (h.float() * w.float()).sum(-1) * h.float().square().mean(-1).add(1e-6).rsqrt()
            gate = torch.where(visual, 2 * torch.sigmoid(s), 1.0)
            return h + (y - h) * gate[..., None].to(h.dtype)

        score = splice(stage, where.first, rate, where.hidden, router, *roles)
        before = set(stage.graph.nodes)
        _Routed(layers=(layer,), keep=self.keep, score_node=score).run(program)
        joined = next(n for n in stage.graph.nodes if n.target is F.scatter_tokens.default and n not in before and n.args[0] is where.hidden)
        readers: list[Node] = list(joined.users)
        mixed = splice(stage, joined.next, mix, where.hidden, joined, router, roles[0])
        for reader in readers:
            reader.replace_input_with(joined, mixed)
            reader.meta["stale"] = True
        retype(stage)
        stage.module.recompile()
