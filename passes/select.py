"""Select: one cut. Staged: several, each keeping a share of what the prompt had."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .reduce import SHARE, Keep, Layer, Reduce, share
from .taps import last_valid


@dataclass(frozen=True)
class Select(Reduce):
    """Keep the best visual tokens of every sample from the entry of `layer` on; text stays, order and positions stay, KV is entry(layer).

    rewrite:
        h[B, T, D], masks, cos, sin, ...  ->  i = compact(text or top(score, keep))[B, T - n + keep], and each of them gathered by i

    keep: visual tokens per sample (int), or a share of the sample's visual tokens in (0, 1], to a thousandth, rounded up.
    per_image: the budget is split evenly over the sample's images; each keeps its best.
    A method overrides `score`; the names of its arguments say what it taps. A sample with fewer visual tokens keeps them all.
    """

    layer: Layer
    keep: Keep
    per_image: bool = False

    def schedule(self) -> tuple[tuple[int, Keep], ...]:
        return ((self.layer, self.keep),)


@dataclass(frozen=True)
class Staged(Reduce):
    """The same at the entry of each of `layers`, where `keeps` of the visual tokens stay.

    keeps: one per layer, tokens per sample or shares of the visual tokens in the PROMPT; they must not grow from stage to stage.
    """

    of_prompt: ClassVar[bool] = True

    layers: tuple[Layer, ...]
    keeps: tuple[Keep, ...]

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.keeps) or not self.layers:
            raise self.fail(f"layers and keeps go together; there are {len(self.layers)} layers and {len(self.keeps)} keeps")
        if list(self.layers) != sorted(set(self.layers)):
            raise self.fail(f"layers must ascend, got {list(self.layers)}")
        for a, b in zip(self.keeps, self.keeps[1:], strict=False):
            if isinstance(a, int) == isinstance(b, int) and b > a:
                raise self.fail(f"keeps must not grow, got {list(self.keeps)}")

    def schedule(self) -> tuple[tuple[int, Keep], ...]:
        return tuple(zip(self.layers, self.keeps, strict=True))


__all__ = ["SHARE", "Keep", "Layer", "Select", "Staged", "last_valid", "share"]
