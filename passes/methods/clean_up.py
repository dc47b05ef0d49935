"""Erase what nobody reads and compute equal things once."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from ...graph.program import Program, Stage
from ...graph.stage import sweep
from ..base import Pass


@dataclass(frozen=True)
class CleanUp(Pass):
    """
    rewrite:
        1. y = f(x), z = f(x), f pure  ->  y = z = f(x)
        2. y = f(x), y unread          ->  (nothing)
        3. aten.lift_fresh_copy(x), aten.detach_(x), aten.alias(x)  ->  x
    """

    name: ClassVar[str] = "clean-up"
    may_be_idle: ClassVar[bool] = True

    def run(self, program: Program) -> bool:
        return any([clean(stage) for stage in program.stages.values()])


IDENTITIES = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.detach_.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default)


def clean(stage: Stage) -> bool:
    """Cases 1-3; True if a node went."""
    seen: dict[Any, Node] = {}
    before = len(stage.graph.nodes)
    for node in list(stage.graph.nodes):
        if node.op != "call_function" or "foveate.kv_store" in str(node.target):
            continue
        if node.target in IDENTITIES:  # case 3
            node.replace_all_uses_with(node.args[0])
            continue
        key = _key(node)
        if key in seen:  # case 1
            node.replace_all_uses_with(seen[key])
        else:
            seen[key] = node
    sweep(stage, roles=True)  # case 2
    stage.module.recompile()
    return len(stage.graph.nodes) != before


def _key(node: Node) -> Any:
    def freeze(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(freeze(v) for v in value)
        return (type(value), value) if isinstance(value, (int, float)) else value

    return node.target, freeze(node.args), tuple((k, freeze(v)) for k, v in sorted(node.kwargs.items()))
