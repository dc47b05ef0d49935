"""Re-derive every node's `meta["val"]` after an edit: shapes are computed from the graph, never patched by hand."""

from typing import Any

import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from .errors import GraphError
from .program import Stage


def fake_mode(stage: Stage) -> FakeTensorMode:
    """The mode that the stage's own placeholders live in (its symbols are the program's symbols)."""
    return _given(stage).fake_mode


def new_value(stage: Stage, shape: Any, dtype: torch.dtype) -> torch.Tensor:
    """The type of a new input, on the device that the stage was captured on."""
    like = _given(stage)
    with like.fake_mode:
        return torch.empty(tuple(shape), dtype=dtype, device=like.device)


def _given(stage: Stage) -> FakeTensor:
    for node in stage.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), FakeTensor):
            return node.meta["val"]
    raise GraphError("retype: no placeholder carries a fake tensor; was this stage captured?")


def retype(stage: Stage) -> int:
    """Recompute new nodes, readers that were given another input, and all downstream whose type changed; returns how many were recomputed.

    A node that cannot be computed (shapes disagree after a rewrite) is a GraphError naming node, target and cause.
    """
    mode = fake_mode(stage)
    dirty: set[Node] = set()
    known: dict[Any, Any] = {}  # layers repeat: one computation per kind of node
    count = 0
    for node in stage.graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = mode.from_tensor(_attribute(stage, str(node.target)), static_shapes=True)
        fresh = "val" in node.meta and not node.meta.pop("stale", False)
        if node.op != "call_function" or (fresh and dirty.isdisjoint(node.all_input_nodes)):
            continue
        count += 1
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        value = known[key] if key in known else known.setdefault(key, _compute(node, mode))
        if "val" not in node.meta or _type(node.meta["val"]) != _type(value):
            dirty.add(node)
        node.meta["val"] = value
    return count


def new_size(stage: Stage, name: str, example: int) -> Any:
    """A SymInt that no input has yet, for an axis of a new input; `example` should be no size of the model."""
    source, dynamic = ConstantSource(name), StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
    return fake_mode(stage).from_tensor(torch.zeros(example), symbolic_context=dynamic, source=source).shape[0]


def reroute(reader: Node, old: Node, new: Any) -> None:
    """Let `reader` read `new` where it read `old`; the next `retype` looks at it again."""
    reader.args, reader.kwargs = torch.fx.node.map_arg((reader.args, reader.kwargs), lambda n: new if n is old else n)
    reader.meta["stale"] = True


def _compute(node: Node, mode: FakeTensorMode) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    try:
        with mode, torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as cause:
        shapes = [str(tuple(a.meta["val"].shape)) if isinstance(a.meta["val"], torch.Tensor) else str(a.meta["val"]) for a in node.all_input_nodes]
        raise GraphError(f"retype: {node.format_node()} does not fit its inputs {shapes}: {cause}") from cause


def _type(value: Any) -> Any:
    """What readers can tell of a value: sizes as expressions, layout, dtype, device."""
    if isinstance(value, torch.Tensor):
        return tuple(map(_size, value.shape)), tuple(map(_size, value.stride())), _size(value.storage_offset()), value.dtype, value.device
    if isinstance(value, (tuple, list)):
        return tuple(_type(v) for v in value)
    return _size(value)


def _size(value: Any) -> Any:
    if not isinstance(value, torch.SymInt):
        return type(value), value
    expr = value.node.expr
    return (int, int(expr)) if expr.is_Integer else (torch.SymInt, expr)  # sympy cannot compare an expression with a pair


def _frozen(value: Any) -> Any:
    """Arguments of a node as a key: other nodes by the type of their value."""
    if isinstance(value, Node):
        return Node, _type(value.meta["val"])
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in sorted(value.items()))
    return (type(value), value)


def _attribute(stage: Stage, path: str) -> torch.Tensor:
    value: Any = stage.module
    for part in path.split("."):
        value = getattr(value, part)
    return value
