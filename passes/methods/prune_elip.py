"""ELIP: inside the vision tower, keep what a CLS token that knows the question will attend to a few layers on."""

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.fx import Node

from ...graph.program import Program, Stage
from ...graph.retype import retype
from ...graph.sites import layer_of
from ...graph.splice import splice
from ..base import Pass
from ..vision_layers import attention_in, entry, finish, substitute, tower
from ..vision_place import external

F = torch.ops.foveate


@dataclass(frozen=True)
class PruneElip(Pass):
    """
    rewrite, at the entry of every vision layer l of `layers`:
        x' = x with CLS' = own CLS + (1 - own) text, through the next `ahead` layers;  a = mean_h attention of its CLS in the last of them
        x[images, T, D]  ->  [CLS | top(a, floor(n keep)) of x in order | sum of a_j x_j over the others, a scaled to sum 1]

    Guo et al., "ELIP: Efficient Language-Image Pre-training with Fewer Vision Tokens" (2023): ViT-B layers 2, 4, 10, ahead 2, 6, 2, keep 0.9, 0.65,
    0.4. The text vector is an input of the vision stage, text[images, Dv], in the space of the vision tower (the paper: a jointly trained text
    encoder). The looking ahead runs those layers twice; the gain is in the language model, not in the tower.
    One mode: the same rows as the published code, given the same text vector.
    """

    name: ClassVar[str] = "prune-elip"
    paper: ClassVar[str] = "arXiv:2309.16738"
    place: ClassVar[str] = "tower"
    shapes: ClassVar[str] = "fixed"

    layers: tuple[int, ...] = (2, 4, 10)
    ahead: tuple[int, ...] = (2, 6, 2)
    keep: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = (0.9, 0.65, 0.4)
    own: Annotated[float, Field(ge=0, le=1)] = 0.8

    def run(self, program: Program) -> bool:
        stage, facts, (found, features) = program["vision"], program.facts, tower(program, self.fail)
        if not facts.has_cls:
            raise self.fail(f"needs a vision tower with a CLS token; that of {facts.model_type} has none")
        if not len(self.layers) == len(self.ahead) == len(self.keep):
            long = f"{len(self.layers)}, {len(self.ahead)} and {len(self.keep)} long"
            raise self.fail(f"layers, ahead and keep belong together, and they are {long}")
        if far := [a + b - 1 for a, b in zip(self.layers, self.ahead, strict=True) if a + b - 1 > max(found)]:
            raise self.fail(f"looks ahead to vision layer {far[0]}; the features come from layers {min(found)}..{max(found)}")
        place = None
        for layer, ahead, keep in zip(self.layers, self.ahead, self.keep, strict=True):
            first, x = entry(program, layer, self.fail)
            images, _, width = x.meta["val"].shape
            text, readers = external(program, "text", images, width, x.meta["val"].dtype), list(x.users)
            seen = splice(stage, first, lambda x, t: torch.cat([self.own * x[:, :1] + (1 - self.own) * t[:, None], x[:, 1:]], 1), x, text)
            q, k, scale = look_ahead(stage, program, layer, layer + ahead - 1, x, seen, first, self)
            count = int(facts.visual_per_image * keep)

            def fewer(x: Tensor, q: Tensor, k: Tensor, *before: Tensor, count: int = count, scale: float = scale) -> tuple[Tensor, Tensor]:
                cls = torch.zeros_like(q[:, 0, :1, 0], dtype=torch.int64)
                a = F.attention_rows(q, k, None, cls, scale, False, 0.0)[:, :, 0, 1:].mean(1)
                return self.reduced(x, a, before[0] if before else torch.arange(a.shape[1], device=a.device)[None].expand(a.shape[0], -1), count)

            new, place = splice(stage, first, fewer, x, q, k, *([place] if place is not None else []))
            substitute(stage, x, new, readers)
            retype(stage)
        if place is None:
            return False
        finish(program, features, place)
        return True

    @staticmethod
    def reduced(x: Tensor, a: Tensor, place: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """x[I, 1 + m, D], a, place[I, m] -> x[I, 2 + count, D], place[I, 1 + count] with -1 for the summary"""
        stays = F.top_tokens(a, count, None)
        index = F.compact_tokens(stays, count)
        weight = torch.where(stays, 0.0, a)
        weight = torch.nn.functional.pad(weight / (weight.sum(1, keepdim=True) + 1e-6), (1, 0))
        x = torch.cat([x[:, :1], F.keep_tokens(x, index + 1), F.merge_tokens(x, weight[:, None])], 1)
        return x, torch.nn.functional.pad(place.gather(1, index), (0, 1), value=-1)


def look_ahead(stage: Stage, program: Program, start: int, end: int, x: Node, seen: Node, before: Node, method: Pass) -> tuple[Node, Node, float]:
    """Copy layers start..end as far as the attention of `end`, reading `seen` for `x`; returns its q, k, scale."""
    last = attention_in(program, end, method.fail)
    if last.args[3] is not None:
        raise method.fail(f"vision layer {end} has a mask")
    image, pattern = {x: seen}, re.compile(program.facts.vision_layer_path)
    inside = [n for n in stage.graph.nodes if n.op == "call_function" and start <= (-1 if (l := layer_of(n, pattern)) is None else l) <= end]
    with stage.graph.inserting_before(before):
        for node in inside[: inside.index(last)]:
            image[node] = stage.graph.node_copy(node, lambda n: image.get(n, n))
            image[node].meta = {"val": node.meta["val"]}
    return image[last.args[0]], image[last.args[1]], last.args[6]
