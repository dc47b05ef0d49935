"""MustDrop's output-aware cache: tokens that a cut dropped leave the cache of the layers before it too."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge

from ...graph.program import Program
from ..base import Pass
from ..evict import evict_dropped


@dataclass(frozen=True)
class EvictDropped(Pass):
    """Once the last cut has said which tokens the output needs, no layer from `first` on caches others.

    rewrite:
        k.l, v.l, first <= l < layer of the last cut  ->  gathered by what that cut kept;  kv_lengths follow

    Liu et al., "Multi-Stage Vision Token Dropping", 2024 (section 3.4): `drop-must-drop` does it by itself; this is for every other method.
    """

    name: ClassVar[str] = "evict-dropped"
    paper: ClassVar[str] = "arXiv:2411.10803"
    place: ClassVar[str] = "cache"

    first: Annotated[int, Ge(0)] = 0

    def run(self, program: Program) -> bool:
        cuts = {int(n.removeprefix("kept.layer").split(".")[0]) for n in program["prefill"].outputs if n.startswith("kept.layer")}
        if not cuts:
            raise self.fail("no cut drops anything inside the language model; a pass such as drop-fastv comes first")
        if stored := [e.layer for e in program.kv if e.format is not None]:
            raise self.fail(f"layers {stored} are stored in a format already; evict before a pass that gives one")
        if windows := [e.layer for e in program.kv if e.window and self.first <= e.layer < max(cuts)]:
            raise self.fail(f"layers {windows} attend within a window and know their rows by their places; choose `first` behind them")
        if not any(self.first <= e.layer < max(cuts) for e in program.kv):
            return False
        evict_dropped(program, self.first, max(cuts))
        return True
