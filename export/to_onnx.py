"""A stage as one ONNX graph: a direct translation of its FX nodes, no second trace and no pattern search (32 layers take a fraction of
a second)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import onnx
import sympy
import torch
from onnx import ModelProto, helper
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from ..graph.kv_table import past_symbol
from ..graph.program import Stage
from . import onnx_make, onnx_math, onnx_picture, onnx_reduce, onnx_shape  # noqa: F401  (fill the registry)
from .errors import LowerError
from .expand import expand
from .onnx_builder import Builder, Emitter, nodes_within, onnx_type
from .onnx_dialect import PORTABLE
from .onnx_registry import EMITTERS, arguments
from .onnx_weights import WeightFile

OPSET = 23
IR = 11
DIMS = {  # contract input -> names of its dimensions
    "input_ids": ("B", "S"),
    "attention_mask": ("B", "S"),
    "position_ids": ("B", "S"),
    "image_features": ("B", "N", None),
    "context_ids": ("B", "context"),
    "pixel_values": ("I", "C", "Y", "X"),
}


def to_onnx(
    stage: Stage,
    name: str,
    weights: WeightFile | None = None,
    emitters: Mapping[Any, Emitter] | None = None,
    at: Mapping[Node, Emitter] | None = None,
) -> ModelProto:
    """The stage in opset 23, inputs and outputs named as in the contract, symbolic dimensions named B, S, N, P<layer>.

    weights: the file that takes the initializers of 1 KiB and more (give the same one for every stage of a program); None keeps them
    in the model.
    emitters: overrides by operator, on top of the portable ones; a dialect op mapped to None is expanded to its body.
    at: overrides by node, for what a target has recognised in this graph (the nodes must be of `stage`).
    """
    table: dict[Any, Emitter] = {k: v for k, v in {**EMITTERS, **PORTABLE, **(emitters or {})}.items() if v is not None}
    whole = stage if at else expand(stage, table)
    if at and (missing := expand(stage, table)) is not stage:
        raise LowerError(
            f"to_onnx: {name}: expand the stage before overriding nodes of it ({len(list(missing.graph.nodes))} nodes after expansion)"
        )
    b = Builder(weights)
    names = dim_names(whole)
    inputs: list[Any] = []
    _collect_parameters(b, whole)
    for node in whole.graph.nodes:
        if node.op == "placeholder":
            b.env[node] = node.meta.get("name", node.name)
            inputs.append(_info(b.env[node], node.meta["val"], names))
        elif node.op == "call_function" and not b.parameter(node):  # a narrowed parameter is cast while it is written
            b.path = _module_path(node)
            b.env[node] = _emit(b, node, (at or {}).get(node) or table[node.target], name)
    outputs = _name_outputs(b, whole, {i.name for i in inputs})
    given = {i.name for i in inputs}
    b.prune([output_value(o, given) for o in whole.outputs])
    infos = [
        _info(output_value(o, given), node.meta["val"], names, b.replaced[o][1] if o in b.replaced else None)
        for o, node in zip(whole.outputs, outputs, strict=True)
    ]
    inputs += [_info(extra, like, names, dims) for extra, like, dims in b.extra_inputs]
    graph = b.graph(name, inputs, infos)
    domains = sorted({n.domain for n in b.nodes if n.domain})
    opsets = [helper.make_opsetid("", OPSET), *[helper.make_opsetid(d, 1) for d in domains]]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR, producer_name="foveate")


def _emit(b: Builder, node: Node, emitter: Emitter, stage: str) -> Any:
    if isinstance(node.target, OpOverload) and node.target._schema.is_mutable and node.target is not torch.ops.aten.detach_.default:
        raise LowerError(f"to_onnx: {stage}: {node.target} at {node.name} writes into its input; capture must make the graph functional")
    try:
        return emitter(b, node, *arguments(node))
    except (LowerError, OSError):  # a full disk is the artifact's to report
        raise
    except Exception as cause:
        raise LowerError(
            f"to_onnx: {stage}: {node.target} at {node.name} ({b.path.strip('/') or 'no module'}) cannot be written with arguments "
            f"{[str(a)[:60] for a in arguments(node)]}: {type(cause).__name__}: {cause}"
        ) from cause


def _collect_parameters(b: Builder, stage: Stage) -> None:
    """Parameters by target; the same tensor under two names is one initializer. Notes which are read other than by a matrix product."""
    first: dict[int, str] = {}
    for node in stage.graph.nodes:
        if node.op != "get_attr":
            continue
        tensor: Any = stage.module
        for part in str(node.target).split("."):
            tensor = getattr(tensor, part)
        if not isinstance(tensor, Tensor):
            raise LowerError(f"to_onnx: {node.target} is a {type(tensor).__name__}, not a tensor")
        name = first.setdefault(id(tensor), str(node.target))
        b.tensors[str(node.target)] = tensor
        b.alias[str(node.target)] = name
        for reader in [node, *[u for u in node.users if b.parameter(u)]]:
            for user in reader.users:
                if not b.parameter(user) and (user.target is not torch.ops.aten.linear.default or user.args[1] is not reader):
                    b.read_raw.add(name)


def _module_path(node: Node) -> str:
    """The innermost module that the node came from, as a prefix for names: shows up in profiles and engine reports."""
    stack = node.meta.get("nn_module_stack") or {}
    return f"{next(reversed(stack.values()))[0]}/" if stack else ""


def output_value(name: str, inputs: Collection[str]) -> str:
    """The ONNX name of a contract output: its own, but ONNX does not let an output share the name of an input (the states `conv.<l>`)."""
    return f"{name}.out" if name in inputs else name


def _name_outputs(b: Builder, stage: Stage, inputs: Collection[str]) -> list[Node]:
    """Give every output value its contract name: by renaming the value where it is one of a kind, else through an Identity."""
    produced = {o for n in b.nodes for o in n.output}
    nodes, renamed = [], {}
    for name, node in stage.output_nodes.items():
        if not isinstance(node, Node):
            raise LowerError(f"to_onnx: output {name} is {node!r}, not a value of the graph")
        value = b.replaced[name][0] if name in b.replaced else b(node)
        val = node.meta["val"]
        if not isinstance(val, Tensor):
            raise LowerError(f"to_onnx: output {name} is a size, not a tensor")
        final = output_value(name, inputs)
        if value in produced and value not in renamed:
            renamed[value] = final
        else:
            b.nodes.append(helper.make_node("Identity", [value], [final], name=f"{name}/Identity"))
        nodes.append(node)
    for inner in [inner for node in b.nodes for inner in nodes_within(node)]:
        for field in (inner.input, inner.output):
            for i, value in enumerate(field):
                if value in renamed:
                    field[i] = renamed[value]
    return nodes


def dim_names(stage: Stage) -> dict[str, str]:
    """Symbol of the graph -> its name in the contract: B, S, N, P<layer> (I images), other symbols keep theirs."""
    names: dict[str, str] = {}
    for node in stage.graph.nodes:
        if node.op != "placeholder":
            continue
        name, val = node.meta.get("name", node.name), node.meta["val"]
        known: tuple[Any, ...] = DIMS.get(name, ())
        if name == "position_ids" and val.dim() == 3:
            known = (None, "B", "S")
        elif name.startswith(("past_k.", "past_v.")):
            known = ("B", None, past_symbol(name), None)
        elif name == "lengths" or name.startswith("lengths."):
            known = (None, "B")
        for label, size in zip(known, val.shape, strict=False):
            if label and not isinstance(size, int) and size.node.expr.is_Symbol:
                names.setdefault(str(size.node.expr), label)
    return names


def _info(name: str, val: Any, names: Mapping[str, str], dims: list[Any] | None = None) -> Any:
    return helper.make_tensor_value_info(name, onnx_type(val.dtype), dims or [dim_name(s, names) for s in val.shape])


def dim_name(size: Any, names: Mapping[str, str]) -> int | str:
    """An int, or the expression in contract names ("S", "K0 + S - N")."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    if expr.is_Integer:
        return int(expr)
    return str(
        expr.subs({s: sympy.Symbol(names[str(s)]) for s in expr.free_symbols if str(s) in names})
    )  # a bare "N" or "I" is a sympy function


def save(model: ModelProto, path: Any) -> None:
    """Write a model whose large weights are already in its weight file, next to `path`."""
    onnx.save_model(model, str(path))
