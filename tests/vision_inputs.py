"""Seeded random inputs of the parity tests, from numpy's frozen legacy generator: the same numbers on every machine and in every
version."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from foveate.passes.vision_signals import Attention, Signals

SEEDS = range(100)


def draw(seed: int, *shape: int, gain: float = 1.0) -> Tensor:
    return torch.from_numpy((gain * np.random.RandomState(seed).standard_normal(shape)).astype(np.float32))


def signals(seed: int, images: int = 1, grid: tuple[int, int] = (6, 8), heads: int = 2, width: int = 4, layers: int = 1, merged: int = 0) -> Signals:
    """features[images, n, heads width], and q, k of `layers` layers over CLS + n tokens; the features are close to the keys, as in a
    tower."""
    n = grid[0] * grid[1]
    found = []
    for layer in range(layers):
        q, k = (draw(1000 * seed + 10 * layer + i, images, heads, 1 + n, width, gain=1.5) for i in (1, 2))
        found.append(Attention(q, k, k, None, width**-0.5))
    features = found[-1].k[:, :, 1:].transpose(1, 2).flatten(2) + draw(1000 * seed + 3, images, n, heads * width)
    return Signals(features, tuple(found), 1, grid, 1, {}, draw(1000 * seed + 4, images, 1, heads * width))


def attentions(s: Signals) -> list[Tensor]:
    """Eager attention of every layer, [images, H, 1 + n, 1 + n]"""
    return [((a.q @ a.k.transpose(-1, -2)) * a.scale).softmax(-1) for a in s.layers]


def onto(rows: Tensor) -> Tensor:
    """rows[..., D] -> [..., 2]: the rows on two fixed directions, so that golden files stay small"""
    return rows @ draw(999_999, rows.shape[-1], 2)
