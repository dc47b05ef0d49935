"""Where a bucket looked: the kept tokens of its last cut by attention, as a box of the picture."""

from __future__ import annotations

import numpy as np

from ..errors import RunError
from ..result import Picture

WINDOW = 3  # tokens a side: a peak is where most kept tokens lie in a window of this size
ZOOM = 2.0  # AdaptVision scales the box by this about its centre before it crops


def box_of(picture: Picture) -> tuple[int, tuple[int, int, int, int]]:
    """(kept tokens in the box before it is scaled, left, upper, right, lower in pixels). A picture of which nothing was kept: all of it."""
    if picture.grid is None:
        raise RunError("coarse-to-fine: this family's pictures have no single grid of tokens, so no region can be cut out; use mode finer")
    (rows, columns), (width, height) = picture.grid, picture.image.size
    kept = picture.kept[next(reversed(picture.kept))] if picture.kept else np.zeros(0, int)
    if not len(kept):
        return 0, (0, 0, width, height)
    heat = np.zeros((rows + WINDOW - 1, columns + WINDOW - 1), int)  # a margin around the grid
    y, x = np.asarray(kept) // columns, np.asarray(kept) % columns
    heat[y + WINDOW // 2, x + WINDOW // 2] = 1
    sums = np.lib.stride_tricks.sliding_window_view(heat, (WINDOW, WINDOW)).sum((2, 3))  # [rows, columns], centred
    centre = np.unravel_index(sums.argmax(), sums.shape)
    inside = (abs(y - centre[0]) <= WINDOW // 2) & (abs(x - centre[1]) <= WINDOW // 2)
    spans = [_scaled(v[inside].min(), v[inside].max() + 1, n) for v, n in ((x, columns), (y, rows))]
    (left, right), (upper, lower) = (tuple(round(e * size) for e in span) for span, size in zip(spans, (width, height), strict=True))
    return int(inside.sum()), (left, upper, max(right, left + 1), max(lower, upper + 1))


def _scaled(low: float, high: float, size: int) -> tuple[float, float]:
    """A span of tokens, ZOOM times as long about its middle, moved and cut to lie inside the picture; as shares of it."""
    length = min(ZOOM * (high - low), size)
    start = min(max((low + high - length) / 2, 0.0), size - length)
    return start / size, (start + length) / size
