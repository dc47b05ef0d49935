"""An FX graph over aten and the dialect as JSON, and back: how the eager backend stores graphs without pickle.

Only operators of torch.ops.aten and torch.ops.foveate and plain size arithmetic can be named, so a stored graph can compute and
nothing else.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, GraphModule, Node

from ..graph import ops  # noqa: F401  (registers the dialect)
from ..graph.program import Stage
from .errors import LowerError

NAMESPACES = ("aten", "foveate")
PYTHON: dict[str, Callable[..., Any]] = {
    **{
        f"operator.{n}": getattr(operator, n)
        for n in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "getitem", "eq", "ne", "lt", "le", "gt", "ge", "pow")
    },
    **{f"torch.{n}": getattr(torch, n) for n in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not")},
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "math.trunc": math.trunc,
}
NAMES = {function: name for name, function in PYTHON.items()}


def to_json(stage: Stage, keys: Mapping[str, str]) -> dict[str, Any]:
    """keys: get_attr target -> name of the tensor in the weights file."""
    nodes = []
    for node in stage.graph.nodes:
        entry: dict[str, Any] = {"name": node.name, "op": node.op}
        if node.op == "placeholder":
            entry["input"] = node.meta.get("name", node.name)
        elif node.op == "get_attr":
            entry["tensor"] = keys[str(node.target)]
        elif node.op == "call_function":
            entry |= {"target": _target_name(node), "args": _encode(node.args), "kwargs": {k: _encode(v) for k, v in node.kwargs.items()}}
        elif node.op == "output":
            entry["args"] = _encode(list(node.args[0]))
        else:
            raise LowerError(f"fx_json: {node.name} is a {node.op} node, which a stage does not have")
        nodes.append(entry)
    return {"nodes": nodes, "outputs": list(stage.outputs)}


def _target_name(node: Node) -> str:
    if isinstance(node.target, OpOverload):
        name = f"{node.target.namespace}.{node.target._schema.name.split('::')[1]}.{node.target._overloadname}"
        if node.target.namespace in NAMESPACES:
            return name
    elif node.target in NAMES:
        return NAMES[node.target]  # type: ignore[index]
    raise LowerError(f"fx_json: {node.name} calls {node.target}; possible are operators of {NAMESPACES} and {sorted(PYTHON)}")


def _encode(value: Any) -> Any:
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": True}
    if isinstance(value, torch.layout):
        return {"layout": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    raise LowerError(f"fx_json: an argument of type {type(value).__name__} cannot be stored: {value!r}")


def from_json(
    stored: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    device: torch.device,
    replace: Mapping[OpOverload, Callable[..., Any]] | None = None,
) -> tuple[GraphModule, list[str], list[str]]:
    """The graph as a module on `device`, the names of its inputs and outputs. replace: operators to run by another function."""
    graph = Graph()
    made: dict[str, Node] = {}
    attributes: dict[str, Tensor] = {}
    inputs = []
    for entry in stored["nodes"]:
        name = entry["name"]
        if entry["op"] == "placeholder":
            inputs.append(entry["input"])
            made[name] = graph.placeholder(name)
        elif entry["op"] == "get_attr":
            key = entry["tensor"].replace(".", "_")
            attributes[key] = tensors[entry["tensor"]]
            made[name] = graph.create_node("get_attr", key, name=name)
        elif entry["op"] == "call_function":
            target = _target(entry["target"])
            args = _decode(entry["args"], made, device)
            kwargs = {k: _decode(v, made, device) for k, v in entry["kwargs"].items()}
            made[name] = graph.create_node("call_function", (replace or {}).get(target, target), tuple(args), kwargs, name=name)
        else:
            graph.output(tuple(_decode(entry["args"], made, device)))
    return GraphModule(_Holder(attributes), graph), inputs, list(stored["outputs"])


class _Holder(torch.nn.Module):
    """Tensors under flat names."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def _target(name: str) -> Any:
    if name in PYTHON:
        return PYTHON[name]
    namespace, _, rest = name.partition(".")
    operation, _, overload = rest.rpartition(".")
    if namespace not in NAMESPACES:
        raise LowerError(f"fx_json: the graph names {name!r}; possible are operators of {NAMESPACES} and {sorted(PYTHON)}")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), operation), overload or "default")
    except AttributeError as cause:
        raise LowerError(f"fx_json: torch {torch.__version__} has no operator {name!r}") from cause


def _decode(value: Any, made: Mapping[str, Node], device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode(v, made, device) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return made[content]
    if kind == "float":
        return float(content)
    if kind == "device":
        return device
    return getattr(torch, content)  # dtype, layout, memory_format
