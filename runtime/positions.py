"""Position ids in numpy: what the modelling code would compute, for artifacts that carry none of it.

Two kinds (`facts.positions["kind"]`):

    linear   0, 1, 2, ... (+ `start`)                                    -> ids[S]
    mrope    three axes (time, height, width); text advances all three   -> ids[3, S]

The mrope rule is the published one of Qwen2-VL (arXiv 2409.12191, section 2.1), shared by Qwen2.5-VL, Qwen3-VL and GLM-4.1V for still
images: an image of t x h x w merged cells that starts at position p takes (p + time, p + row, p + column), and what follows it starts at
p + max(h, w).
Tests hold it equal to transformers' `get_rope_index` on random sequences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .errors import RunError

KINDS = ("linear", "mrope")


def position_ids(length: int, groups: Sequence[np.ndarray], grids: np.ndarray | None, rule: Mapping[str, Any]) -> np.ndarray:
    """One sample's positions: ids[S] (linear) or ids[3, S] (mrope).

    length: S, its tokens before any vision-side reduction. groups: per image the places of its tokens. grids: [images, 3], each image's
    (time, height, width) in patches before merging; mrope only.
    """
    kind = rule.get("kind", "linear")
    if kind == "linear":
        return np.arange(length, dtype=np.int64) + int(rule.get("start", 0))
    if kind == "mrope":
        return _mrope(length, groups, grids, int(rule.get("merge", rule.get("spatial_merge_size", 1))))
    raise RunError(f"positions: unknown kind {kind!r}; this version knows {list(KINDS)}")


def axes(rule: Mapping[str, Any]) -> int:
    """1 for position_ids [B, S], 3 for [3, B, S]"""
    return 3 if rule.get("kind") == "mrope" else 1


def _mrope(length: int, groups: Sequence[np.ndarray], grids: np.ndarray | None, merge: int) -> np.ndarray:
    if groups and (grids is None or len(grids) != len(groups)):
        raise RunError(f"positions: {len(groups)} images but {0 if grids is None else len(grids)} grids (time, height, width)")
    ids = np.empty((3, length), np.int64)
    at, position = 0, 0  # next token, next position
    for group, grid in zip(groups, grids if grids is not None else (), strict=True):
        cells = _cells(grid, merge)
        start, stop = _span(group, cells.shape[1])
        ids[:, at:start] = position + np.arange(start - at)
        position += start - at
        ids[:, start:stop] = position + cells
        position += max(int(grid[1]), int(grid[2])) // merge
        at = stop
    ids[:, at:] = position + np.arange(length - at)
    return ids


def _cells(grid: np.ndarray, merge: int) -> np.ndarray:
    """(time, height, width) in patches -> [3, cells]: each merged cell's coordinates, row by row"""
    t, h, w = int(grid[0]), int(grid[1]) // merge, int(grid[2]) // merge
    return np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij")).reshape(3, -1)


def _span(group: np.ndarray, cells: int) -> tuple[int, int]:
    """The image's first token and the one past its last; its tokens are neighbours in every mrope family."""
    start, stop = int(group[0]), int(group[-1]) + 1
    if stop - start != len(group) or len(group) != cells:
        raise RunError(
            f"positions: an image of {cells} cells has {len(group)} tokens between {start} and {stop} of the prompt; "
            f"they must be {cells} neighbours"
        )
    return start, stop
