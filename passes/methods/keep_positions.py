"""Positions of the picture: what a pass before the language model kept stays where it was."""

from dataclasses import dataclass, replace
from typing import ClassVar

from ...graph.program import Program
from ..base import Pass


@dataclass(frozen=True)
class KeepPositions(Pass):
    """
    rewrite:
        facts.positions: the runtime numbers the tokens that are left 0, 1, 2, ...  ->  it gives them, and the text, the positions of the whole
        prompt; a merged token has that of the patch it stands for, a summary of many that of the picture's last patch

    After one pass at the vision side; the graphs do not change. Published vision-side methods renumber, methods inside the language model do
    not. Where a model reads places from positions, this is the larger part of what pruning costs (docs/methods.md).
    """

    name: ClassVar[str] = "keep-positions"
    place: ClassVar[str] = "vision"

    def run(self, program: Program) -> bool:
        facts = program.facts
        if facts.positions.get("kind", "linear") != "linear":
            raise self.fail(f"positions of {facts.model_type} are {facts.positions['kind']}, which stay with their patches already")
        nodes = program["vision"].output_nodes
        sites = [name for name in nodes if name.startswith("kept.")]
        if len(sites) != 1:
            raise self.fail(f"needs exactly one pass before the language model that says what it kept; there are {len(sites)}: {sites}")
        if (width := nodes[sites[0]].meta["val"].shape[1]) != facts.features_per_image:
            raise self.fail(f"needs as many kept tokens in every image; {sites[0]} is {width} wide for a mean of {facts.features_per_image}")
        if facts.positions.get("original"):
            return False
        program.facts = replace(facts, positions={**facts.positions, "original": True})
        return True
