"""Preallocated keys and values in host memory, for engines that run on the CPU."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from ..errors import LowerError
from .base import Arrays, Cache


class HostCache(Cache):
    """One batch, by the names of the decode stage's inputs: rows (past_k.<l>[B, G, C, D] and the like) with spare ones behind, what is stored
    beside them (past_k.<l>.scale), partitions that are only read (past_k.<l>.lo), states of short convolutions, slots of windowed layers.

    Rows beyond a sample's length are zero or stale, never read. `grow` makes new, larger buffers.
    """

    def __init__(self, layers: list[int], appended: Collection[str] = ()) -> None:
        """appended: names of the buffers that get a row per step."""
        self.layers = layers
        self.appended = frozenset(appended)
        self.buffers: Arrays = {}
        self.parts: Arrays = {"lengths": np.zeros((len(layers), 0), np.int64)}  # and lengths.<partition>: rows that are valid
        self.slot = np.zeros((0, 1), np.int64)  # of the next token
        self.bound: Any = None  # what an engine keeps for these very buffers

    @property
    def lengths(self) -> np.ndarray:  # type: ignore[override]
        """[cached layers, B] of the rows that decode appends to."""
        return self.parts["lengths"]

    @lengths.setter
    def lengths(self, value: np.ndarray) -> None:
        self.parts["lengths"] = value

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.buffers.values())

    @property
    def batch(self) -> int:
        return self.lengths.shape[1]

    def rows(self, layer: int) -> int:
        return self.buffers[f"past_k.{layer}"].shape[2]

    def of(self, layer: int) -> list[str]:
        """The layer's buffers that get a row per step."""
        return [n for n in self.buffers if n in self.appended and int(n.split(".")[1]) == layer]

    def grow(self) -> bool:
        """Make room for one more row in every layer; True if buffers were replaced (all rows double)."""
        replaced = False
        for row, layer in enumerate(self.layers):
            have = self.rows(layer)
            if int(self.lengths[row].max(initial=0)) < have:
                continue
            replaced = True
            for name in self.of(layer):
                old = self.buffers[name]
                axis = _tokens(name)
                shape = [*old.shape]
                shape[axis] = 2 * have
                self.buffers[name] = np.zeros(shape, old.dtype)
                self.buffers[name][(slice(None),) * axis + (slice(0, have),)] = old
        return replaced

    def write(self, layer: int, outputs: Arrays) -> None:
        """Put the new rows k.<l>[B, G, 1, D] and the like (where they are given) behind the valid ones."""
        at, samples = self.lengths[self.layers.index(layer)], np.arange(self.batch)
        for name in self.of(layer):
            if name.startswith("past_pos."):
                self.buffers[name][samples, at] = self.slot[:, 0]
            elif (made := name.removeprefix("past_")) in outputs:
                self.buffers[name][samples, :, at] = outputs[made][:, :, 0]

    def advance(self) -> None:
        self.lengths += 1
        self.slot += 1


def _tokens(name: str) -> int:
    """The axis of the rows."""
    return 1 if name.startswith("past_pos.") else 2


def check_prefix(mask: np.ndarray) -> None:
    """Engines take padding on the right only."""
    if mask.shape[1] > 1 and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise LowerError("prefill: attention_mask has padding on the left or in between; pad on the right")
