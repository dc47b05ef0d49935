"""Which function writes which operator: `@emits(aten.mul.Tensor)` over a function of (builder, fx node, *arguments in schema order)."""

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node

from .onnx_builder import Emitter

EMITTERS: dict[Any, Emitter] = {}


def emits(*targets: Any) -> Callable[[Emitter], Emitter]:
    def register(emitter: Emitter) -> Emitter:
        for target in targets:
            EMITTERS[target] = emitter
        return emitter

    return register


def arguments(node: Node) -> list[Any]:
    """The node's arguments in schema order, defaults filled in; python operators have theirs as written."""
    if not isinstance(node.target, OpOverload):
        return [*node.args, *node.kwargs.values()]
    bound = list(node.args)
    for argument in node.target._schema.arguments[len(bound) :]:
        bound.append(node.kwargs.get(argument.name, argument.default_value))
    return bound


def dtype(node: Any) -> torch.dtype:
    return node.meta["val"].dtype


def rank(node: Node) -> int:
    return node.meta["val"].dim()
