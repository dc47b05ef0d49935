"""StoreKV: prefill and decode are rewritten together so that a layer's cache holds codes. The base of every KV pass.

prefill returns, per layer, the rows of every partition as codes with their scales and centres; it attends with exact keys and values.
decode takes those as pasts, attends over all of them and the new row as it will be stored, and returns that row for the partition that grows.
KV passes come last in a recipe: cuts look for the rows that attention reads.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor
from torch.fx import Node

from ..graph.kv_format import KVFormat, Partition
from ..graph.kv_table import derive_kv, past_symbol
from ..graph.program import KVLayer, Program, Stage
from ..graph.retype import new_size, new_value, reroute, retype
from ..graph.splice import splice
from ..graph.stage import sweep
from . import kv_codecs
from .base import Pass
from .kv_flush import add_flush
from .kv_rows import give, output, position, rows_of

F = torch.ops.foveate
SAMPLE = 937  # any size that nothing else has: a new symbol stands for it


@dataclass(frozen=True)
class StoreKV(Pass):
    """Gives layers a format. `layers`: which (none named: all that have none yet)."""

    place: ClassVar[str] = "cache"

    layers: tuple[Annotated[int, Ge(0)], ...] = ()

    @abstractmethod
    def partitions(self, entry: KVLayer) -> tuple[Partition, ...]:
        """The partitions of a layer; the first is the one that grows."""

    def run(self, program: Program) -> bool:
        entries = self.chosen(program)
        for entry in entries:
            parts = self.partitions(entry)
            self.prefill(program, entry, parts)
            take(program, entry, parts)
            program.kv = [replace(e, format=self.format(e, parts)) if e.layer == entry.layer else e for e in program.kv]
        for stage in (program["prefill"], program["decode"]):
            sweep(stage)
            retype(stage)
            stage.module.recompile()
        program.kv = derive_kv(program)
        add_flush(program)
        return bool(entries)

    def format(self, entry: KVLayer, parts: tuple[Partition, ...]) -> KVFormat:
        return KVFormat(parts)

    def chosen(self, program: Program) -> list[KVLayer]:
        if not program.kv or "decode" not in program.stages:
            raise self.fail(f"the program has no cache to store: stages {list(program.stages)}, {len(program.kv)} cached layers")
        known = {entry.layer: entry for entry in program.kv}
        if unknown := [l for l in self.layers if l not in known]:
            raise self.fail(f"no cached layers {unknown}; this program caches {sorted(known)}")
        if taken := [l for l in self.layers if known[l].format is not None]:
            raise self.fail(f"layers {taken} have a format already; a token is quantized once")
        found = [known[l] for l in self.layers] if self.layers else [e for e in program.kv if e.format is None]
        if not found:
            raise self.fail("every cached layer has a format already; name layers in an earlier step to give each its own")
        return found

    def prefill(self, program: Program, entry: KVLayer, parts: tuple[Partition, ...]) -> None:
        """Return the layer's rows as the partitions store them. One partition: all rows, in their order."""
        rows, stage = rows_of(program, entry), program["prefill"]
        for which, node in (("k", rows.k), ("v", rows.v)):
            self.emit(stage, entry, which, node, rows.valid, parts[0], str(entry.segment), rows.attention.args[0])

    def emit(self, stage: Stage, entry: KVLayer, which: str, node: Node, valid: Node, part: Partition, held: str, q: Node, *of: Node) -> None:
        """Return node[B, G, T, D] as the partition stores it. held: names the tokens; q: the layer's queries; of: the rows [B, G, T', D] and which
        are valid [B, T'], if ranges are to be those of other rows."""
        if part.code == "float":
            give(stage, f"{which}.{entry.layer}{part.suffix()}", node, held)
            return

        def store(x: Tensor, all_rows: Tensor, valid: Tensor, q: Tensor) -> tuple[Tensor, ...]:
            balance = kv_codecs.balance(all_rows, valid, q if which == "k" else None) if which in part.balanced else None
            state = kv_codecs.states(all_rows, valid, part, which, self.widen(part) if part.per(which) == "channel" else 1.0, balance)
            return kv_codecs.encode(x, state, part, which), *state

        made = splice(stage, output(stage), store, node, *(of if of and part.per(which) == "channel" else (node, valid)), q)
        name = f"{which}.{entry.layer}{part.suffix()}"
        for suffix, value in zip(("", *(f".{s}" for s in part.states(which))), made, strict=True):
            give(stage, name + suffix, value, held)

    def widen(self, part: Partition) -> float:
        """How much wider than the prompt's a range per channel is made."""
        return kv_codecs.widen(part.code, not part.name, None)


def take(program: Program, entry: KVLayer, parts: tuple[Partition, ...]) -> None:
    """Let decode read the layer's pasts as its partitions store them, and return the new row as the first stores it."""
    stage, row = program["decode"], position(program, entry)
    attention = None
    for which in "kv":
        past = stage.placeholder(f"past_{which}.{entry.layer}")
        append = next(u for u in past.users if u.target is F.kv_append.default)
        attention = next(u for u in append.users if u.target is F.attention.default)
        _take_grown(stage, entry, which, past, append, parts[0])
        joined = append
        for part in parts[1:]:
            joined = _take_read(stage, entry, which, past, attention, joined, part)
        if joined is not append:
            reroute(attention, append, joined)
    mask = attention.args[3]
    for part in parts[1:]:
        lengths = stage.add_input(f"lengths{part.suffix()}", stage.placeholder("lengths").meta["val"])
        past = stage.placeholder(f"past_k.{entry.layer}{part.suffix()}")
        mask = splice(stage, attention, lambda p, n, m: torch.cat([F.kv_held(p, n, row), m], 1), past, lengths, mask)
    if mask is not attention.args[3]:
        reroute(attention, attention.args[3], mask)


def _take_grown(stage: Stage, entry: KVLayer, which: str, past: Node, append: Node, part: Partition) -> None:
    if part.code == "float":
        return
    name, new, dtype = f"past_{which}.{entry.layer}", append.args[1], past.meta["val"].dtype
    past.meta["val"] = new_value(stage, past.meta["val"].shape, torch.int8)
    state = [stage.add_input(f"{name}.{s}", new_value(stage, state_shape(part, which, past, s), dtype)) for s in part.states(which)]
    alone = part.per(which).startswith(("token", "group"))  # the new row brings its own scale and centre
    brought = [s for s in part.states(which) if s != "balance"] if alone else []

    def stored(past: Tensor, new: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        own = state
        if alone:
            own = kv_codecs.states(new, torch.ones_like(new[:, 0, :, 0], dtype=torch.bool), part, which, 1.0, state[-1])
        codes = kv_codecs.encode(new, own, part, which)
        return kv_codecs.decode(past, state, part, which, dtype), kv_codecs.decode(codes, own, part, which, dtype), codes, *own[: len(brought)]

    before, row, *made = splice(stage, append, stored, past, new, *state, like=append)
    append.args = (before, row, *append.args[2:])
    append.meta["stale"] = True
    for suffix, node in zip(("", *(f".{s}" for s in brought)), made, strict=True):
        give(stage, f"{which}.{entry.layer}{suffix}", node)


def _take_read(stage: Stage, entry: KVLayer, which: str, past: Node, attention: Node, joined: Node, part: Partition) -> Node:
    name, like = f"past_{which}.{entry.layer}{part.suffix()}", past.meta["val"]
    dtype = joined.meta["val"].dtype
    known = f"past_k.{entry.layer}{part.suffix()}"
    rows = stage.placeholder(known).meta["val"].shape[2] if known in stage.inputs else new_size(stage, past_symbol(known), SAMPLE)
    shape = (*like.shape[:2], rows, like.shape[3])
    codes = stage.add_input(name, new_value(stage, shape, dtype if part.code == "float" else torch.int8))
    state = [stage.add_input(f"{name}.{s}", new_value(stage, state_shape(part, which, codes, s), dtype)) for s in part.states(which)]

    def join(codes: Tensor, new: Tensor, *state: Tensor) -> Tensor:
        return torch.cat([kv_codecs.decode(codes, state, part, which, dtype), new], 2)

    return splice(stage, attention, join, codes, joined, *state, like=attention)


def state_shape(part: Partition, which: str, codes: Node, state: str) -> tuple[Any, ...]:
    """Of a scale, centre or balance of codes[B, G, T, D]."""
    B, G, T, D = codes.meta["val"].shape
    if state == "balance":
        return B, G, 1, D
    kind, _, size = part.per(which).partition(":")
    n = int(size or 1)
    return {"channel": (B, G, 1, D), "token": (B, G, T, 1), "group": (B, G, T, D // n), "block": (B, G, (T + n - 1) // n, D)}[kind]
