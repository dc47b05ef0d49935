"""Drop the compute, keep the keys and values: what a cut dropped stays in the cache, in few bits, for questions that come later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor
from torch.fx import Node

from ...graph.kv_format import APPENDED, Partition
from ...graph.program import KVLayer, Program, Stage
from ...graph.retype import retype
from ...graph.sites import role, site
from ...graph.splice import splice
from .. import kv_codecs
from ..base import PASSES
from ..kv_mixed import LO, Code, partition
from ..kv_rows import gathered, origin, output, rows_of, set_lengths
from ..kv_store import StoreKV

F = torch.ops.foveate


@dataclass(frozen=True)
class Cut:
    """A cut of the prefill: at the entry of `layer`, `index` = compact_tokens(keep) gathers what stays."""

    layer: int
    index: Node
    keep: Node  # [B, T] bool
    valid: Node  # [B, T] bool, before the cut


@dataclass(frozen=True)
class KVKeepDropped(StoreKV):
    """Tokens that cuts dropped keep keys and values in every layer behind, computed from their last hidden state by the layer's own norm,
    projections and rotation: no attention, no MLP, so a small part of what dropping saved. Decode sees them, the prompt's other tokens do not.

    rewrite, for a layer l behind a cut that dropped D with stream h:
        x = norm_l(h[D]),  k.l.lo = lo(rope(x Wk_l)),  v.l.lo = lo(x Wv_l);  k.l, v.l of the kept tokens in `hi` codes
    before the first cut:
        k.l, v.l of all tokens -> hi: those that the cut keeps;  lo: those that it drops

    For conversations: the first question decides what is computed, and the second may still look at the rest. Comes after every pass that drops.
    """

    name: ClassVar[str] = "kv-keep-dropped"

    hi: Code = "int8"
    lo: Code = "int4"
    margin: Annotated[float, Ge(1)] | None = None

    def partitions(self, entry: KVLayer) -> tuple[Partition, ...]:
        return (partition(APPENDED, self.hi), *(() if entry.window else (partition(LO, self.lo),)))

    def widen(self, part: Partition) -> float:
        return kv_codecs.widen(part.code, not part.name, self.margin)

    def run(self, program: Program) -> bool:
        if not cuts(program):
            raise self.fail("no cut drops anything inside the language model; a pass such as drop-fastv comes first")
        return super().run(program)

    def prefill(self, program: Program, entry: KVLayer, parts: tuple[Partition, ...]) -> None:
        if len(parts) == 1:
            super().prefill(program, entry, parts)
            return
        stage, rows, found = program["prefill"], rows_of(program, entry), cuts(program)
        passed = [c for c in found if c.layer <= entry.layer]
        if passed:
            kept = (rows.k, rows.v, rows.valid)
            low = self.projected(program, entry, passed)
        else:
            sizes = [stage.placeholder("input_ids"), stage.placeholder(program.facts.features[0])]
            parts_of = splice(stage, output(stage), _split, rows.k, rows.v, found[0].keep, found[0].index, rows.index, rows.valid, *sizes, exact(program))
            kept, low = parts_of[:3], parts_of[3:]
        for part, (k, v, valid) in zip(parts, (kept, low), strict=True):
            for which, node in (("k", k), ("v", v)):
                self.emit(stage, entry, which, node, valid, part, f"{self.name}.{entry.layer}", rows.attention.args[0])
            set_lengths(program, entry, part, splice(stage, output(stage), lambda m: m.sum(1), valid))

    def projected(self, program: Program, entry: KVLayer, passed: list[Cut]) -> tuple[Node, Node, Node]:
        """k, v [B, G, M, D] of all tokens dropped at or before the layer, real ones in front, and which are real [B, M]"""
        stage = program["prefill"]
        groups: list[Any] = []
        sizes = [stage.placeholder("input_ids"), stage.placeholder(program.facts.features[0])]
        for cut in passed:
            index, held = splice(stage, output(stage), _dropped, cut.keep, cut.valid, cut.index, *sizes, exact(program))
            wanted = [origin(_stored(stage, entry.layer, which))[0].args[0] for which in "kv"]
            groups += [*_replayed(program, entry, wanted, cut, passed, index), held]
        return splice(stage, output(stage), _joined, *groups)


def _replayed(program: Program, entry: KVLayer, wanted: list[Node], cut: Cut, passed: list[Cut], index: Node) -> list[Node]:
    """`wanted` for the tokens `index` that `cut` dropped: their stream at the cut goes into the layer as if it were the layer's own."""
    stage = program["prefill"]
    hidden, entering = site(program, cut.layer).hidden, site(program, entry.layer).hidden
    touched = _readers(stage, [*(c.index for c in passed), entering])
    later = {c.index for c in passed if c.layer > cut.layer}
    done: dict[Node, Any] = {cut.index: index}

    def copy(node: Node) -> Any:
        if node in done or node not in touched:
            return done.get(node, node)
        source = hidden if node is entering else node
        if source.target is F.keep_tokens.default and source.args[1] in later:
            done[node] = copy(source.args[0])  # a later cut: these tokens are gone already
            return done[node]
        for one in source.all_input_nodes:
            copy(one)
        with stage.graph.inserting_before(output(stage)):
            done[node] = stage.graph.node_copy(source, lambda n: done.get(n, n))
        done[node].meta = {}
        return done[node]

    made = [copy(node) for node in wanted]
    retype(stage)
    return made


def cuts(program: Program) -> list[Cut]:
    """The cuts of the prefill, by layer, found by what they return: `kept.layer<k>`."""
    found = []
    for layer in sorted({int(name.removeprefix("kept.layer").split(".")[0]) for name in program["prefill"].outputs if name.startswith("kept.layer")}):
        where = site(program, layer)
        index = next((n for n in _above(where.hidden) if n.target is F.keep_tokens.default), None)
        if index is not None and index.args[1].target is F.compact_tokens.default:
            keep = index.args[1].args[0]
            found.append(Cut(layer, index.args[1], keep, role(program, "valid", keep)))
    return found


def _above(node: Node) -> list[Node]:
    return [node, *(a for a in node.args[:1] if isinstance(a, Node))]


def _stored(stage: Stage, layer: int, which: str) -> Node:
    """The layer's own `kv_store`."""
    return next(n for n in stage.graph.nodes if n.target is F.kv_store.default and n.args[1:] == (layer, which))


def _readers(stage: Stage, sources: list[Node]) -> set[Node]:
    """Everything that depends on one of the sources, them included."""
    found = set(sources)
    for node in stage.graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def exact(program: Program) -> bool:
    """Did every cut keep exactly its budget? Else the data decide, and as many as all visual tokens may be gone."""
    return all(getattr(PASSES.get(record.name), "exact", True) for record in program.history)


def _room(keep: Tensor, kept: Tensor, ids: Tensor, features: Tensor, exact: bool) -> Any:
    """A bound on the tokens of keep[B, T] that are gone, of which kept[B, K] stay."""
    return keep.shape[1] - (kept.shape[1] if exact else ids.shape[1] - features.shape[1]) + 1  # never none at all: a range needs a row


def _split(k: Tensor, v: Tensor, keep: Tensor, kept: Tensor, index: Tensor | None, valid: Tensor, ids: Tensor, features: Tensor,
           exact: bool) -> tuple[Tensor, ...]:
    """The rows of a layer before the cut: k, v, valid of those that it keeps, and of those that it drops"""
    here = keep if index is None else F.keep_tokens(keep, index)
    room = _room(keep, kept, ids, features, exact)
    return *gathered(k, v, here & valid, kept.shape[1])[:3], *gathered(k, v, valid & ~here, room)[:3]


def _dropped(keep: Tensor, valid: Tensor, kept: Tensor, ids: Tensor, features: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """index[B, M] of the tokens that are valid and not kept, and which of them are real"""
    gone = valid & ~keep
    index = F.compact_tokens(gone, _room(keep, kept, ids, features, exact))
    return index, torch.arange(index.shape[1], device=keep.device)[None] < gone.sum(1, keepdim=True)


def _joined(*groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    k, v, held = (torch.cat(groups[i::3], 2 if i < 2 else 1) for i in range(3))
    if len(groups) == 3:
        return k, v, held
    return gathered(k, v, held, held.shape[1])[:3]
