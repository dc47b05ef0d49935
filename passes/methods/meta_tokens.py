"""Meta tokens: learned tokens travel through the vision tower with the patches and are all that the language model gets."""

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from ...graph.program import Program
from ...graph.retype import reroute, retype
from ...graph.splice import splice
from ...graph.stage import sweep
from ..insert import Insertion
from ..reduce import Layer
from ..vision_layers import entry, substitute, tower


@dataclass(frozen=True)
class MetaTokens(Insertion):
    """M learned tokens join the patches at the entry of vision layer `layer`; patches leave at the entry of layer `drop`, or behind the tower.

    rewrite:
        h[I, T, D]      ->  cat(h, meta[M, D])[I, T + M, D]                            (entry of vision layer `layer`)
        h[I, T + M, D]  ->  cat(CLS, meta)[I, M (+ 1), D]                              (entry of vision layer `drop`, where given)
        x[I, n, D] -> projector  =>  x[I, M, D] -> projector

    After LeMeViT (Jiang et al. 2024), whose backbone is built around such tokens; here they are Victor's registers on the vision side. Attention in a
    tower is not causal: until they leave, patches attend to meta tokens too.
    """

    name: ClassVar[str] = "meta-tokens"
    paper: ClassVar[str] = "arXiv:2405.09789"

    tokens: Annotated[int, Ge(1)] = 16
    layer: Layer = 1
    drop: Layer | None = None

    def run(self, program: Program) -> bool:
        if program.facts.positions.get("kind") == "mrope":
            raise self.fail(f"makes tokens that stand for no single patch, and {program.facts.model_type} gives every token the position of its patch")
        n = program.facts.visual_per_image
        if n is not None and self.tokens >= n:
            raise self.fail(f"{self.tokens} meta tokens are not fewer than the {n} visual tokens of an image")
        if self.drop is not None and self.drop <= self.layer:
            raise self.fail(f"patches leave at layer {self.drop}, and the meta tokens join at layer {self.layer}; they must have read something by then")
        stage = program["vision"]
        _, features = tower(program, self.fail)
        first, hidden = entry(program, self.layer, self.fail)
        nodes = list(stage.graph.nodes)
        later = [u for u in hidden.users if nodes.index(u) >= nodes.index(first)]
        width, before = int(hidden.meta["val"].shape[2]), int(hidden.meta["val"].shape[1])
        meta = self.learn(program, "vision", first, "tokens", lambda: self.noise("tokens", self.tokens, width))
        joined = splice(stage, first, lambda h, m: torch.cat([h, m.to(h.dtype).expand(h.shape[0], -1, -1)], 1), hidden, meta)
        substitute(stage, hidden, joined, later)
        retype(stage)
        patches = n
        if self.drop is not None:
            first, hidden = entry(program, self.drop, self.fail)
            nodes = list(stage.graph.nodes)
            later = [u for u in hidden.users if nodes.index(u) >= nodes.index(first)]
            lead = int(program.facts.has_cls)
            short = splice(stage, first, lambda h: torch.cat([h[:, :lead], h[:, before:]], 1), hidden)
            substitute(stage, hidden, short, later)
            retype(stage)
            patches = before - lead - n  # what stands between: nothing in towers of patches and CLS
        readers = list(features.users)
        skip = int(patches)

        def taken(x: Tensor) -> Tensor:
            return x[:, skip:].clone()

        new = splice(stage, features.next, taken, features)
        substitute(stage, features, new, readers)
        for reader in readers:
            reroute(reader, features, new)
        sweep(stage)
        retype(stage)
        stage.module.recompile()
        program.facts = replace(program.facts, features_per_image=self.tokens)
        return True
