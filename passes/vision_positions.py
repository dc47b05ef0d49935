"""Which positions the language model sees of what the vision side kept."""

from __future__ import annotations

from dataclasses import replace

from ..graph.program import Program


def number(program: Program, original: bool) -> None:
    """facts.positions["original"]: the runtime gives kept tokens, and the text, the positions of the whole prompt; else it numbers anew.

    original: wished for. It needs positions of one axis (those of mrope stay with their patches anyway), and one pass that says of every
    image the same number of kept tokens: after two, or with a budget that images share, nobody knows where a token was, and they are numbered
    anew. A merged token has the position of the patch it stands for, a summary of many that of the picture's last patch.
    """
    facts, nodes = program.facts, program["vision"].output_nodes
    kept = [node.meta["val"].shape[1] for name, node in nodes.items() if name.startswith("kept.")]
    known = facts.positions.get("kind", "linear") == "linear" and kept == [facts.features_per_image]
    rest = {k: v for k, v in facts.positions.items() if k != "original"}
    program.facts = replace(facts, positions={**rest, "original": True} if original and known else rest)
