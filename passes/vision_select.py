"""VisionSelect: score the patches of every image inside the vision stage and project only the best."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.program import Program, Stage
from ..graph.retype import reroute, retype
from ..graph.splice import splice
from ..graph.stage import sweep
from .base import Pass
from .select import SHARE, Keep

F = torch.ops.foveate
TAPS = ("q", "k", "v", "mask", "scale")


@dataclass(frozen=True)
class VisionSelect(Pass):
    """Keep the best patches of every image between the last vision layer and the projector (W2), in reading order.

    rewrite:
        x[images, n, Dv] -> projector  =>  i = compact(top(score, keep))[images, keep];  keep_tokens(x, i) -> projector

    keep: patches per image (int), or a share in (0, 1], rounded up. The prefill sees a shorter image: its graph does not change, positions are compact.
    A method overrides `score`; the names of its arguments say what it taps: features[images, n, Dv], and of the last vision attention
    q, k, v [images, H, c + n, D], mask, scale, where c = 1 with a CLS token (`cls`).
    """

    keep: Keep

    @abstractmethod
    def score(self, **taps: Any) -> Tensor:
        """-> [images, n], larger is better"""

    def run(self, program: Program) -> bool:
        stage, facts = program["vision"], program.facts
        if facts.vision_grid is None or facts.visual_per_image is None:
            raise self.fail(f"needs images of a fixed grid; {facts.model_type} was captured without one")
        n = facts.vision_grid[0] * facts.vision_grid[1]
        if facts.visual_per_image != n:
            raise self.fail(f"needs one feature per patch; {facts.model_type} makes {facts.visual_per_image} of {n} patches")
        count = self.keep if isinstance(self.keep, int) else -(-n * round(self.keep * SHARE) // SHARE)
        if count > n:
            raise self.fail(f"keep={self.keep} is more than the {n} patches of an image")
        if count == n:
            return False
        features = self._features(stage, n)
        self._cut(program, stage, features, count)
        program.facts = replace(facts, features_per_image=count)
        return True

    def _features(self, stage: Stage, n: int) -> Node:
        """The patches as the projector gets them: the first [images, n, Dv] value behind the last attention."""
        last = self._attention(stage)
        behind = list(stage.graph.nodes)
        for node in behind[behind.index(last) + 1 :]:
            value = node.meta.get("val")
            if isinstance(value, torch.Tensor) and value.dim() == 3 and value.shape[1] == n and not _feeds_attention(node, last):
                return node
        raise self.fail(f"no [images, {n}, D] value behind the last vision attention {last.name}")

    def _attention(self, stage: Stage) -> Node:
        found = [node for node in stage.graph.nodes if node.target is F.attention.default]
        if not found:
            raise self.fail("the vision stage has no foveate.attention node (packed windows are another dialect op)")
        return found[-1]

    def _cut(self, program: Program, stage: Stage, features: Node, count: int) -> None:
        q, k, v, mask, _, _, scale = self._attention(stage).args[:7]
        found = {"features": features, **dict(zip(TAPS, (q, k, v, mask, scale), strict=True))}
        names = list(inspect.signature(self.score).parameters)
        if unknown := [name for name in names if name not in found]:
            raise self.fail(f"score asks for {unknown}; the vision output has the taps {sorted(found)}")

        def select(features: Tensor, *values: Any) -> tuple[Tensor, Tensor]:
            score = self.score(**dict(zip(names, values, strict=True)))
            index = F.compact_tokens(F.top_tokens(score, count, None), count)
            return F.keep_tokens(features, index), index

        readers = list(features.users)
        kept, index = splice(stage, features.next, select, features, *[found[name] for name in names])
        for reader in readers:
            reroute(reader, features, kept)
        stage.add_output("kept.vision", index)
        sweep(stage)
        retype(stage)
        stage.module.recompile()


def _feeds_attention(node: Node, attention: Node) -> bool:
    return node in attention.all_input_nodes
