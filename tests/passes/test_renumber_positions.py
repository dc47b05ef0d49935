"""Positions of kept tokens: a rule for the runtime, when it is given, and how to be without it."""

import numpy as np
import pytest
import towers

from foveate.passes.base import PassError, make
from foveate.runtime.batch import lay_out

IMAGE = 9
TOKENS = np.array([1, *[IMAGE] * 4, 2, *[IMAGE] * 4, 3])
GROUPS = (np.arange(1, 5), np.arange(6, 10))


def test_kept_tokens_and_text_stay_where_they_were():
    kept = [np.array([1, 3]), np.array([0, -1])]  # -1: a summary, at its picture's end
    layout = lay_out(TOKENS, GROUPS, [2, 2], None, {"kind": "linear", "original": True}, kept)
    assert layout.tokens.tolist() == [1, IMAGE, IMAGE, 2, IMAGE, IMAGE, 3]
    assert layout.positions.tolist() == [0, 2, 4, 5, 6, 9, 10] and layout.next_position == 11
    renumbered = lay_out(TOKENS, GROUPS, [2, 2], None, {"kind": "linear"}, kept)
    assert renumbered.positions.tolist() == list(range(7)) and renumbered.next_position == 7


@pytest.mark.parametrize("recipe", [("prune-uniform", {"keep": 5}), ("merge-tome", {"r": 2}), ("merge-visionzip", {"keep": 6})])
def test_one_pass_keeps_positions_and_renumber_gives_them_up(recipe):
    program = towers.tower()
    assert make(*recipe).run(program) and program.facts.positions["original"]
    before = {n: len(s.graph.nodes) for n, s in program.stages.items()}
    assert make("renumber-positions").run(program)
    assert "original" not in program.facts.positions and before == {n: len(s.graph.nodes) for n, s in program.stages.items()}
    assert not make("renumber-positions").run(program), "twice is nothing left to do"


def test_parity_numbers_anew():
    program = towers.tower()
    assert make("prune-divprune", {"keep": 5, "mode": "parity"}).run(program)
    assert "original" not in program.facts.positions


def test_after_two_passes_nobody_knows_where_a_token_was():
    program = towers.tower()
    for keep in (8, 4):
        make("prune-divprune", {"keep": keep}).run(program)
    assert "original" not in program.facts.positions


def test_a_budget_that_images_share_numbers_anew():
    program = towers.tower()
    make("prune-evs", {"keep": 5, "frames": 2}).run(program)  # the first frame stays whole: 15 of 30
    assert "original" not in program.facts.positions


def test_refuses_when_nothing_was_kept():
    with pytest.raises(PassError, match="renumber-positions: no pass before the language model has kept or merged anything yet"):
        make("renumber-positions").run(towers.tower())
