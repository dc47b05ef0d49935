"""Which operations a pass added: they carry its name as their module, so that profiles and engine reports show what it costs."""

from __future__ import annotations

from typing import Any

from .graph.program import PassRecord, Program

PREFIX = "foveate."  # runtime/profile.py reads it in the names of operations


class Marks:
    """Called after every pass; `write` at the end, since passes read module paths while they look for their places."""

    def __init__(self, program: Program) -> None:
        self.known = {name: {n.name for n in stage.graph.nodes} for name, stage in program.stages.items()}
        self.owner: dict[tuple[str, str], str] = {}

    def __call__(self, record: PassRecord, program: Program) -> None:
        for stage, node in _operations(program):
            known = self.known.setdefault(stage, set())  # a pass may add a stage
            if node.name not in known:
                known.add(node.name)
                self.owner[stage, node.name] = record.name

    def write(self, program: Program) -> None:
        """Operations that keep the name of a module of the model are the model's, wherever a pass put them."""
        for stage, node in _operations(program):
            name = self.owner.get((stage, node.name))
            if name and not node.meta.get("nn_module_stack"):
                node.meta["nn_module_stack"] = {name: (f"{PREFIX}{name}", "")}


def _operations(program: Program) -> list[tuple[str, Any]]:
    return [(name, node) for name, stage in program.stages.items() for node in stage.graph.nodes if node.op == "call_function"]
