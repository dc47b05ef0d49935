"""ToMe: merge the r most similar pairs of tokens in every layer of the vision tower."""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from pydantic import Field
from torch import Tensor

from ...graph.program import Program
from ...graph.retype import retype
from ...graph.splice import splice
from ..base import Pass
from ..vision_layers import attention_in, finish, residual_after, substitute, tower
from ..vision_select import Mode
from ..vision_signals import cosine

F = torch.ops.foveate


def log_sizes(q: Tensor, size: Tensor) -> Tensor:
    """q[I, H, T, D], size[I, T] -> mask[I, 1, T, T]"""
    return size.log()[:, None, None].expand(-1, 1, q.shape[2], -1)


@dataclass(frozen=True)
class MergeToMe(Pass):
    """
    rewrite, in every vision layer l, between attention and MLP:
        a = tokens at even places (CLS among them, immune), b = those at odd ones;  each a has its nearest b (cosine of the mean key)
        x[images, T, D]  ->  [a without its r closest | b, each with its a's merged in, weighted by how many patches each stands for]

    Bolya et al., "Token Merging: Your ViT But Faster" (ICLR 2023). r per layer, the same in all (inflect 0), falling (-1) or rising (1) over depth;
    at most half of the tokens. proportional: attention logits get + log(patches a token stands for), as for trained models.
    fixed: tokens leave the tower in the order of the patches they stand for. parity: in the order of the merging.
    """

    name: ClassVar[str] = "merge-tome"
    paper: ClassVar[str] = "arXiv:2210.09461"
    place: ClassVar[str] = "tower"
    shapes: ClassVar[str] = "fixed"

    r: Annotated[int, Ge(1)] = 16
    inflect: Annotated[float, Field(ge=-1, le=1)] = 0.0
    proportional: bool = True
    mode: Mode = "fixed"

    def run(self, program: Program) -> bool:
        stage, cls, (found, features) = program["vision"], int(program.facts.has_cls), tower(program, self.fail)
        if any(attention_in(program, layer, self.fail).args[3] is not None for layer in found):
            raise self.fail("the vision layers have masks already")
        state: tuple[Any, Any] | None = None
        for layer, r in zip(found, self.schedule(len(found)), strict=True):
            attention = attention_in(program, layer, self.fail)
            if state and self.proportional:
                attention.update_arg(3, splice(stage, attention, log_sizes, attention.args[0], state[0]))
            x = residual_after(stage, attention, self.fail)
            r = min(r, (x.meta["val"].shape[1] - cls) // 2)
            if r == 0:
                continue

            def merge(x: Tensor, k: Tensor, *given: Tensor, r: int = r) -> tuple[Tensor, ...]:
                size, place = given or (torch.ones_like(x[..., 0]), torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1) - cls)
                return self.merged(x, k.mean(1), size, place, r, cls)

            readers = list(x.users)
            new, *made = splice(stage, x.next, merge, x, attention.args[1], *(state or ()))
            substitute(stage, x, new, readers)
            retype(stage)
            state = (made[0], made[1])
        if state is None:
            return False
        finish(program, features, splice(stage, state[1].next, lambda place: place[:, cls:].contiguous(), state[1]), self.mode == "fixed")
        return True

    def schedule(self, layers: int) -> list[int]:
        """r per layer"""
        first = int(self.r * (1 - self.inflect))
        return [int(first + 2 * (self.r - first) * i / max(layers - 1, 1)) for i in range(layers)]

    @staticmethod
    def merged(x: Tensor, metric: Tensor, size: Tensor, place: Tensor, r: int, cls: int) -> tuple[Tensor, Tensor, Tensor]:
        """x[I, T, D], metric[I, T, d], size, place[I, T] -> the same with r tokens fewer, metric gone"""
        like = cosine(metric[:, ::2], metric[:, 1::2])
        if cls:
            like = torch.cat([torch.full_like(like[:, :1], float("-inf")), like[:, 1:]], 1)
        nearest = like.max(-1)
        edges = nearest.values.sort(dim=1, descending=True, stable=True).indices
        stay, go = edges[:, r:].sort(dim=1).values, edges[:, :r]
        to = (nearest.indices.gather(1, go)[:, None] == torch.arange(like.shape[2], device=x.device)[:, None]).to(x.dtype)  # [I, b, r]
        size_a, size_b = size[:, ::2], size[:, 1::2]
        moved = size_a.gather(1, go)
        total = size_b + (to @ moved[..., None]).squeeze(-1)
        into = (x[:, 1::2] * size_b[..., None] + F.merge_tokens(F.keep_tokens(x[:, ::2], go), to * moved[:, None])) / total[..., None]
        return (torch.cat([F.keep_tokens(x[:, ::2], stay), into], 1), torch.cat([size_a.gather(1, stay), total], 1),
                torch.cat([place[:, ::2].gather(1, stay), place[:, 1::2]], 1))
