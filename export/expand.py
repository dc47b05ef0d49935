"""Replace what a target does not know by what it is made of: dialect ops by their bodies, composite aten ops by their decompositions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch._decomp import core_aten_decompositions, decomposition_table
from torch._ops import OpOverload
from torch.fx import Node

from ..graph.ops import REFERENCE
from ..graph.program import Stage
from ..graph.splice import splice
from .errors import LowerError
from .onnx_registry import arguments

ROUNDS = 8  # bodies may use other dialect ops, decompositions other composites


def expand(stage: Stage, known: Collection[Any]) -> Stage:
    """A copy of the stage (over the same parameters) in which every operator is in `known`; the stage itself if nothing had to be done.

    Dialect ops outside `known` become their reference bodies, traced at the node's own shapes; aten ops outside it are decomposed.
    What remains unknown is a LowerError naming operator, node and module.
    """
    if not _unknown(stage, known):
        return stage
    stage = stage.clone()
    for _ in range(ROUNDS):
        unknown = _unknown(stage, known)
        if not unknown:
            stage.graph.eliminate_dead_code()
            stage.module.recompile()
            return stage
        for node in unknown:
            _expand(stage, node)
    raise LowerError(f"expand: {_where(unknown[0])} still has no lowering after {ROUNDS} rounds of expansion")


def _unknown(stage: Stage, known: Collection[Any]) -> list[Node]:
    return [n for n in stage.graph.nodes if n.op == "call_function" and n.target not in known]


def _expand(stage: Stage, node: Node) -> None:
    body = REFERENCE.get(node.target) or _decomposition(node)  # type: ignore[arg-type]
    if body is None:
        raise LowerError(
            f"expand: {_where(node)} has no lowering to ONNX and no decomposition; "
            f"add an emitter for it in export/onnx_math.py or onnx_shape.py"
        )
    given = arguments(node) if node.target in REFERENCE else [*node.args, *node.kwargs.values()]
    count, names = len(node.args), list(node.kwargs)

    def called(*values: Any) -> Any:  # decompositions have keyword-only parameters, bodies have none
        return body(*values) if node.target in REFERENCE else body(*values[:count], **dict(zip(names, values[count:], strict=True)))

    try:
        result = splice(stage, node, called, *given)
    except LowerError:
        raise
    except Exception as cause:
        raise LowerError(
            f"expand: {_where(node)} cannot be expanded at shapes {[_shape(a) for a in node.all_input_nodes]}: {cause}"
        ) from cause
    if isinstance(result, Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # several results: the users are getitem nodes
            user.replace_all_uses_with(result[user.args[1]])
            stage.graph.erase_node(user)
    stage.graph.erase_node(node)


def _decomposition(node: Node) -> Callable[..., Any] | None:
    """torch's own decomposition of an aten operator, as a plain function."""
    target = node.target
    if not isinstance(target, OpOverload):
        return None
    if target in core_aten_decompositions():
        return core_aten_decompositions()[target]
    if target._can_decompose():
        return target.decompose
    return decomposition_table.get(target)


def _shape(node: Node) -> str:
    val = node.meta.get("val")
    return str(tuple(val.shape)) if isinstance(val, torch.Tensor) else str(val)


def _where(node: Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    module = next(reversed(stack.values()))[0] if stack else "no module"
    return f"{node.target} (node {node.name}, in {module})"
