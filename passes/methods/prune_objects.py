"""Object-guided sampling: patches on objects enter the vision tower, with a few others for context."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor

from ...graph.program import Program
from ...graph.splice import splice
from ..base import Pass
from ..vision_layers import entry, finish, substitute, tower
from ..vision_place import external
from ..vision_plan import best
from ..vision_signals import evenly

F = torch.ops.foveate


@dataclass(frozen=True)
class PruneObjects(Pass):
    """
    rewrite, at the entry of vision layer `layer` (positions are in the tokens already):
        i = top(saliency, floor(objects n)) and floor(context n) of the others;  keep_tokens(tokens, CLS and i)

    Zhou et al., "How can objects help action recognition?" (CVPR 2023), the sampling part: 30% on objects, 10% context. The saliency map is an input
    of the vision stage, saliency[images, n], larger = on an object (the paper: heat maps of detected boxes, averaged per patch).
    Difference: the published context is drawn at random; here it is evenly spaced among the other patches, equal on every backend.
    One mode: a random draw cannot be reproduced; see the difference above.
    """

    name: ClassVar[str] = "prune-objects"
    paper: ClassVar[str] = "arXiv:2306.11726"
    place: ClassVar[str] = "tower"
    shapes: ClassVar[str] = "fixed"

    objects: Annotated[float, Field(gt=0, le=1)] = 0.3
    context: Annotated[float, Field(ge=0, lt=1)] = 0.1
    layer: Annotated[int, Ge(0)] = 0

    def run(self, program: Program) -> bool:
        stage, facts, (_, features) = program["vision"], program.facts, tower(program, self.fail)
        first, x = entry(program, self.layer, self.fail)
        images, total, _ = x.meta["val"].shape
        cls, n = int(facts.has_cls), total - int(facts.has_cls)
        if self.count(n) >= n:
            return False
        saliency, readers = external(program, "saliency", images, n, torch.float32), list(x.users)

        def enter(x: Tensor, saliency: Tensor) -> tuple[Tensor, Tensor]:
            index = self.choose(saliency)
            place = torch.cat([torch.zeros_like(index[:, :cls]), index + cls], 1)
            return F.keep_tokens(x, place), index

        new, index = splice(stage, first, enter, x, saliency)
        substitute(stage, x, new, readers)
        finish(program, features, index, order=False)
        return True

    def count(self, n: int) -> int:
        return int(n * self.objects) + int(n * self.context)

    def choose(self, saliency: Tensor) -> Tensor:
        """saliency[I, n] -> index[I, count], ascending"""
        n = saliency.shape[1]
        salient = F.top_tokens(saliency, int(n * self.objects), None)
        return best((salient | evenly(int(n * self.context), ~salient)).float(), self.count(n))
