"""MustDrop's vision stage: windows of patches that look alike become one token each, early in the vision tower."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor

from ...graph.program import Program
from ...graph.splice import splice
from ..base import Pass
from ..select import SHARE, Keep
from ..vision_layers import entry, finish, substitute, tower
from ..vision_select import Mode

F = torch.ops.foveate


@dataclass(frozen=True)
class MergeMustDrop(Pass):
    """
    rewrite, at the entry of vision layer `layer`:
        s[images, W] = mean cosine of two different patches of a window x window block;  the r blocks of largest s become their mean
        x[images, T, D]  ->  [CLS | means | the other patches],  r = (n - keep) // (window^2 - 1)

    Liu et al., "Multi-Stage Vision Token Dropping", 2024 (section 3.2): after layer 0, windows of 3. Patches beyond the last whole window stay.
    The published r is how many blocks reach 0.8, the smallest of the batch; a compiled prompt wants a number: it follows from `keep`.
    fixed: tokens leave the tower in reading order, a mean in the place of its block's middle patch. parity: means first, most alike first.
    """

    name: ClassVar[str] = "merge-must-drop"
    paper: ClassVar[str] = "arXiv:2411.10803"
    place: ClassVar[str] = "tower"
    shapes: ClassVar[str] = "fixed"

    keep: Keep = 0.5
    window: Annotated[int, Ge(2)] = 3
    layer: Annotated[int, Ge(1)] = 1
    mode: Mode = "fixed"

    def run(self, program: Program) -> bool:
        stage, cls, (_, features) = program["vision"], int(program.facts.has_cls), tower(program, self.fail)
        first, x = entry(program, self.layer, self.fail)
        rows, columns = program.facts.vision_grid or (0, 0)  # tower() refused a program without a grid
        blocks, n = (rows // self.window) * (columns // self.window), rows * columns
        keep = self.keep if isinstance(self.keep, int) else -(-n * round(self.keep * SHARE) // SHARE)
        r = (n - keep) // (self.window**2 - 1)
        if r > blocks:
            raise self.fail(f"keep={self.keep} asks for {r} merged windows, and {rows} x {columns} patches have {blocks} of {self.window} x {self.window}")
        if r < 1:
            return False
        readers = list(x.users)
        new, place = splice(stage, first, lambda x: self.merged(x, cls, columns, blocks, r), x)
        substitute(stage, x, new, readers)
        finish(program, features, place, self.mode == "fixed")
        return True

    def merged(self, x: Tensor, cls: int, columns: int, blocks: int, r: int) -> tuple[Tensor, Tensor]:
        """x[I, T, D] -> x[I, T - r (window^2 - 1), D], place[I, ...]: the patch that each token behind the CLS stands for"""
        w, wide = self.window, columns // self.window
        corner = [b // wide * w * columns + b % wide * w for b in range(blocks)]
        inside = torch.tensor([[c + i * columns + j for i in range(w) for j in range(w)] for c in corner], device=x.device)  # [W, w w]
        patches = x[:, cls:]
        unit = torch.nn.functional.normalize(patches.float(), dim=-1)
        member = (inside[:, :, None] == torch.arange(patches.shape[1], device=x.device)).any(1).to(x.dtype)  # [W, n]
        alike = (member.float() @ unit).square().sum(-1)  # = window^2 + the sum over pairs: falls and rises with the mean cosine
        best = alike.sort(dim=1, descending=True, stable=True).indices[:, :r]
        taken = member[best.flatten()].unflatten(0, best.shape)  # [I, r, n]
        others = F.compact_tokens(taken.sum(1) == 0, patches.shape[1] - r * w * w)
        means = F.merge_tokens(patches, taken / (w * w))
        middle = inside[:, w * w // 2][best.flatten()].unflatten(0, best.shape)
        return torch.cat([x[:, :cls], means, F.keep_tokens(patches, others)], 1), torch.cat([middle, others], 1)
