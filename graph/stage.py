"""ExportedProgram -> Stage: unlift the parameters, name the inputs, clean what guards left behind."""

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from .errors import GraphError
from .program import Stage


def from_exported(exported: ExportedProgram, inputs: list[str], outputs: list[str]) -> Stage:
    """The stage of an exported module whose flat inputs and outputs have these names, in order."""
    module = exported.module(check_guards=False)
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "call_function" and ("assert" in str(node.target) or "sym_constrain_range" in str(node.target)) and not node.users:
            graph.erase_node(node)
    graph.eliminate_dead_code()
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(inputs):
        raise GraphError(f"capture: the graph has {len(placeholders)} inputs {[n.name for n in placeholders]}, expected {inputs}")
    for node, name in zip(placeholders, inputs, strict=True):
        node.meta["name"] = name
    values = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    if len(values) != len(outputs):
        raise GraphError(f"capture: the graph has {len(values)} outputs, expected {outputs}")
    graph.set_codegen(torch.fx.graph.CodeGen())  # flat inputs, flat tuple out: no pytree in the way
    graph.lint()
    return Stage(GraphModule(module, graph), list(outputs))


def sweep(stage: Stage, roles: bool = False) -> int:
    """Erase nodes that nobody reads; nodes with a role are spared for later passes unless `roles`. Returns how many went."""
    before = len(stage.graph.nodes)
    stage.graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output") or (not roles and "role" in n.meta))
    return before - len(stage.graph.nodes)
