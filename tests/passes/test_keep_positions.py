"""keep-positions: a rule for the runtime, and its refusals."""

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


def test_says_so_in_the_facts_and_leaves_the_graphs():
    program = towers.tower()
    make("prune-uniform", {"keep": 5}).run(program)
    before = {n: len(s.graph.nodes) for n, s in program.stages.items()}
    assert make("keep-positions").run(program)
    assert program.facts.positions["original"] and before == {n: len(s.graph.nodes) for n, s in program.stages.items()}
    assert not make("keep-positions").run(program), "twice is nothing left to do"


def test_refuses_when_nothing_or_two_passes_say_what_they_kept():
    program = towers.tower()
    with pytest.raises(PassError, match="keep-positions: needs exactly one pass before the language model that says what it kept; there are 0"):
        make("keep-positions").run(program)
    for keep in (8, 4):
        make("prune-divprune", {"keep": keep}).run(program)
    with pytest.raises(PassError, match="there are 2"):
        make("keep-positions").run(program)


def test_refuses_a_budget_that_images_share():
    program = towers.tower()
    make("prune-evs", {"keep": 5, "frames": 2}).run(program)  # the first frame stays whole: 15 of 30
    with pytest.raises(PassError, match=r"needs as many kept tokens in every image; kept\.vision is 15 wide for a mean of 8"):
        make("keep-positions").run(program)
