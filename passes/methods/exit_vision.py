"""Exit: from one layer on there are no visual tokens at all."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...graph.program import Program
from ..reduce import Keep, Layer, Reduce


@dataclass(frozen=True)
class ExitVision(Reduce):
    """Drop all visual tokens at the entry of `layer`: what they know has reached the text by then.

    rewrite:
        h[B, T, D], masks, cos, sin, ...  ->  i = compact(text)[B, T - n + 1], and each of them gathered by i

    DyVTE (Wu et al., "Accelerating Multimodal Large Language Models via Dynamic Visual-Token Exit", 2024) trains a router per layer to say when. Here
    the layer is fixed, and `passes.exit_layers` finds it from unlabeled prompts; the default is two thirds of a 24-layer decoder; `passes.segments`
    lets a host decide per prompt. Original positions and entry(layer) KV, as in the published code. One row is left over for a prompt that ends with
    an image.
    One mode: with the layer given, both drop the same tokens; the trained routers are not here.
    """

    name: ClassVar[str] = "exit-vision"
    paper: ClassVar[str] = "arXiv:2411.19628"
    exact: ClassVar[bool] = False  # one row stays where a prompt ends with an image

    layer: Layer | Literal["auto"] = 16

    def run(self, program: Program) -> bool:
        if self.layer == "auto":
            raise self.fail("layer: auto is a question to data: `foveate exits MODEL --data FOLDER` (or passes.exit_layers) measures it and names the layer")
        return super().run(program)

    def schedule(self) -> tuple[tuple[int, Keep], ...]:
        return ((self.layer, 1),)

    def score(self, valid: Tensor) -> Tensor:
        return torch.zeros_like(valid, dtype=torch.float32)

    def limit(self, visual: Tensor, valid: Tensor) -> Tensor:
        at = torch.arange(valid.shape[1], device=valid.device)[None]
        return (visual & valid & (at == torch.where(valid, at, 0).amax(1, keepdim=True))).sum(1)
