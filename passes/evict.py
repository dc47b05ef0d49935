"""Evict: rows of tokens that a later cut drops leave the cache of earlier layers too (KV policy `retroactive`)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.kv_table import derive_kv
from ..graph.program import Program, Stage
from ..graph.retype import retype
from ..graph.sites import layers, role
from ..graph.splice import splice
from ..graph.stage import sweep

F = torch.ops.foveate
TEXT = 1 << 40  # behind any visual index


def evict_dropped(program: Program, first: int, last: int) -> None:
    """The cached layers first <= l < last return only the rows whose tokens the sequence behind the cut at `last` still has.

    Rows stay rotated by their original positions, so the decode stage needs no change but shorter pasts.
    """
    stage, starts = program["prefill"], layers(program["prefill"], program.facts.layer_path)
    out = next(n for n in reversed(stage.graph.nodes) if n.op == "output")

    def tokens(layer: int) -> tuple[Node, ...]:
        return tuple(role(program, name, starts[layer]) for name in ("visual", "valid", "visual_index"))

    index: dict[tuple[Node, ...], Node] = {}
    cached = [entry.layer for entry in program.kv]
    for layer in (l for l in cached if first <= l < last):
        here = tokens(layer)
        if here not in index:
            index[here] = splice(stage, out, _find, *tokens(last), *here)
        for name in (f"k.{layer}", f"v.{layer}"):
            _return(stage, name, splice(stage, out, _rows, stage.output_nodes[name], index[here]))
    chosen = [first <= l < last for l in cached]
    _return(stage, "kv_lengths", splice(stage, out, _lengths, stage.output_nodes["kv_lengths"], tokens(last)[1], chosen))
    sweep(stage)
    retype(stage)
    stage.module.recompile()
    program.kv = derive_kv(program)


def _find(visual: Tensor, valid: Tensor, rank: Tensor, seen: Tensor, held: Tensor, at: Tensor) -> Tensor:
    """What the tokens [B, K] of the last cut and those [B, T] of a layer before are  ->  index[B, K] of the former among the latter

    A visual token is known by its rank among the visual ones of the prompt; text never goes, so it is known by its rank among the text.
    """
    wanted, there = _name(visual, valid, rank), _name(seen, held, at)
    same = (wanted[:, :, None] == there[:, None, :]) & held[:, None, :]
    return torch.where(valid, same.long().argmax(2), there.shape[1] - 1)


def _name(visual: Tensor, valid: Tensor, rank: Tensor) -> Tensor:
    return torch.where(visual, rank, TEXT + (valid & ~visual).long().cumsum(1))


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return F.keep_tokens(x.transpose(1, 2), index).transpose(1, 2).contiguous()


def _lengths(lengths: Tensor, valid: Tensor, chosen: list[bool]) -> Tensor:
    rows = torch.stack([valid.sum(1) if c else row for c, row in zip(chosen, lengths.unbind(0), strict=True)])
    return rows.to(lengths.dtype)


def _return(stage: Stage, name: str, node: Node) -> None:
    out = next(n for n in reversed(stage.graph.nodes) if n.op == "output")
    values = list(out.args[0])
    values[stage.outputs.index(name)] = node
    out.args = (tuple(values),)
