"""Positions of the picture: what a pass before the language model kept is numbered anew, as published vision-side code has it."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ...graph.program import Program
from ..base import Pass


@dataclass(frozen=True)
class RenumberPositions(Pass):
    """
    rewrite:
        facts.positions: a kept token stays where it was, and the text too  ->  the runtime numbers the tokens that are left 0, 1, 2, ...

    After a pass at the vision side, for comparison with published figures; the graphs do not change. Where a model reads places from
    positions, this is the larger part of what pruning costs (docs/methods.md).
    """

    name: ClassVar[str] = "renumber-positions"
    place: ClassVar[str] = "vision"

    def run(self, program: Program) -> bool:
        facts = program.facts
        if facts.positions.get("kind", "linear") != "linear":
            raise self.fail(f"positions of {facts.model_type} are {facts.positions['kind']}, which stay with their patches")
        if not any(name.startswith("kept.") for name in program["vision"].outputs):
            raise self.fail("no pass before the language model has kept or merged anything yet")
        if not facts.positions.get("original"):
            return False
        program.facts = replace(facts, positions={k: v for k, v in facts.positions.items() if k != "original"})
        return True
