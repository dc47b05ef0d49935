"""The cut: at the entry of layer k, everything that crosses and carries tokens is gathered with one index.

Order is preserved, so causal stays causal, and kept tokens come first, so padding is on the right behind a cut wherever it was before.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.kv_table import derive_kv
from ..graph.program import Program, Stage
from ..graph.retype import reroute, retype
from ..graph.sites import Crossing, Site, depends_on, role, same
from ..graph.splice import splice
from ..graph.stage import sweep
from .renumber import count_anew, decode_by_length

F = torch.ops.foveate


def plan(keep: Tensor, visual: Tensor, valid: Tensor, visual_index: Tensor, size: int, count: int) -> tuple[Tensor, ...]:
    """keep, visual, valid [B, T] bool, visual_index[B, T]  ->  what follows from keeping exactly the tokens where `keep` holds

    index[B, size] gathers them; valid, visual, visual_index [B, size] describe them; kept[B, count] lists the visual_index of the kept visual
    tokens, -1 where a sample has fewer.
    """
    index = F.compact_tokens(keep, size)
    held = torch.arange(index.shape[1], device=keep.device)[None] < keep.sum(1, keepdim=True)
    stays = keep & visual
    listed = F.keep_tokens(visual_index, F.compact_tokens(stays, count))
    kept = torch.where(torch.arange(listed.shape[1], device=keep.device)[None] < stays.sum(1, keepdim=True), listed, -1)
    return index, held, F.keep_tokens(visual, index) & held, F.keep_tokens(visual_index, index), kept


def cut(program: Program, site: Site, keep: Node, size: Any, count: Any, compact: bool = False) -> Node:
    """Keep the tokens where keep[B, T] holds, in prefill, from `site` on; returns the gather index[B, size].

    size: the sequence length behind the site; count: an upper bound on the visual tokens that stay. Both int or SymInt nodes.
    compact: kept tokens are numbered anew, in decode too; else they keep the positions of the prompt.
    The KV table follows; `kept.layer<k>` becomes an output (the proof that something was dropped, and what).
    """
    stage = program["prefill"]
    roles = [role(program, name, site.first) for name in ("visual", "valid", "visual_index")]
    index, valid, visual, visual_index, kept = splice(stage, site.first, plan, keep, *roles, size, count)
    for node, name in ((valid, "valid"), (visual, "visual"), (visual_index, "visual_index")):
        node.meta["role"] = name
    if compact:
        count_anew(stage, site.first, index)
    shorten(stage, site, index, valid)
    stage.add_output(_free_name(stage, f"kept.layer{site.layer}"), kept)
    sweep(stage)
    retype(stage)
    stage.module.recompile()
    program.kv = derive_kv(program)
    if compact:
        decode_by_length(program, site.layer)
    return index


def shorten(stage: Stage, site: Site, index: Node, valid: Node) -> None:
    """Let every reader behind the site read its crossing values gathered by index[B, K]; valid[B, K] tells real tokens from filler."""
    new = shortened(stage, site, index, valid)
    for crossing in site.crossings:
        for reader in crossing.readers:
            reroute(reader, crossing.node, new[crossing.node])


def shortened(stage: Stage, site: Site, index: Node, valid: Node) -> dict[Node, Any]:
    """crossing value -> the same for the tokens index[B, K] only, computed just before the site."""
    with stage.graph.inserting_before(site.first):
        length = stage.graph.call_function(torch.ops.aten.sym_size.int, (index, 1))
    length.meta["val"] = index.meta["val"].shape[1]
    sizes: dict[Node, Any] = {}
    return {c.node: splice(stage, site.first, gather, c.node, index, valid, c.axes, _batch_axis(c.node, index)) if c.axes
            else _rebuild(stage, site, c.node, length, sizes) for c in site.crossings}


def gather(x: Tensor, index: Tensor, valid: Tensor, axes: tuple[int, ...], batch: int) -> Tensor:
    """x with each of its token axes gathered; bool masks are False, and additive masks the smallest number, on filler keys."""
    if x.dim() == 1:  # one list for the whole batch, as arange(T)
        return F.keep_tokens(x[None], index)
    for axis in axes:
        x = _take(x, index, axis, batch)
    if x.dtype == torch.bool or (x.is_floating_point() and len(axes) == 2):
        seen = valid.reshape(valid.shape[0], *[1] * (x.dim() - 2), valid.shape[1]) if axes[-1] == x.dim() - 1 else None
        if seen is not None:
            x = x & seen if x.dtype == torch.bool else torch.where(seen, x, torch.finfo(x.dtype).min)
    return x


def _take(x: Tensor, index: Tensor, axis: int, batch: int) -> Tensor:
    if batch == 1 and x.dim() == 3:
        return torch.stack([F.keep_tokens(row, index) for row in x.unbind(0)])
    if axis == 1:
        return F.keep_tokens(x, index)
    return F.keep_tokens(x.transpose(1, axis), index).transpose(1, axis)


def _batch_axis(node: Node, index: Node) -> int:
    """The axis of samples: 0, except where another axis is as long as the batch (mrope positions are [3, B, T])."""
    shape = node.meta["val"].shape
    return next((i for i, d in enumerate(shape) if same(d, index.meta["val"].shape[0])), 0)


def _rebuild(stage: Stage, site: Site, node: Any, length: Node, done: dict[Node, Any]) -> Any:
    """A size that crosses is arithmetic on T: replay it on the new length."""
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), torch.SymInt) or not depends_on(node.meta["val"], site.length):
        return node
    if same(node.meta["val"], site.length):
        return length
    if node not in done:
        with stage.graph.inserting_before(site.first):
            arguments = [_rebuild(stage, site, a, length, done) for a in node.args]
            done[node] = stage.graph.call_function(node.target, tuple(arguments), dict(node.kwargs))
    return done[node]


def _free_name(stage: Stage, name: str) -> str:
    taken = sum(1 for o in stage.outputs if o == name or o.startswith(f"{name}."))
    return name if not taken else f"{name}.{taken + 1}"


def require_visual(program: Program, count: int) -> None:
    """From now on a sample must bring at least `count` visual rows (the runtime pads with empty ones)."""
    program.facts = replace(program.facts, min_visual=max(program.facts.min_visual, count))


__all__ = ["Crossing", "cut", "gather", "plan", "require_visual", "shorten", "shortened"]
