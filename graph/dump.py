"""A program as stable text: one line per node, numbered, so that two runs can be compared by eye and by diff."""

from typing import Any

import torch
from torch.fx import Node

from .kv_table import expression, symbols
from .program import Program, Stage

TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16", torch.int64: "i64", torch.int32: "i32", torch.int8: "i8", torch.bool: "b1"}


def dump(program: Program, stage: str | None = None) -> str:
    """All stages, or one; `%n` is the n-th value, `@name` a parameter, sizes in the contract's letters."""
    if stage is not None:
        return dump_stage(program[stage])
    return "\n\n".join(f"{name}:\n{dump_stage(s)}" for name, s in program.stages.items())


def dump_stage(stage: Stage) -> str:
    names = symbols(stage)
    label: dict[Node, str] = {}
    lines = []
    for node in stage.graph.nodes:
        if node.op == "placeholder":
            label[node] = f"%{node.meta.get('name', node.name)}"
        elif node.op == "get_attr":
            label[node] = f"@{node.target}"
        elif node.op == "output":
            returned = ", ".join(f"{n}={label[v]}" for n, v in stage.output_nodes.items())
            lines.append(f"return {returned}")
        elif getattr(node.target, "__name__", "") == "getitem":
            label[node] = f"{label[node.args[0]]}.{node.args[1]}"
        else:
            label[node] = f"%{len(lines)}"
            arguments = [_text(a, label) for a in node.args] + [f"{k}={_text(v, label)}" for k, v in node.kwargs.items() if v is not None]
            lines.append(f"{label[node]} = {_target(node)}({', '.join(arguments)}){_type(node.meta.get('val'), names)}")
    return "\n".join(lines)


def _target(node: Node) -> str:
    return str(node.target).removesuffix(".default") if isinstance(node.target, torch._ops.OpOverload) else getattr(node.target, "__name__", str(node.target))


def _text(value: Any, label: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return label[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_text(v, label) for v in value)}]"
    return str(value)


def _type(value: Any, names: dict[Any, str]) -> str:
    if isinstance(value, torch.Tensor):
        return f" : {TYPES.get(value.dtype, value.dtype)}[{', '.join(expression(d, names) for d in value.shape)}]"
    if isinstance(value, torch.SymInt):
        return f" : {expression(value, names)}"
    return ""
