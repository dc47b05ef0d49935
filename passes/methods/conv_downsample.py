"""Convolutional downsampling of the token grid before the projector."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional

from ..insert_vision import Initial, VisionInsertion
from ..vision_place import Place


@dataclass(frozen=True)
class ConvDownsample(VisionInsertion):
    """A strided convolution over the grid of tokens, and residual blocks of depthwise and pointwise convolutions behind it.

    rewrite:
        x[I, n, D] -> projector  =>  c = conv(x as [I, D, rows, columns], stride side);  c = c + linear(gelu(linear(depthwise(c)))) ;  c -> projector

    The last stage of ConvLLaVA (Ge et al. 2024), on the grid of a ViT. The convolution starts as averaging and the blocks' last map as zero: before
    training this is exactly average pooling. Translation equivariant, so it serves any grid that `side` divides.
    """

    name: ClassVar[str] = "conv-downsample"
    paper: ClassVar[str] = "arXiv:2405.15738"

    side: Annotated[int, Ge(2)] = 2
    blocks_behind: Annotated[int, Ge(0)] = 1
    kernel: Annotated[int, Ge(1)] = 3
    expansion: Annotated[int, Ge(1)] = 2

    def count(self, place: Place) -> int:
        if self.kernel % 2 == 0:
            raise self.fail(f"kernel={self.kernel} has no middle; it must be odd")
        return self.blocks(place, self.side)

    def initial(self, place: Place, width: int) -> Initial:
        s, k, wide = self.side, self.kernel, self.expansion * width
        found: Initial = {"down": lambda: torch.eye(width)[:, :, None, None].repeat(1, 1, s, s) / s**2}
        for b in range(self.blocks_behind):
            found[f"depth{b}"] = lambda b=b: self.noise(f"depth{b}", width, 1, k, k, std=1 / k)
            found[f"up{b}"] = lambda b=b: self.noise(f"up{b}", wide, width, std=width**-0.5)
            found[f"back{b}"] = lambda: torch.zeros(width, wide)
        return found

    def map(self, x: Tensor, place: Place, down: Tensor, **more: Tensor) -> Tensor:
        rows, columns = self.grid(place)
        width = x.shape[-1]
        y = functional.conv2d(x.transpose(1, 2).reshape(-1, width, rows, columns), down, stride=self.side)
        for b in range(self.blocks_behind):
            z = functional.conv2d(y, more[f"depth{b}"], padding=self.kernel // 2, groups=width).flatten(2).transpose(1, 2)
            z = functional.linear(functional.gelu(functional.linear(z, more[f"up{b}"])), more[f"back{b}"])
            y = y + z.transpose(1, 2).reshape(-1, width, rows // self.side, columns // self.side)
        return y.flatten(2).transpose(1, 2)
