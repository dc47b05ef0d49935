"""ExportedProgram -> Stage: unlift the parameters, name the inputs, clean what guards left behind."""

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from .errors import GraphError
from .program import Stage


def from_exported(exported: ExportedProgram, inputs: list[str], outputs: list[str]) -> Stage:
    """The stage of an exported module whose flat inputs and outputs have these names, in order.

    Parameters as get_attr nodes, flat inputs and outputs, no asserts, `meta["val"]` and the contract's names everywhere.
    """
    lifted = exported.graph_signature
    held = lifted.inputs_to_parameters | lifted.inputs_to_buffers | lifted.inputs_to_lifted_tensor_constants
    vals = {held[n.name]: n.meta["val"] for n in exported.graph.nodes if n.op == "placeholder" and n.name in held}
    module = exported.module(check_guards=False)
    graph = module.graph
    graph.set_codegen(CodeGen())  # flat inputs, flat tuple out: no pytree in the way
    for node in list(graph.nodes):
        if node.op == "call_function" and ("assert" in str(node.target) or "sym_constrain" in str(node.target)):
            graph.erase_node(node)
        elif node.target is torch.ops.aten.to.device and _same(node.meta["val"], node.args[0].meta["val"]):
            node.replace_all_uses_with(node.args[0])  # otherwise the graph names the device that it was captured on
    module = GraphModule(module, graph)
    _name(graph, inputs, outputs)
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.op == "get_attr" and "val" not in node.meta:
            node.meta["val"] = vals[node.target]
    graph.lint()
    module.recompile()
    return Stage(module, list(outputs))


def _name(graph: torch.fx.Graph, inputs: list[str], outputs: list[str]) -> None:
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(inputs):
        raise GraphError(f"capture: the graph has {len(placeholders)} inputs {[n.name for n in placeholders]}, expected {inputs}")
    for node, name in zip(placeholders, inputs, strict=True):
        node.meta["name"] = name
        node._rename(name.replace(".", "_"))
    values = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    if len(values) != len(outputs):
        raise GraphError(f"capture: the graph has {len(values)} outputs, expected {outputs}")


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and a.device == b.device


def sweep(stage: Stage, roles: bool = False) -> int:
    """Erase nodes that nobody reads; nodes with a role are spared for later passes unless `roles`. Returns how many went."""
    before = len(stage.graph.nodes)
    stage.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or (not roles and "role" in n.meta))
    return before - len(stage.graph.nodes)
