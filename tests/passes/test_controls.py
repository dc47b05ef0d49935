"""The controls choose what they say: even spacing without aliasing, the same draw on both sides of the language model."""

import pytest
import torch

from foveate.passes.methods.drop_random import DropRandom
from foveate.passes.methods.drop_uniform import DropUniform
from foveate.passes.methods.prune_random import PruneRandom
from foveate.passes.methods.prune_uniform import PruneUniform, dither

SIDE = 12
FEATURES = torch.zeros(2, SIDE * SIDE, 4)


def dropped(method, keep: int) -> list[int]:
    """The indices that an in-LLM control keeps of one picture."""
    here = torch.ones(1, SIDE * SIDE, dtype=torch.bool)
    taps = {"visual": here, "valid": here, "budget": torch.tensor([keep]), "visual_index": torch.arange(SIDE * SIDE)[None]}
    wanted = method.score.__code__.co_varnames[1 : method.score.__code__.co_argcount]
    return sorted(method.score(**{n: taps[n] for n in wanted})[0].sort(descending=True, stable=True).indices[:keep].tolist())


CELLS = [(72, lambda y, x: (x + y) % 2 == 0), (36, lambda y, x: x % 2 == y % 2 == 0), (9, lambda y, x: x % 4 == y % 4 == 0)]


@pytest.mark.parametrize(("count", "cells"), CELLS)
def test_a_dithered_share_is_the_regular_grid(count, cells):
    kept = PruneUniform(keep=count, by="grid").choose(count, FEATURES, (SIDE, SIDE))
    want = [y * SIDE + x for y in range(SIDE) for x in range(SIDE) if cells(y, x)]
    assert kept.tolist() == [want, want]


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (12, 12), (7, 16)])
def test_dither_gives_every_cell_its_own_place(grid):
    assert len(set(dither(*grid))) == grid[0] * grid[1]


def test_order_aliases_with_the_rows_and_staggering_does_not():
    columns = lambda kept: len({i % SIDE for i in kept})  # noqa: E731
    assert columns(dropped(DropUniform(keep=36), 36)) == 3, "what the docstring warns of"
    assert columns(dropped(DropUniform(keep=36, staggered=True), 36)) == SIDE
    for count in (9, 16, 36, 72):  # no quarter of the picture is left without its share, to a token or two
        kept = dropped(DropUniform(keep=count, staggered=True), count)
        quarters = [sum((i // SIDE // 6, i % SIDE // 6) == (y, x) for i in kept) for y in (0, 1) for x in (0, 1)]
        assert min(quarters) >= count // 4 - 2, quarters


@pytest.mark.parametrize("count", [9, 36, 72])
def test_both_sides_keep_the_same_tokens_of_one_picture(count):
    assert PruneRandom(keep=count, seed=3).choose(count, FEATURES)[0].tolist() == dropped(DropRandom(keep=count, seed=3), count)
    assert PruneUniform(keep=count).choose(count, FEATURES)[0].tolist() == dropped(DropUniform(keep=count), count)
