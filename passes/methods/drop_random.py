"""Random drop: the control that every selector has to beat."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..select import Keep, Layer, Select

MODULUS = 2**31 - 1


@dataclass(frozen=True)
class DropRandom(Select):
    """Keep visual tokens at random: the same ones for the same seed, rank and image count, on every backend and in every batch.

    rewrite:
        i = compact(text or top(hash(visual_index, seed), keep));  every value crossing into `layer` is gathered by i

    The score is integer arithmetic on the token's rank among the visual tokens (two rounds of a Lehmer generator), since a random op would give each
    backend its own picture.
    """

    name: ClassVar[str] = "drop-random"

    layer: Layer = 2
    keep: Keep = 0.5
    seed: int = 0

    def score(self, visual_index: Tensor) -> Tensor:
        x = (visual_index.clamp(min=0) + 1 + (self.seed % 65521) * 65537) % MODULUS
        for multiplier in (48271, 69621):
            x = (x * multiplier + 11) % MODULUS
        return (x % 8388593).float()  # below 2^24, so that float32 holds it exactly
