"""Exit router: at each of a few layers a small trained network says whether this sample still needs its image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional

from ...graph.errors import GraphError
from ...graph.program import Program
from ...graph.sites import role, site
from ...graph.splice import splice
from ..cut import cut, require_visual
from ..insert import Insertion
from ..reduce import Layer, last_valid

F = torch.ops.foveate


def seen(hidden: Tensor, visual: Tensor, valid: Tensor) -> Tensor:
    """hidden[B, T, D]  ->  f[B, 2 D]: the mean of the text rows behind the image but the last, and the last row, each of unit mean square"""
    at = torch.arange(valid.shape[1], device=valid.device)[None]
    end = torch.where(visual & valid, at, -1).amax(1, keepdim=True)
    last = last_valid(valid)
    asked = (valid & ~visual & (at > end) & (at < last)).to(hidden.dtype)
    mean = (hidden * asked[..., None]).sum(1) / asked.sum(1, keepdim=True).clamp(min=1)
    final = F.keep_tokens(hidden, last).squeeze(1)
    return torch.cat([x * x.square().mean(1, keepdim=True).add(1e-6).rsqrt() for x in (mean, final)], 1)


def rate(f: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    """f[B, 2 D]  ->  score[B]; above 0 the image may leave"""
    return functional.linear(functional.gelu(functional.linear(f, first)), second).squeeze(1) + bias


@dataclass(frozen=True)
class ExitRouter(Insertion):
    """At the entry of each of `layers`, the visual tokens of the samples whose router says so leave, for good.

    rewrite:
        s[B] = router(mean question row, last row);  keep = text or s <= threshold;  every value crossing into the layer is gathered by compact(keep)

    DyVTE (Wu et al. 2024), with original positions and entry(layer) KV. Whether a sample exits is in the data: the prefill keeps its length, padded
    behind the tokens that stay, and the cache, the decode steps and `kept.layer<l>` are of the tokens that stayed; `exit.<l>` returns the scores, by
    which a runtime may choose a shorter engine beforehand. Before training the bias of -4 lets no sample exit. Trained by its own objective: does the
    answer stay the same without the image from this layer on?
    """

    name: ClassVar[str] = "exit-router"
    paper: ClassVar[str] = "arXiv:2411.19628"
    objective: ClassVar[str] = "exit"

    layers: tuple[Layer, ...] = (2, 4, 6)
    hidden: Annotated[int, Ge(1)] = 64
    threshold: float = 0.0

    def run(self, program: Program) -> bool:
        for layer in sorted(set(self.layers)):
            try:
                where = site(program, layer)
            except GraphError as cause:
                raise self.fail(str(cause)) from cause
            stage, width = program["prefill"], program.facts.hidden_size
            first = self.learn(program, "prefill", where.first, f"layer{layer}.first", lambda w=width, l=layer: self.noise(
                f"layer{l}.first", self.hidden, 2 * w, std=(2 * w) ** -0.5))
            second = self.learn(program, "prefill", where.first, f"layer{layer}.second", lambda l=layer: self.noise(
                f"layer{l}.second", 1, self.hidden, std=0.1 * self.hidden**-0.5))
            bias = self.learn(program, "prefill", where.first, f"layer{layer}.bias", lambda: torch.full((1,), -4.0))
            roles = [role(program, name, where.first) for name in ("visual", "valid")]

            def decide(h: Tensor, a: Tensor, b: Tensor, c: Tensor, visual: Tensor, valid: Tensor, features: Tensor) -> tuple[Tensor, Tensor, int, int]:
                score = rate(seen(h, visual, valid), a, b, c)
                at = torch.arange(valid.shape[1], device=valid.device)[None]
                keep = valid & (~visual | (score <= self.threshold)[:, None] | (at == last_valid(valid)))
                return keep, score, h.shape[1], features.shape[1]

            features = stage.placeholder(program.facts.features[0])
            keep, score, length, count = splice(stage, where.first, decide, where.hidden, first, second, bias, *roles, features)
            stage.add_output(f"exit.{layer}", score)
            cut(program, where, keep, length, count)
            require_visual(program, 1)
        return bool(self.layers)
