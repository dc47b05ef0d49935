"""SViT-style bypass: in some vision layers only the interesting tokens are processed; the others wait and may be taken up again later."""

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ...graph.program import Program
from ...graph.retype import reroute, retype
from ...graph.sites import layer_of
from ...graph.splice import splice
from ...graph.stage import sweep
from ..base import Pass
from ..vision_layers import attention_in, entry, substitute, tower
from ..vision_signals import Attention, Signals

F = torch.ops.foveate


@dataclass(frozen=True)
class BypassVision(Pass):
    """
    rewrite, in every vision layer l of `layers` with its share `keep`:
        stays = CLS and top(score, keep n);  x[images, T, D] -> scatter_tokens(x, layer(keep_tokens(x, stays)), stays)

    Liu et al., "Revisiting Token Pruning for Object Detection and Instance Segmentation" (WACV 2024): dense outputs keep every token. The published
    selector is a trained two-logit MLP per layer with a rate per picture; here the score is the attention of the last layer that all patches went
    through (of its CLS token, else what a token receives) and the rate is fixed: 0.7, 0.49, 0.343 over three groups of layers.
    One mode: the published selector needs its trained weights, so there is nothing to be in parity with.
    """

    name: ClassVar[str] = "bypass-vision"
    paper: ClassVar[str] = "arXiv:2306.07050"
    place: ClassVar[str] = "tower"
    shapes: ClassVar[str] = "fixed"

    layers: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 9, 10, 11)
    keep: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.7, 0.7, 0.7, 0.49, 0.49, 0.49, 0.343, 0.343, 0.343)

    def run(self, program: Program) -> bool:
        tower(program, self.fail)
        if len(self.layers) != len(self.keep):
            raise self.fail(f"layers and keep belong together, and they are {len(self.layers)} and {len(self.keep)} long")
        if 0 in self.layers:
            raise self.fail("reads the attention before the layer, and there is none before vision layer 0; the first it can bypass is 1")
        for layer, keep in zip(self.layers, self.keep, strict=True):
            self._bypass(program, layer, keep)
        return bool(self.layers)

    def _bypass(self, program: Program, layer: int, keep: float) -> None:
        stage, cls, pattern = program["vision"], int(program.facts.has_cls), re.compile(program.facts.vision_layer_path)
        first, x = entry(program, layer, self.fail)
        seen = max(i for i in range(layer) if i not in self.layers)  # what went through a bypassed layer is not all there is
        before = attention_in(program, seen, self.fail)
        inside = [n for n in stage.graph.nodes if n.op == "call_function" and layer_of(n, pattern) == layer]
        out = [n for n in inside if any(u not in inside for u in n.users)]
        if len(out) != 1 or x.meta["val"].shape != out[0].meta["val"].shape:
            raise self.fail(f"vision layer {layer} hands on {[n.name for n in out]}, not one residual stream")

        def shorter(x: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, ...]:
            signals = Signals(x[:, cls:], (Attention(q, k, v, mask, scale),), cls)
            score = (signals.cls if cls else signals.received).mean(1)
            count = max(1, int(score.shape[1] * keep))
            patches = F.top_tokens(score, count, None)
            stays = torch.cat([torch.ones_like(patches[:, :cls]), patches], 1)
            return F.keep_tokens(x, F.compact_tokens(stays, cls + count)), stays, F.compact_tokens(patches, count)

        few, stays, kept = splice(stage, first, shorter, x, *before.args[:4], before.args[6])
        outside = [u for u in out[0].users if u not in inside]
        substitute(stage, x, few, inside, inside)
        with stage.graph.inserting_after(out[0]):
            whole = stage.graph.call_function(F.scatter_tokens.default, (x, out[0], stays))
        whole.meta["val"] = x.meta["val"]
        for reader in outside:
            reroute(reader, out[0], whole)
        stage.add_output(f"kept.vision_layer{layer}", kept)
        sweep(stage)
        retype(stage)
        stage.module.recompile()
