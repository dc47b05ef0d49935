"""Learned maps from the visual tokens of an image to fewer ones, between the vision tower and the language model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from torch import Tensor
from torch.fx import Node

from ..graph.program import Program
from ..graph.retype import reroute, retype
from ..graph.splice import splice
from ..graph.stage import sweep
from .insert import Insertion
from .vision_place import Place, find_place

Initial = dict[str, Callable[[], Tensor]]


class VisionInsertion(Insertion):
    """Bring fewer tokens per image to the language model, through learned tensors.

    rewrite:
        x[images, n, D] -> projector  =>  map(x, learned...)[images, K, D] -> projector

    The prefill sees a shorter image; its graph does not change. A subclass says how many tokens there will be (`count`), which tensors it learns
    and how they start (`initial`), and what it does with them (`map`).
    """

    after_projector: ClassVar[bool] = False

    @abstractmethod
    def count(self, place: Place) -> int: ...

    @abstractmethod
    def initial(self, place: Place, width: int) -> Initial: ...

    @abstractmethod
    def map(self, x: Tensor, place: Place, **learned: Tensor) -> Tensor:
        """x[images, n, D] -> [images, K, D]"""

    def run(self, program: Program) -> bool:
        if program.facts.positions.get("kind") == "mrope":
            raise self.fail(f"makes tokens that stand for no single patch, and {program.facts.model_type} gives every token the position of its patch")
        place = find_place(program, ("grid",), self.after_projector, self.fail)
        if len(place.nodes) != 1:
            raise self.fail(f"maps one tensor of features, and {program.facts.model_type} has {len(place.nodes)} ({', '.join(program.facts.features)})")
        count = self.count(place)
        if count >= place.n:
            raise self.fail(f"would make {count} tokens of the {place.n} of an image; it must be fewer")
        stage, old = program["vision"], place.nodes[0]
        before = next(n for n in stage.graph.nodes if n.op == "output") if place.flat else old.next
        readers = [before] if place.flat else list(old.users)
        width = int(old.meta["val"].shape[-1])
        learned = {name: self.learn(program, "vision", before, name, make) for name, make in self.initial(place, width).items()}
        names = list(learned)

        def reduce(x: Tensor, *values: Tensor) -> Tensor:
            y = self.map(x.view(-1, place.n, width) if place.flat else x, place, **dict(zip(names, values, strict=True)))
            return y.flatten(0, 1) if place.flat else y

        new: Node = splice(stage, before, reduce, old, *learned.values())
        for reader in readers:
            reroute(reader, old, new)
        sweep(stage)
        retype(stage)
        stage.module.recompile()
        program.facts = replace(program.facts, features_per_image=count)
        return True

    def grid(self, place: Place) -> tuple[int, int]:
        if place.grid is None:
            raise self.fail("needs images of a fixed grid; this model has none")
        return place.grid

    def blocks(self, place: Place, side: int) -> int:
        """How many side x side blocks the grid has; one that does not divide it is refused."""
        rows, columns = self.grid(place)
        if rows % side or columns % side:
            raise self.fail(f"takes blocks of {side} x {side}, which do not divide the grid of {rows} x {columns}")
        return rows * columns // side**2


def to_blocks(x: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """x[I, rows * columns, D] -> [I, blocks, side * side, D], blocks and their tokens in reading order"""
    rows, columns = grid
    y = x.reshape(-1, rows // side, side, columns // side, side, x.shape[-1])
    return y.permute(0, 1, 3, 2, 4, 5).reshape(-1, rows * columns // side**2, side * side, x.shape[-1])
