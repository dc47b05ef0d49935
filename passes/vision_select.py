"""The vision side: choose or merge the tokens of every image between the vision tower and the language model."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.program import Program, Stage
from ..graph.retype import reroute, retype
from ..graph.splice import splice
from ..graph.stage import sweep
from .base import Pass
from .select import SHARE, Keep
from .vision_place import Place, external, find_place
from .vision_plan import Plan, best, grouped, groups, per_image
from .vision_positions import number
from .vision_signals import EXTERNAL, Attention, Signals

F = torch.ops.foveate
Mode = Literal["fixed", "parity"]


@dataclass(frozen=True)
class VisionReduce(Pass):
    """Bring fewer tokens per image to the language model (W2, or W3 where the projector merges patches or the method reads projected
    tokens).

    rewrite:
        x[images, n, Dv] -> projector  =>  plan.apply(x)[images, keep, Dv] -> projector

    keep: tokens per image (int), or a share in (0, 1], rounded up. The prefill sees a shorter image: its graph does not change. Kept tokens
    stay at their original positions (`vision_positions`); mode parity and `renumber-positions` number them anew, as published code does.
    A method overrides `plan`; `reads` names the signals it wants (see vision_signals). What they cannot be had from is refused by name;
    `text`
    and `saliency` become inputs of the vision stage, listed in facts.vision_extra, so that a runtime supplies or refuses them by name.
    """

    keep: Keep

    place: ClassVar[str] = "vision"
    shapes: ClassVar[str] = "fixed"
    after_projector: ClassVar[bool] = False
    views: ClassVar[bool] = False  # works on the thumbnail and the crops of a picture, where a family packs them into one

    @abstractmethod
    def reads(self) -> list[str]: ...

    @abstractmethod
    def plan(self, count: int, signals: Signals) -> Plan: ...

    @property
    def shared(self) -> int:
        """So many consecutive images (views of a picture, frames of a video) share one budget; `keep` is their mean."""
        return 1

    def run(self, program: Program) -> bool:
        place = find_place(program, self.reads(), self.after_projector or self.shared > 1, self.fail, self.views)
        return self.fitted(program, place)._reduce(program, place)

    def fitted(self, program: Program, place: Place) -> VisionReduce:
        """The method with what a picture's own layout says filled in."""
        if place.packed and self.shared > 1:
            raise self.fail(f"lets {self.shared} images share a budget, and {program.facts.model_type} brings one packed picture at a time")
        return self

    def _reduce(self, program: Program, place: Place) -> bool:
        count = self.budget(place.n, None if place.packed else place.grid)
        if count > place.n:
            raise self.fail(f"keep={self.keep} is more than the {place.n} patches of an image")
        if count == place.n:
            return False
        self.check(program, place, count)
        self._rewrite(program, place, count)
        program.facts = replace(program.facts, features_per_image=count, tokens_per_image=program.facts.tokens_per_image or place.n)
        number(program, original=getattr(self, "mode", "fixed") == "fixed")
        return True

    def budget(self, n: int, grid: tuple[int, int] | None) -> int:
        """How many of n tokens stay."""
        return self.keep if isinstance(self.keep, int) else -(-n * round(self.keep * SHARE) // SHARE)

    def check(self, program: Program, place: Place, count: int) -> None:
        """Refuse what cannot be; by default, several images in one budget where positions are those of the picture."""
        if self.shared > 1 and not place.packed and program.facts.positions.get("kind") == "mrope":
            raise self.fail(f"lets images share a budget, and the positions of {program.facts.model_type} are per image")

    def _rewrite(self, program: Program, place: Place, count: int) -> None:
        stage, names = program["vision"], self.reads()
        before = next(n for n in stage.graph.nodes if n.op == "output") if place.flat else place.nodes[0].next
        extra = [name for name in names if name in EXTERNAL]
        value = place.nodes[0].meta["val"]
        count_of_images = value.shape[0] // place.n if place.flat else value.shape[0]
        inputs = [external(program, name, count_of_images, value.shape[-1] if name == "text" else place.n, value.dtype) for name in extra]
        with_cls = "cls_feature" in names
        if with_cls and place.cls is None:
            raise self.fail("keeps the CLS token, which is not beside the features here")
        operands = [a for node in place.attentions for a in _operands(stage, node, before)]
        shared = 1 if place.packed else self.shared

        def reduce(*values: Any) -> tuple[Tensor, ...]:
            rest = list(values)
            tokens = [rest.pop(0) for _ in place.nodes]
            if place.flat:
                tokens = [x.view(-1, place.n, x.shape[-1]) for x in tokens]
            images = tokens[0].shape[0]
            given = {name: rest.pop(0) for name in extra}
            beside = rest.pop(0)[:, :1] if with_cls else None
            layers = tuple(Attention(*rest[i : i + 5]) for i in range(0, len(rest), 5))
            plan = self.plan(count * shared, Signals(tokens[0], layers, place.skip, place.grid, place.merge, given, beside, place.layout, not self.views))
            if beside is not None:
                tokens = [torch.cat([beside, x], 1) for x in tokens]
            if shared > 1:
                tokens = [grouped(x, shared).flatten(1, 2) for x in tokens]
            fewer = [plan.apply(x) for x in tokens]
            kept = per_image(plan.kept, shared, place.n)
            if place.flat:
                fewer = [x.flatten(0, 1) for x in fewer]
            if shared > 1:  # without the spare group
                whole = groups(images, shared) * shared
                fewer, kept = [x[: whole * count] for x in fewer], kept[:whole]
            return (*fewer, kept)

        wanted = [place.cls] if with_cls else []
        readers = [[before] if place.flat else list(node.users) for node in place.nodes]
        *fewer, kept = splice(stage, before, reduce, *place.nodes, *inputs, *wanted, *operands)
        for old, new, old_readers in zip(place.nodes, fewer, readers, strict=True):
            for reader in old_readers:
                reroute(reader, old, new)
        taken = sum(o.startswith("kept.vision") for o in stage.outputs)
        stage.add_output("kept.vision" if not taken else f"kept.vision.{taken + 1}", kept)
        sweep(stage)
        retype(stage)
        stage.module.recompile()


@dataclass(frozen=True)
class VisionSelect(VisionReduce):
    """Keep the best tokens of every image, in reading order.

    rewrite:
        x[images, n, Dv] -> projector  =>  i = compact(top(score, keep))[images, keep];  keep_tokens(x, i) -> projector

    A method overrides `score` (-> [images, n], larger is better) or `choose` (-> index[images, keep]); the names of the arguments say what
    it reads. In a packed picture, rows that stand for no patch (newlines) go first when attention scores; for other scores they are tokens.
    """

    def score(self, **signals: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} overrides score or choose")

    def choose(self, count: int, **signals: Any) -> Tensor:
        return best(self.score(**signals), count)

    def reads(self) -> list[str]:
        return arguments(self.score if type(self).choose is VisionSelect.choose else self.choose)

    def plan(self, count: int, signals: Signals) -> Plan:
        read = {name: signals.read(name) for name in self.reads()}
        if signals.layout is None or type(self).choose is not VisionSelect.choose:
            return Plan(self.choose(count, **read))
        score = self.score(**read)
        return Plan(best(torch.where(torch.tensor(signals.layout.separators, device=score.device), float("-inf"), score), count))


@dataclass(frozen=True)
class VisionMerge(VisionReduce):
    """Keep some tokens and let the rest flow into them, or into new ones.

    rewrite:
        x[images, n, Dv] -> projector  =>  merge_tokens(x, weight[images, keep, n]) -> projector

    A method overrides `weights` (-> weight[images, keep, n], kept[images, keep] with -1 for rows that stand for no single token).
    """

    @abstractmethod
    def weights(self, count: int, **signals: Any) -> tuple[Tensor, Tensor]: ...

    def reads(self) -> list[str]:
        return arguments(self.weights)

    def plan(self, count: int, signals: Signals) -> Plan:
        weight, kept = self.weights(count, **{name: signals.read(name) for name in self.reads()})
        return Plan(kept, weight)

    def check(self, program: Program, place: Place, count: int) -> None:
        super().check(program, place, count)
        if place.layout is not None and any(place.layout.separators):
            raise self.fail(f"merges tokens, and {program.facts.model_type} lays separators between them")
        if program.facts.positions.get("kind") == "mrope":
            raise self.fail(f"makes tokens that stand for no single patch, and {program.facts.model_type} gives every token the position of its patch")


def arguments(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "count"]


def _operands(stage: Stage, attention: Node, before: Node) -> tuple[Any, ...]:
    """q, k, v, mask, scale; packed segments become a mask, unless there is but one"""
    if attention.target is F.attention.default:
        return (*attention.args[:4], attention.args[6])
    q, k, v, bounds, scale, _ = attention.args
    mask = None if bounds.meta["val"].shape[0] == 2 else splice(stage, before, _segments, q, bounds)
    return q, k, v, mask, scale


def _segments(q: Tensor, bounds: Tensor) -> Tensor:
    """q[1, H, T, D], bounds[segments + 1] -> [1, 1, T, T] bool: in the same segment"""
    segment = (torch.arange(q.shape[2], device=q.device)[:, None] >= bounds[None, 1:]).sum(1)
    return (segment[:, None] == segment[None])[None, None]
