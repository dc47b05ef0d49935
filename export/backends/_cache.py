"""Preallocated keys and values in host memory, for engines that run on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...graph.kv_format import APPENDED, BITS, KVFormat, Partition
from ..errors import LowerError
from ._kv_check import clip_rate
from .base import Arrays, Cache


class HostCache(Cache):
    """One batch, by the names of the decode stage's inputs: rows (past_k.<l>[B, G, C, D] and the like) with spare ones behind, what is stored
    beside them (past_k.<l>.scale), partitions that only a flush fills (past_k.<l>.lo), states of short convolutions, slots of windowed layers.

    Rows beyond a sample's length are zero or stale, never read. `resize` makes new buffers.
    """

    def __init__(self, formats: Mapping[int, KVFormat]) -> None:
        """formats: of the cached layers, in the order of `lengths`."""
        self.formats, self.layers = formats, list(formats)
        self.buffers: Arrays = {}
        self.queries: Arrays = {}  # q.<l> of the last step, where a flush asks for it
        self.parts: Arrays = {"lengths": np.zeros((len(formats), 0), np.int64)}  # and lengths.<partition>: rows that are valid
        self.start = self.lengths  # rows of the prompt
        self.slot = np.zeros((0, 1), np.int64)  # of the next token
        self.bound: Any = None  # what an engine keeps for these very buffers

    @property
    def lengths(self) -> np.ndarray:  # type: ignore[override]
        """[cached layers, B] of the rows that decode appends to."""
        return self.parts["lengths"]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.buffers.values())

    @property
    def batch(self) -> int:
        return self.lengths.shape[1]

    def rows(self, layer: int, part: Partition | None = None) -> int:
        """Rows that there is room for."""
        return self.buffers[f"past_k.{layer}{part.suffix() if part else ''}"].shape[2]

    def of(self, layer: int, part: Partition) -> Iterator[tuple[str, int, int]]:
        """Buffers of a partition that have rows: name, axis of the rows, tokens to a row."""
        for which in "kv":
            name = f"past_{which}.{layer}{part.suffix()}"
            yield name, 2, 1
            if part.per(which) != "channel":
                yield from ((f"{name}.{s}", 2, part.block(which) or 1) for s in part.states(which) if s != "balance")
        if part.name == APPENDED and f"past_pos.{layer}" in self.buffers:
            yield f"past_pos.{layer}", 1, 1

    def resize(self, layer: int, part: Partition, rows: int) -> None:
        """Room for `rows` rows: cut, or with zeros behind."""
        self.bound = None
        for name, axis, block in self.of(layer, part):
            old = self.buffers[name]
            shape = [*old.shape]
            shape[axis] = -(-rows // block)
            kept = (slice(None),) * axis + (slice(0, min(shape[axis], old.shape[axis])),)
            self.buffers[name] = np.zeros(shape, old.dtype)
            self.buffers[name][kept] = old[kept]

    def grow(self) -> None:
        """Room for one more row in every layer (twice the rows)."""
        for row, layer in enumerate(self.layers):
            have = self.rows(layer)
            if int(self.lengths[row].max(initial=0)) >= have:
                self.resize(layer, self.formats[layer].partitions[0], 2 * have)

    def write(self, layer: int, outputs: Arrays) -> None:
        """Put the new rows k.<l>[B, G, 1, D] and the like (where they are given) behind the valid ones."""
        at, samples = self.lengths[self.layers.index(layer)], np.arange(self.batch)
        for name, axis, _ in self.of(layer, self.formats[layer].partitions[0]):
            if axis == 1:
                self.buffers[name][samples, at] = self.slot[:, 0]
            elif (made := name.removeprefix("past_")) in outputs:
                self.buffers[name][samples, :, at] = outputs[made][:, :, 0]

    def advance(self) -> None:
        self.parts["lengths"] = self.lengths + 1
        self.slot = self.slot + 1

    def due(self) -> dict[int, np.ndarray]:
        """layer -> samples in which so many appended rows wait that a flush moves the oldest"""
        found = {}
        for row, layer in enumerate(self.layers):
            form = self.formats[layer]
            if form.residual and (ready := np.flatnonzero(self.lengths[row] >= form.residual + form.keep)).size:
                found[layer] = ready
        return found

    def settle(self, layer: int, samples: np.ndarray, flushed: Arrays, spare: int) -> None:
        """Append what a flush made of the oldest rows of these samples to their partitions, and move the rows behind to the front.

        spare: rows that a partition must have behind its valid ones.
        """
        form, row = self.formats[layer], self.layers.index(layer)
        for part in form.partitions[1:]:
            moved = dict(form.flush).get(part.name, 0)
            if not moved:
                continue
            lengths = self.parts[f"lengths{part.suffix()}"]
            need = int(lengths[row][samples].max()) + moved + spare
            if need > self.rows(layer, part):
                self.resize(layer, part, need)
            for name, _, block in self.of(layer, part):
                value = flushed[name.removeprefix("past_")]
                for b in samples:
                    start = int(lengths[row, b]) // block
                    self.buffers[name][b, :, start : start + value.shape[2]] = value[b]
            lengths[row, samples] += moved
        for which in "kv":
            waiting = self.buffers[f"past_{which}.{layer}"]
            waiting[samples, :, : -form.residual] = waiting[samples][:, :, form.residual :]
        self.lengths[row, samples] -= form.residual

    def clip_rate(self) -> float | None:
        return clip_rate(self.formats, self.start, self.lengths, self.codes)

    def codes(self, name: str) -> np.ndarray:
        """int8 codes[B, G, C, D] of a past with one scale per channel."""
        stored, width = self.buffers[name], self.buffers[f"{name}.scale"].shape[3]
        bits = BITS[self.formats[int(name.split(".")[1])].partitions[0].code]
        if bits == 8:
            return stored
        digits = np.stack([(stored >> (bits * i)) & (2**bits - 1) for i in range(8 // bits)], -1)
        return digits.reshape(*stored.shape[:3], -1)[..., :width].astype(np.int8) - np.int8(2 ** (bits - 1))

    def take(self, samples: np.ndarray) -> HostCache:
        other = HostCache(self.formats)
        other.buffers = {n: np.ascontiguousarray(a[samples]) for n, a in self.buffers.items()}
        other.queries = {n: a[samples] for n, a in self.queries.items()}
        other.parts = {n: a[:, samples] for n, a in self.parts.items()}
        other.start, other.slot = self.start[:, samples], self.slot[samples]
        return other


def check_prefix(mask: np.ndarray) -> None:
    """Engines take padding on the right only."""
    if mask.shape[1] > 1 and bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise LowerError("prefill: attention_mask has padding on the left or in between; pad on the right")
