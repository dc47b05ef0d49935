"""Prefusion: the first layers become a fusion module of their own, copied from the model and trained, in front of a stack that never sees the image."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from ...graph.program import Program
from ...graph.retype import retype
from ...graph.sites import layer_of
from ..insert import PREFIX, attribute
from .victor import Victor


@dataclass(frozen=True)
class Prefusion(Victor):
    """Image, registers and text are fused by trained copies of the layers before `layer`; behind it there are registers and text only.

    rewrite:
        victor(registers, layer), and in prefill and decode  @weight of a layer < `layer`  ->  @learned copy of it

    LLaVA-Mini (Zhang et al. 2025) puts four new transformer layers and one compressed token in front of its language model. Its form that needs no
    alignment from nothing: the copies start as the model's own first layers, so that before training this is Victor(layer) exactly, and the rest of
    the model is never touched. Generated tokens go through the copies too, as the cache they read was written by them.
    """

    name: ClassVar[str] = "prefusion"
    paper: ClassVar[str] = "arXiv:2501.03895"

    registers: int = 1
    layer: int = 4

    def run(self, program: Program) -> bool:
        if self.layer < 1:
            raise self.fail("layer=0 leaves no layer to fuse image and text in; it must be at least 1")
        super().run(program)
        copied = 0
        for name in ("prefill", "decode"):
            if name in program.stages:
                copied += self._copy(program, name)
        return bool(copied)

    def _copy(self, program: Program, name: str) -> int:
        stage, pattern = program[name], re.compile(program.facts.layer_path)
        done: dict[str, Node] = {}
        for node in list(stage.graph.nodes):
            path = str(node.target)
            if node.op != "get_attr" or path.startswith(PREFIX) or not attribute(stage, path).is_floating_point():
                continue
            inside = [u for u in node.users if (layer := layer_of(u, pattern)) is not None and layer < self.layer]
            if not inside:
                continue
            if path not in done:
                weight = attribute(stage, path)
                done[path] = self.learn(program, name, node.next, path, lambda w=weight: w.detach().float().clone())
            else:
                done[path] = self._read(program, name, node, path)
            for user in inside:
                user.replace_input_with(node, done[path])
                user.meta["stale"] = True
        retype(stage)
        stage.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or "role" in n.meta)
        stage.module.recompile()
        return len(done)

    def _read(self, program: Program, name: str, node: Node, path: str) -> Node:
        """The same copy once more, for another get_attr node of the same weight."""
        stage = program[name]
        with stage.graph.inserting_after(node):
            again = stage.graph.get_attr(f"{PREFIX}{self.name}.{path}")
        again.meta["val"] = node.meta["val"]
        return again
