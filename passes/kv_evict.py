"""EvictKV: rows that matter least leave the cache after the prompt. The prompt itself is computed whole; decode is untouched."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor
from torch.fx import Node

from ..graph.kv_format import Partition
from ..graph.kv_table import derive_kv
from ..graph.program import KVLayer, Program
from ..graph.retype import retype
from ..graph.sites import role
from ..graph.splice import splice
from ..graph.stage import sweep
from .base import Pass
from .kv_rows import gathered, give, output, rows_of, set_lengths
from .reduce import share
from .taps import ATTENTION, last_valid

F = torch.ops.foveate


def taps_of(program: Program, attention: Node) -> dict[str, Any]:
    """q, k, v, mask, scale, causal, softcap of an attention of the prefill, and visual, valid [B, T] of its tokens."""
    q, k, v, mask, _, _, scale, causal, _, softcap, _ = attention.args
    taps = dict(zip(ATTENTION, (q, k, v, mask, scale, causal, softcap), strict=True))
    return taps | {name: role(program, name, attention) for name in ("visual", "valid")}


def call(method: Callable[..., Tensor], read: dict[str, Any]) -> Tensor:
    """The method with those taps that its arguments name."""
    return method(**{n: read[n] for n in inspect.signature(method).parameters})


def spared(score: Tensor, pool: Tensor, valid: Tensor, sinks: int, recent: int, bound: Any, budget: Tensor) -> Tensor:
    """score, pool, valid [B, T], budget[B]  ->  [B, T] bool: valid tokens outside the pool, and the best budget <= bound of the pool

    The first `sinks` and the last `recent` tokens of the prompt rank before all others.
    """
    at = torch.arange(valid.shape[1], device=valid.device)[None]
    first = torch.where(valid, at, valid.shape[1]).amin(1, keepdim=True)
    always = (at < first + sinks) | (at > last_valid(valid) - recent)
    score = torch.where(pool, torch.where(always, float("inf"), score.float()), float("-inf"))
    return valid & (~pool | F.top_tokens(score, bound, budget))


@dataclass(frozen=True)
class EvictKV(Pass):
    """keep: the share of tokens whose rows stay, to a thousandth, rounded up. layers: which (none named: all).

    text: only visual tokens are evicted, and the share is of them; false: of all tokens. sinks, recent: the first and last tokens of the prompt
    rank before all others. One list per layer, all heads together. Sliding-window layers keep their rows: those are known by their places.
    Comes before passes that give the cache a format.
    """

    place: ClassVar[str] = "cache"
    shapes: ClassVar[str] = "fixed"

    keep: Annotated[float, Gt(0), Le(1)] = 0.5
    layers: tuple[Annotated[int, Ge(0)], ...] = ()
    text: bool = True
    sinks: Annotated[int, Ge(0)] = 4
    recent: Annotated[int, Ge(0)] = 16

    @abstractmethod
    def importance(self, **taps: Any) -> Tensor:
        """-> [B, T], larger is more important; its arguments are names of `taps_of`"""

    def run(self, program: Program) -> bool:
        known = {entry.layer: entry for entry in program.kv}
        if unknown := [l for l in self.layers if l not in known]:
            raise self.fail(f"no cached layers {unknown}; this program caches {sorted(known)}")
        chosen = [known[l] for l in self.layers or known if not known[l].window]
        if stored := [e.layer for e in chosen if e.format is not None]:
            raise self.fail(f"layers {stored} are stored in a format already; evict before a pass that gives one")
        if not chosen or self.keep == 1:
            return False
        for entry in chosen:
            self.evict(program, entry)
        stage = program["prefill"]
        sweep(stage)
        retype(stage)
        stage.module.recompile()
        program.kv = derive_kv(program)
        return True

    def evict(self, program: Program, entry: KVLayer) -> None:
        stage, rows = program["prefill"], rows_of(program, entry)
        taps = taps_of(program, rows.attention)
        sizes = [stage.placeholder("input_ids"), stage.placeholder(program.facts.features[0])]

        def choose(ids: Tensor, features: Tensor, *values: Any) -> tuple[Tensor, Any]:
            return self.choose(dict(zip(taps, values, strict=True)), ids.shape[1] - features.shape[1])

        stays, size = splice(stage, rows.attention.next, choose, *sizes, *taps.values())
        k, v, _, count = splice(stage, output(stage), self.gather, rows.k, rows.v, stays, rows.index, rows.valid, size)
        for which, node in (("k", k), ("v", v)):
            give(stage, f"{which}.{entry.layer}", node, f"{self.name}.{entry.layer}")
        set_lengths(program, entry, Partition(), count)

    def choose(self, read: dict[str, Any], words: Any) -> tuple[Tensor, Any]:
        """From the taps, and the largest number of text tokens of a sample, to which tokens stay [B, T], and a bound on their number."""
        visual, valid = read["visual"], read["valid"]
        text = words if self.text else 0
        pool, size = visual & valid if self.text else valid, valid.shape[1] - text
        bound, budget = share(self.keep, size), share(self.keep, pool.sum(1))
        return spared(call(self.importance, read), pool, valid, self.sinks, self.recent, bound, budget), bound + text

    @staticmethod
    def gather(k: Tensor, v: Tensor, stays: Tensor, index: Tensor | None, valid: Tensor, size: Any) -> tuple[Tensor, ...]:
        stays = stays if index is None else F.keep_tokens(stays, index)
        return gathered(k, v, stays & valid, size)
