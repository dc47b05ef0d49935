"""DART: keep a few pivots and, for each, the visual tokens that duplicate it least."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..select import Keep, Layer, Select, share

F = torch.ops.foveate


@dataclass(frozen=True)
class DropDart(Select):
    """Keep pivots, the tokens with the largest keys (L1), and per pivot the visual tokens least similar to it; no attention is read.

    rewrite:
        pivots = top(|k|_1 of the layer before, 4 visual) and top(.., 4 of the question)
        for each pivot, in order: the next keep / 8 visual tokens with the lowest cos(norm(h), norm(h[pivot])) among those not yet taken
        i = compact(text or taken);  every value crossing into `layer` is gathered by i

    Wen et al., "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", 2025 (section 4). Defaults: layer 2, 4 +
    4 pivots. mode: fixed keeps exactly `keep`, pivots among them, and visits visual pivots before those of the question, by position; parity keeps
    pivots + 8 floor(keep / 8), as the published code does; that one visits pivots in the order of a Python set, which is ours below position 32.
    """

    name: ClassVar[str] = "drop-dart"
    paper: ClassVar[str] = "arXiv:2502.11494"

    layer: Layer = 2
    keep: Keep = 128
    visual_pivots: int = 4
    text_pivots: int = 4
    mode: Literal["fixed", "parity"] = "fixed"

    def count(self, keep: Keep, visual: Any) -> Any:
        pivots = self.visual_pivots + self.text_pivots
        return share(keep, visual) if self.mode == "fixed" else self.visual_pivots + share(keep, visual) // pivots * pivots

    def score(self, k: Tensor, normed: Tensor, visual: Tensor, valid: Tensor, rows: Tensor, row_weight: Tensor, budget: Tensor) -> Tensor:
        size = k.float().abs().sum((1, 3))  # [B, T]
        free = visual & valid
        asked = row_weight > 0
        seen, loud = _best(size, free, self.visual_pivots)
        spoken, heard = _best(size.gather(1, rows), asked, self.text_pivots)
        pivots, real = torch.cat([seen, rows.gather(1, spoken)], 1), torch.cat([loud, heard], 1)
        here = torch.nn.functional.normalize(normed.float(), dim=-1)
        similar = here @ F.keep_tokens(here, pivots).transpose(1, 2)  # [B, T, pivots]
        rounds = pivots.shape[1]
        taken = torch.zeros_like(free).scatter(1, seen, loud) & free
        order, free = taken.float() * (2 * rounds), free & ~taken
        quota = (budget - taken.sum(1)).clamp(min=0)
        spread = real.sum(1).clamp(min=1)
        for i in range(rounds):
            turn = real[:, :i].sum(1)  # how many pivots came before: the first ones take what does not divide
            take = torch.where(real[:, i], quota // spread + (turn < quota % spread), 0)
            new = F.top_tokens(torch.where(free, -similar[..., i], float("-inf")), free.shape[1], take) & free
            order, free = order + new * (2 * rounds - 1 - i), free & ~new
        return order


def _best(size: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """-> index[B, count] of the largest in each row by position, and which of them there are"""
    chosen = F.top_tokens(torch.where(among, size, float("-inf")), count, among.sum(1))
    return F.compact_tokens(chosen, count), torch.arange(count, device=size.device)[None] < chosen.sum(1, keepdim=True)
