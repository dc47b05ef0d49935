"""Preallocated keys and values in host memory, for engines that run on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import LowerError
from .base import Arrays, Cache


class HostCache(Cache):
    """One batch: k and v[B, G, C, D] per cached layer with spare rows, states of short convolutions, slots of windowed layers.

    Rows beyond a sample's length are zero or stale, never read. `grow` makes new, larger buffers.
    """

    def __init__(self, layers: list[int]) -> None:
        self.layers = layers
        self.buffers: Arrays = {}  # past_k.<l>, past_v.<l>, past_pos.<l>, conv.<l>
        self.lengths = np.zeros((len(layers), 0), np.int64)
        self.slot = np.zeros((0, 1), np.int64)  # of the next token
        self.bound: Any = None  # what an engine keeps for these very buffers

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.buffers.values())

    @property
    def batch(self) -> int:
        return self.lengths.shape[1]

    def rows(self, layer: int) -> int:
        return self.buffers[f"past_k.{layer}"].shape[2]

    def grow(self) -> bool:
        """Make room for one more row in every layer; True if buffers were replaced (all rows double)."""
        replaced = False
        for row, layer in enumerate(self.layers):
            have = self.rows(layer)
            if int(self.lengths[row].max(initial=0)) < have:
                continue
            replaced = True
            for name in (f"past_k.{layer}", f"past_v.{layer}", f"past_pos.{layer}"):
                if name in self.buffers:
                    old = self.buffers[name]
                    axis = 1 if name.startswith("past_pos") else 2
                    shape = [*old.shape]
                    shape[axis] = 2 * have
                    self.buffers[name] = np.zeros(shape, old.dtype)
                    self.buffers[name][(slice(None),) * axis + (slice(0, have),)] = old
        return replaced

    def write(self, layer: int, outputs: Arrays) -> None:
        """Put the new rows k.<l>, v.<l>[B, G, 1, D] (where they are given) behind the valid ones."""
        row = self.layers.index(layer)
        samples = np.arange(self.batch)
        for which in "kv":
            if f"{which}.{layer}" in outputs:
                self.buffers[f"past_{which}.{layer}"][samples, :, self.lengths[row]] = outputs[f"{which}.{layer}"][:, :, 0]
        if f"past_pos.{layer}" in self.buffers:
            self.buffers[f"past_pos.{layer}"][samples, self.lengths[row]] = self.slot[:, 0]

    def advance(self) -> None:
        self.lengths += 1
        self.slot += 1


def check_prefix(mask: np.ndarray) -> None:
    """Engines take padding on the right only."""
    if mask.shape[1] > 1 and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise LowerError("prefill: attention_mask has padding on the left or in between; pad on the right")
