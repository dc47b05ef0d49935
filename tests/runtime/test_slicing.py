"""LLaVA-UHD slicing: the published rule's own answers, and what no picture may break."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from foveate.runtime.errors import RunError
from foveate.runtime.slicing import best_grid, native_size, refined_size, slice_picture

SIZES = st.integers(1, 3000)


@pytest.mark.parametrize(("size", "grid"), [
    ((672, 336), (2, 1)), ((672, 672), (2, 2)), ((672, 1088), (2, 3)), ((1024, 768), (3, 2)), ((1920, 1080), (3, 2)), ((768, 1024), (2, 3)),
    ((2000, 500), (6, 1)), ((400, 1200), (1, 4)), ((336, 336), None),
])
def test_reference_vectors_of_the_published_rule(size, grid):
    """Cap 7, side 336, computed from the first release's rule."""
    assert best_grid(*size) == grid


@given(SIZES, SIZES)
def test_there_are_fifteen_grids_and_the_nearest_shape_wins(width, height):
    grid = best_grid(width, height)
    if grid is None:
        assert width * height <= 336**2
        return
    assert 2 <= math.prod(grid) <= 7
    ideal = min(math.ceil(width * height / 336**2), 7)
    assert abs(math.prod(grid) - ideal) <= 1
    turned = best_grid(height, width)
    error = [abs(math.log(a / b) - math.log(g[0] / g[1])) for (a, b), g in (((width, height), grid), ((height, width), turned))]
    assert error[0] == pytest.approx(error[1])  # a picture on its side is cut as well as upright; ties may go to another grid


@given(SIZES, SIZES)
def test_slices_are_whole_patches_of_about_native_size(width, height):
    w, h = native_size(width, height)
    assert w % 14 == h % 14 == 0 and min(w, h) >= 14
    if 1 / 20 < width / height < 20:
        assert w * h <= 336**2
    if grid := best_grid(width, height):
        total = refined_size(width, height, grid)
        assert total[0] % (14 * grid[0]) == total[1] % (14 * grid[1]) == 0


def test_slices_put_together_are_the_picture():
    y, x = np.mgrid[0:768, 0:1024]
    picture = Image.fromarray(np.stack([x // 4, y // 3, 0 * x], -1).astype(np.uint8))
    done = slice_picture(picture)
    assert done.grid == (3, 2) and len(done.pieces) == 6 and done.separators == (",", ",", "\n") * 2
    rows = [np.concatenate([np.asarray(p) for p in done.pieces[3 * r : 3 * r + 3]], 1) for r in range(2)]
    large = np.concatenate(rows)
    assert large.shape[:2] == refined_size(1024, 768, (3, 2))[::-1]
    np.testing.assert_array_equal(large, np.asarray(picture.resize(large.shape[1::-1], Image.Resampling.BICUBIC)))
    assert slice_picture(picture.resize((300, 200))).pieces == ()


def test_refuses_sizes_that_are_none():
    with pytest.raises(RunError, match="slicing: sizes and the cap are at least 1, got a picture of 0 x 5"):
        best_grid(0, 5)
