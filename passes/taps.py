"""Taps: what a score inside the language model may read. The names of its arguments choose; nothing that nobody asks for is built.

    hidden[B, T, D], visual, valid [B, T] bool, visual_index[B, T]     the residual stream at the site, and what its tokens are
    q[B, H, T, D], k, v [B, G, T, D], mask, scale, causal, softcap     of the last attention before the site
    next_q[B, H, 1, D], next_k[B, G, T, D], next_scale, next_softcap   of the layer behind the site, q at the last valid row only
    rope[B, T, 2 d] or None                                            cosines and sines of the rotary positions; None where there are none
    normed[B, T, D]                                                    the stream through the model's final norm
    rows[B, R], row_weight[B, R]                                       the question: text behind the last visual token; weights sum to 1
    raters[B, R]                                                       the same rows, weighted by their relevance to the image (SparseVLM)
    image[B, T]                                                        which image of the sample a visual token comes from
    original[B], budget[B]                                             visual tokens of the sample in the prompt, and those that may stay
R = S - N, the largest number of text tokens of a sample.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.program import Program, Stage
from ..graph.retype import retype
from ..graph.sites import Site, layer_of, role, site
from ..graph.splice import splice
from .cut import shortened

F = torch.ops.foveate
ATTENTION = ("q", "k", "v", "mask", "scale", "causal", "softcap")
AHEAD = ("next_q", "next_k", "next_scale", "next_softcap")
ROLES = ("visual", "valid", "visual_index")
TABLES = (torch.ops.aten.cos.default, torch.ops.aten.sin.default)
QUESTION = ("rows", "row_weight", "raters")


def collect(program: Program, where: Site, names: list[str]) -> dict[str, Any]:
    """Those of `names` that there are at the site, as nodes (or the plain operands of the attention)."""
    found: dict[str, Any] = {"hidden": where.hidden}
    found |= {name: role(program, name, where.first) for name in ROLES}
    groups: list[tuple[tuple[str, ...], Callable[[Program, Site], dict[str, Any]]]] = [
        (ATTENTION, before), (AHEAD, ahead), (("rope",), rope), (("normed",), normed), (QUESTION, question), (("original",), original), (("image",), image)]
    for group, build in groups:
        if set(group) & set(names):
            found |= build(program, where)
    return found


def last_valid(valid: Tensor) -> Tensor:
    """valid[B, T] bool  ->  [B, 1]: the position of the last valid token"""
    return torch.where(valid, torch.arange(valid.shape[1], device=valid.device)[None], 0).amax(1, keepdim=True)


def before(program: Program, where: Site) -> dict[str, Any]:
    """The last attention before the site."""
    attention = None
    for node in program["prefill"].graph.nodes:
        if node is where.first:
            break
        if node.target is F.attention.default:
            attention = node
    if attention is None:
        return {}
    q, k, v, mask, _, _, scale, causal, _, softcap, _ = attention.args
    return dict(zip(ATTENTION, (q, k, v, mask, scale, causal, softcap), strict=True))


def ahead(program: Program, where: Site) -> dict[str, Any]:
    """The attention of the layer behind the site, on the sequence as it is before any cut there; queries are projected for one row only."""
    stage = program["prefill"]
    nodes = list(stage.graph.nodes)
    attention = next((n for n in nodes[nodes.index(where.first) :] if n.target is F.attention.default), None)
    if attention is None:
        return {}
    valid = role(program, "valid", where.first)
    row = splice(stage, where.first, last_valid, valid)
    held = splice(stage, where.first, lambda r: torch.ones_like(r, dtype=torch.bool), row)
    q = replay(stage, where, attention.args[0], shortened(stage, where, row, held))
    k = replay(stage, where, attention.args[1], {})
    retype(stage)
    return dict(zip(AHEAD, (q, k, attention.args[6], attention.args[9]), strict=True))


def replay(stage: Stage, where: Site, wanted: Node, feed: dict[Node, Any]) -> Node:
    """Copy to before the site what lies between the site and `wanted`, reading `feed` instead of its keys; copies belong to no layer."""
    nodes = list(stage.graph.nodes)
    behind = set(nodes[nodes.index(where.first) :])
    done: dict[Node, Any] = dict(feed)

    def copy(node: Node) -> Any:
        if node in done or node not in behind or node.op == "get_attr":
            return done.get(node, node)
        if node.target is F.kv_store.default:  # marks the layer's own rows
            return copy(node.args[0])
        for source in node.all_input_nodes:
            done[source] = copy(source)
        with stage.graph.inserting_before(where.first):
            new = stage.graph.node_copy(node, lambda n: done.get(n, n))
        new.meta = {}
        done[node] = new
        return new

    return copy(wanted)


def rope(program: Program, where: Site) -> dict[str, Any]:
    """The tables that every layer rotates by, as they cross the site."""
    found = {}
    for crossing in where.crossings:
        value, node = crossing.node.meta["val"], crossing.node
        if crossing.axes != (1,) or node is where.hidden or value.dim() != 3 or not value.is_floating_point():
            continue
        while node.target not in TABLES and len(node.all_input_nodes) == 1:  # through casts and scales
            node = node.all_input_nodes[0]
        if node.target in TABLES:
            found[node.target] = crossing.node
    if len(found) < 2:
        return {"rope": None}
    return {"rope": splice(program["prefill"], where.first, lambda c, s: torch.cat([c, s], -1), *(found[t] for t in TABLES))}


def normed(program: Program, where: Site) -> dict[str, Any]:
    """The residual stream through what lies between the last layer and the head."""
    stage, pattern = program["prefill"], re.compile(program.facts.layer_path)
    nodes = list(stage.graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    last = max(i for n, i in order.items() if n.op == "call_function" and layer_of(n, pattern) is not None)
    picked = next(n for n in nodes if n.target is F.last_token.default)
    source = picked.args[0]
    while order[source] > last:  # up the stream to what the last layer returns
        source = max((n for n in source.all_input_nodes if n.op == "call_function"), key=order.__getitem__)
    new = replay(stage, where, picked.args[0], {source: where.hidden})
    retype(stage)
    return {"normed": new}


def original(program: Program, where: Site) -> dict[str, Any]:
    """How many visual tokens every sample's prompt has."""
    first = site(program, 0).first
    count = splice(program["prefill"], first, lambda a, b: (a & b).sum(1), role(program, "visual", first), role(program, "valid", first))
    return {"original": count}


def image(program: Program, where: Site) -> dict[str, Any]:
    """Images in the order of the prompt; a model whose images bring no fixed number of tokens has no such tap."""
    each = program.facts.visual_per_image
    if each is None:
        return {}
    rank = role(program, "visual_index", where.first)
    return {"image": splice(program["prefill"], where.first, lambda r: r.clamp(min=0) // each, rank)}


def question(program: Program, where: Site) -> dict[str, Any]:
    """The question's rows at the site, and their weights; text stays in order behind every cut, so weights found at the input still fit."""
    stage, start = program["prefill"], site(program, 0)
    ids, features = stage.placeholder("input_ids"), stage.placeholder(program.facts.features[0])
    roles = [role(program, name, start.first) for name in ("visual", "valid")]
    weight, raters = splice(stage, start.first, _raters, start.hidden, *roles, ids, features)
    here = [role(program, name, where.first) for name in ("visual", "valid")]
    rows = splice(stage, where.first, lambda v, ok, i, f: F.compact_tokens(ok & ~v, i.shape[1] - f.shape[1]), *here, ids, features)
    return {"rows": rows, "row_weight": weight, "raters": raters}


def _raters(hidden: Tensor, visual: Tensor, valid: Tensor, ids: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """-> row_weight, raters [B, R]: a rater is a question token whose mean softmax similarity to the visual tokens is above the average

    Embeddings of text and image are multiplied as they are (SparseVLM, section 3.2). Where no token is above average, every question token
    rates; a prompt that ends with an image is rated by its last text token.
    """
    R = ids.shape[1] - features.shape[1]
    at = torch.arange(valid.shape[1], device=valid.device)[None]
    seen = visual & valid
    last = torch.where(seen, at, -1).amax(1, keepdim=True)
    text = valid & ~visual
    asked = text & (at > last)
    asked = asked | (~asked.any(1, keepdim=True) & text & (at == torch.where(text, at, -1).amax(1, keepdim=True)))
    rows = F.compact_tokens(text, R)
    held = F.keep_tokens(asked, rows) & (torch.arange(R, device=valid.device)[None] < text.sum(1, keepdim=True))
    count = held.sum(1, keepdim=True).clamp(min=1)
    similar = (hidden.float() @ F.keep_tokens(hidden, rows).float().transpose(1, 2)).masked_fill(~held[:, None], float("-inf"))
    similar = torch.where(held.any(1)[:, None, None], similar, 0).softmax(2)
    relevance = (similar * seen[..., None]).sum(1) / seen.sum(1, keepdim=True).clamp(min=1)
    above = held & (relevance > relevance.sum(1, keepdim=True) / count)
    above = above | (~above.any(1, keepdim=True) & held)
    return held / count, above / above.sum(1, keepdim=True).clamp(min=1)
