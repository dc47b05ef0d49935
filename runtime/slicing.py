"""LLaVA-UHD slicing: a large picture as an overview and a grid of slices that keep its shape.

Guo et al., "LLaVA-UHD: an LMM Perceiving Any Aspect Ratio and High-Resolution Images" (ECCV 2024, section 3.1), the rule of its first release.
Pre-processing only: no pixels are invented beyond a resize, no graph changes. A model sees overview and slices as pictures of one prompt;
the published prompts put a comma between the slices of a row and a line break behind each row (`separators`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from .errors import RunError

SIDE, PATCH, CAP = 336, 14, 7  # pixels of a native picture's side, of a patch; slices at most


@dataclass(frozen=True)
class Slices:
    """overview: the whole picture at native resolution; pieces: the slices, row by row; grid: (columns, rows), None where nothing is cut."""

    overview: Any
    pieces: tuple[Any, ...]
    grid: tuple[int, int] | None

    @property
    def separators(self) -> tuple[str, ...]:
        """What stands behind each slice in the published prompts."""
        columns = self.grid[0] if self.grid else 1
        return tuple("\n" if (i + 1) % columns == 0 else "," for i in range(len(self.pieces)))


def best_grid(width: int, height: int, cap: int = CAP, side: int = SIDE) -> tuple[int, int] | None:
    """(columns, rows) whose shape is nearest to the picture's, among all grids of N - 1, N and N + 1 slices, N = ceil(pixels / side^2)

    None: the picture fits into one. No grid has more than `cap` slices; the first of equally good ones wins, fewer slices and columns first.
    """
    if min(width, height, side) < 1 or cap < 1:
        raise RunError(f"slicing: sizes and the cap are at least 1, got a picture of {width} x {height}, side {side}, cap {cap}")
    ideal = min(math.ceil(width * height / side**2), cap)
    if ideal <= 1:
        return None
    shape = math.log(width / height)
    grids = [(m, count // m) for count in (ideal - 1, ideal, ideal + 1) if 1 < count <= cap for m in range(1, count + 1) if count % m == 0]
    return min(grids, key=lambda g: abs(shape - math.log(g[0] / g[1])))


def native_size(width: float, height: float, side: int = SIDE, patch: int = PATCH, enlarge: bool = True) -> tuple[int, int]:
    """The size of the same shape with about side^2 pixels, in whole patches (rounded down, at least one); smaller pictures grow only if told to."""
    if enlarge or width * height > side**2:
        ratio = width / height
        height = int(side / math.sqrt(ratio))
        width = int(height * ratio)
    return max(int(width) // patch, 1) * patch, max(int(height) // patch, 1) * patch


def refined_size(width: int, height: int, grid: tuple[int, int], side: int = SIDE, patch: int = PATCH) -> tuple[int, int]:
    """The size to which a picture is brought before it is cut: every slice a native one."""
    whole = [max(length // parts, 1) for length, parts in zip((width, height), grid, strict=True)]
    slice_width, slice_height = native_size(*whole, side, patch)
    return slice_width * grid[0], slice_height * grid[1]


def slice_picture(picture: Any, cap: int = CAP, side: int = SIDE, patch: int = PATCH) -> Slices:
    """A PIL picture -> its overview and its slices (bicubic, as published)."""
    from PIL import Image

    grid = best_grid(*picture.size, cap, side)
    overview = picture.resize(native_size(*picture.size, side, patch, enlarge=grid is None), Image.Resampling.BICUBIC)
    if grid is None:
        return Slices(overview, (), None)
    large = picture.resize(refined_size(*picture.size, grid, side, patch), Image.Resampling.BICUBIC)
    w, h = large.size[0] // grid[0], large.size[1] // grid[1]
    return Slices(overview, tuple(large.crop((c * w, r * h, (c + 1) * w, (r + 1) * h)) for r in range(grid[1]) for c in range(grid[0])), grid)
