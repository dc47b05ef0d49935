"""Low-rank adapters on the language model's linear layers, everywhere (and then merged) or for registers only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from annotated_types import Ge
from torch import Tensor
from torch.fx import Node

from ...graph.program import Program
from ...graph.retype import retype
from ...graph.sites import layer_of, layers, role
from ...graph.splice import splice
from ..insert import Insertion, attribute
from ..registers import is_register

LINEAR = torch.ops.aten.linear.default


@dataclass(frozen=True)
class Lora(Insertion):
    """Every chosen weight W gets a trained difference of rank r; it starts at zero, so nothing changes before training.

    rewrite:
        rows = all        linear(x, W)  ->  linear(x, W + B A)             in prefill and decode; folded into one weight once trained
        rows = registers  linear(x, W)  ->  linear(x, W) + [row is a register] B A x     in prefill only: text and image see the old weights

    Hu et al., "LoRA" (2021). The usual factor alpha / r is part of B here. `targets`: the ends of module names, all linear layers when empty;
    `layers`: the first and one past the last layer. `rows: registers` needs registers, so it stands behind `victor` in a recipe.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv:2106.09685"

    rank: Annotated[int, Ge(1)] = 16
    targets: tuple[str, ...] = ()
    layers: tuple[int, int] | None = None
    rows: Literal["all", "registers"] = "all"

    def run(self, program: Program) -> bool:
        stages = [s for s in ("prefill", "decode") if s in program.stages and (self.rows == "all" or s == "prefill")]
        chosen = {stage: self._linears(program, stage) for stage in stages}
        if not chosen["prefill"]:
            known = sorted({str(n.args[1].target).removesuffix(".weight").rsplit(".", 1)[-1] for n in program["prefill"].graph.nodes
                            if n.target is LINEAR and isinstance(n.args[1], Node) and n.args[1].op == "get_attr"})
            raise self.fail(f"no linear layer ends with one of {list(self.targets)} in layers {self.layers or 'all'}; there are {known}")
        for stage in stages:
            for node, path in chosen[stage]:
                self._adapt(program, stage, node, path)
            retype(program[stage])
            program[stage].module.recompile()
        return True

    def _linears(self, program: Program, name: str) -> list[tuple[Node, str]]:
        """The linear nodes of the chosen layers with the path of their module; a weight counts once per stage and node."""
        stage, pattern = program[name], re.compile(program.facts.layer_path)
        low, high = self.layers or (0, 1 << 30)
        found = []
        for node in stage.graph.nodes:
            layer = layer_of(node, pattern) if node.target is LINEAR else None
            if layer is None or not low <= layer < high or not isinstance(node.args[1], Node) or node.args[1].op != "get_attr":
                continue
            path = str(node.args[1].target).removesuffix(".weight")
            if not self.targets or any(path.endswith(t) for t in self.targets):
                found.append((node, path))
        return found

    def _adapt(self, program: Program, name: str, node: Node, path: str) -> None:
        stage = program[name]
        weight = node.args[1]
        out, inner = attribute(stage, str(weight.target)).shape
        rank = min(self.rank, out, inner)
        a = self.learn(program, name, node, f"{path}.a", lambda: self.noise(f"{path}.a", rank, inner, std=inner**-0.5))
        b = self.learn(program, name, node, f"{path}.b", lambda: torch.zeros(out, rank))
        if self.rows == "all":
            node.args = (node.args[0], splice(stage, node, lambda w, x, y: w + y @ x, weight, a, b), *node.args[2:])
            node.meta["stale"] = True
            return
        first = layers(stage, program.facts.layer_path)[layer_of(node, re.compile(program.facts.layer_path))]
        roles = [role(program, r, first) for r in ("visual_index", "visual")]
        after = node.next
        side = splice(stage, after, _side, node, node.args[0], a, b, *roles, like=node)
        for user in list(node.users):
            if user not in side.all_input_nodes and user is not side:
                user.replace_input_with(node, side)
                user.meta["stale"] = True


def _side(y: Tensor, x: Tensor, a: Tensor, b: Tensor, visual_index: Tensor, visual: Tensor) -> Tensor:
    change = torch.nn.functional.linear(torch.nn.functional.linear(x, a), b)
    return y + torch.where(is_register(visual_index, visual)[..., None], change, 0)
