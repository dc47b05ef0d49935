"""The rows that the prefill returns for the cache: which they are, and how to return others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.kv_format import Partition
from ..graph.program import KVLayer, Program, Stage
from ..graph.sites import role
from ..graph.splice import splice
from .taps import last_valid

F = torch.ops.foveate


@dataclass(frozen=True)
class Rows:
    """What the prefill returns of one layer: k, v [B, G, T, D], valid[B, T] bool, and how they were gathered from what it attends with."""

    k: Node
    v: Node
    valid: Node
    attention: Node  # the layer's own
    index: Node | None  # [B, T] among the rows that it attends with; None: the very same rows


def rows_of(program: Program, entry: KVLayer) -> Rows:
    stage = program["prefill"]
    k, v = (stage.output_nodes[f"{which}.{entry.layer}"] for which in "kv")
    store, index = origin(k)
    attention = next(u for u in store.users if u.target is F.attention.default)
    if index is None:
        return Rows(k, v, role(program, "valid", attention), attention, None)
    row = position(program, entry)  # whoever gathered rows left the valid ones in front
    valid = splice(stage, output(stage), lambda x, lengths: F.kv_held(x, lengths, row), k, stage.output_nodes["kv_lengths"])
    return Rows(k, v, valid, attention, index)


def origin(node: Node) -> tuple[Node, Node | None]:
    """From what is returned for a layer back to its `kv_store`, and the index that its rows were gathered with (composed, if several)."""
    index = None
    while node.target is not F.kv_store.default:
        if node.target is F.keep_tokens.default:
            if index is not None:
                graph = node.graph
                with graph.inserting_before(output_of(graph)):
                    index = graph.call_function(F.keep_tokens.default, (node.args[1], index))
                index.meta["val"] = index.args[1].meta["val"]
            else:
                index = node.args[1]
        node = node.args[0]
    return node, index


def position(program: Program, entry: KVLayer) -> int:
    """The layer's row in kv_lengths."""
    return [e.layer for e in program.kv].index(entry.layer)


def gathered(k: Tensor, v: Tensor, keep: Tensor, size: int) -> tuple[Tensor, ...]:
    """The rows [B, G, T, D] where keep[B, T] holds, in front, as [B, G, size, D]; which of those are real [B, size]; how many [B]"""
    index = F.compact_tokens(keep, size)
    count = keep.sum(1)
    held = torch.arange(size, device=keep.device)[None] < count[:, None]
    k, v = (F.keep_tokens(x.transpose(1, 2), index).transpose(1, 2).contiguous() for x in (k, v))
    return k, v, held, count


def newest(valid: Tensor, count: int) -> Tensor:
    """valid[B, T]  ->  [B, T] bool: the last `count` valid rows"""
    return valid & (torch.arange(valid.shape[1], device=valid.device)[None] > last_valid(valid) - count)


def output(stage: Stage) -> Node:
    return output_of(stage.graph)


def output_of(graph: torch.fx.Graph) -> Node:
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def give(stage: Stage, name: str, node: Node, held: str = "") -> None:
    """Return `node` under `name`, instead of what was returned under it. held: what names the tokens, equal in layers that hold the same."""
    if held:
        node.meta["held"] = held
    if name not in stage.outputs:
        stage.add_output(name, node)
        return
    out = output(stage)
    values = list(out.args[0])
    values[stage.outputs.index(name)] = node
    out.args = (tuple(values),)


def set_lengths(program: Program, entry: KVLayer, part: Partition, count: Node) -> None:
    """The layer's row of kv_lengths (of kv_lengths.<partition>) is count[B]."""
    stage, name, row = program["prefill"], f"kv_lengths{part.suffix()}", position(program, entry)
    fresh = name not in stage.outputs

    def put(lengths: Tensor, count: Tensor) -> Tensor:
        rows = torch.zeros_like(lengths) if fresh else lengths
        here = torch.arange(rows.shape[0], device=rows.device)[:, None] == row
        return torch.where(here, count[None].to(rows.dtype), rows)

    give(stage, name, splice(stage, output(stage), put, stage.output_nodes["kv_lengths" if fresh else name], count))

