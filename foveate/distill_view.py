"""A program's prefill as something that can be trained: many questions behind one image, logits of every answer row, hidden rows of chosen layers.

The view is made before a recipe runs, on a clone, so that every pass carries it along: tokens are looked up by their rank among the text, which no
pass changes, wherever cuts and insertions put them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from .distill_error import DistillError
from .graph.ops import REFERENCE
from .graph.program import Program, Stage
from .graph.retype import new_size, new_value, retype
from .graph.sites import layers, role, site
from .graph.splice import splice

F = torch.ops.foveate
SEGMENT, ANSWERS, TEXTS = "segment", "answer_rows", "text_rows"
EXTRA = (SEGMENT, ANSWERS, TEXTS)


def training_view(program: Program, hidden: Sequence[int] = (), packed: bool = True) -> Program:
    """A clone whose prefill takes also segment[B, S], answer_rows[B, R], text_rows[B, Q] and returns logits[B, R, V] and hidden.<l>[B, Q, D].

    segment: 0 is the shared beginning, i > 0 question i with its answer; a token sees its own segment and the beginning. answer_rows, text_rows:
    ranks among the text tokens of the sample, -1 for none. hidden: layers at whose entry the rows are taken; the number of layers is the end.
    """
    view = program.clone()
    stage = view["prefill"]
    starts = layers(stage, view.facts.layer_path)
    end = max(starts) + 1
    if bad := [l for l in hidden if l not in starts and l != end]:
        raise DistillError(f"distill: no hidden states at layers {bad}; this model has 0..{end - 1}, and {end} for the end")
    first = site(view, 0).first
    visual, valid = role(view, "visual", first), role(view, "valid", first)
    ids = stage.placeholder("input_ids")
    segment = stage.add_input(SEGMENT, ids.meta["val"])
    wanted = {name: stage.add_input(name, _rows(stage, ids.meta["val"].shape[0], name)) for name in (ANSWERS, TEXTS)}
    rank = splice(stage, first, lambda v, ok: torch.where(ok & ~v, (ok & ~v).long().cumsum(1) - 1, -1), visual, valid)
    if packed:
        _pack(stage, first, segment, valid)
    for layer in hidden:
        if layer != end:
            where = site(view, layer)
            stage.add_output(f"hidden.{layer}", splice(stage, where.first, pick, where.hidden, rank, wanted[TEXTS]))
    last = next(n for n in stage.graph.nodes if n.target is F.last_token.default)
    if end in hidden:
        stage.add_output(f"hidden.{end}", splice(stage, last, pick, last.args[0], rank, wanted[TEXTS]))
    last.replace_all_uses_with(splice(stage, last, pick, last.args[0], rank, wanted[ANSWERS]))
    stage.graph.erase_node(last)
    for node in stage.graph.nodes:
        node.meta["stale"] = node.op == "call_function"
    retype(stage)
    stage.module.recompile()
    return view


def pick(x: Tensor, rank: Tensor, rows: Tensor) -> Tensor:
    """x[B, T, D], rank[B, T], rows[B, R]  ->  y[B, R, D]: the token of every rank; the first token where the rank is -1"""
    return F.keep_tokens(x, (rank[:, None, :] == rows[:, :, None]).long().argmax(2))


def _rows(stage: Stage, batch: Any, name: str) -> Tensor:
    """A fake int64[B, R] with a size of its own."""
    prime = {ANSWERS: 8147, TEXTS: 8161}[name]  # no size of a model, and longer than what a comparison could be decided by
    return new_value(stage, (batch, new_size(stage, name, prime)), torch.int64)


def _pack(stage: Stage, first: Node, segment: Node, valid: Node) -> None:
    """Attention sees its own segment and the beginning."""
    nodes = [n for n in stage.graph.nodes if n.target is F.attention.default]
    if any(not n.args[7] or n.args[8] or not isinstance(n.args[3], Node) or n.args[3].meta["val"].dim() != 2 for n in nodes):
        raise DistillError("distill: this model's attention is not plain causal, so questions cannot share one image; set packed to false")

    def allowed(s: Tensor, ok: Tensor) -> Tensor:
        return (((s[:, :, None] == s[:, None, :]) | (s[:, None, :] == 0)) & ok[:, None, :])[:, None]

    mask = splice(stage, first, allowed, segment, valid)
    for node in nodes:
        node.args = (*node.args[:3], mask, *node.args[4:])


def trainable(stage: Stage, outputs: Sequence[str]) -> Named:
    """The stage as a module of torch's own differentiable operators that returns only these outputs, as a dict from keyword inputs."""
    stage = stage.clone()
    found = stage.output_nodes
    out = next(n for n in reversed(stage.graph.nodes) if n.op == "output")
    out.args = (tuple(found[name] for name in outputs),)
    stage.outputs = list(outputs)
    for node in stage.graph.nodes:
        if node.target is F.attention.default:
            node.target = attention
        elif node.op == "call_function" and node.target in REFERENCE:
            node.target = REFERENCE[node.target]
    stage.graph.eliminate_dead_code()
    stage.module.recompile()
    return Named(stage.module, stage.inputs, list(outputs))


class Named(nn.Module):
    """A graph module called by the names of its inputs, which are brought to its device and types; unknown names are ignored."""

    def __init__(self, module: GraphModule, inputs: list[str], outputs: list[str]) -> None:
        super().__init__()
        self.module, self.inputs, self.outputs = module, inputs, outputs
        self.like = dict(zip(inputs, (n.meta["val"] for n in module.graph.nodes if n.op == "placeholder"), strict=True))

    def rows(self, name: str, array: Any) -> Tensor:
        """The processor's array for an input, in its rank: some processors nest [samples, images, ...]."""
        return torch.as_tensor(array).reshape(-1, *array.shape[-self.like[name].dim() + 1 :])

    def forward(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        given = [feeds[n].to(like.device, like.dtype) for n, like in self.like.items()]
        return dict(zip(self.outputs, self.module(*given), strict=True))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, q_pos: Tensor | None, k_pos: Tensor | None, scale: float, causal: bool,
              window: int, softcap: float, layer: int) -> Tensor:
    """`foveate.attention` by torch's fused kernel where that says the same, else by its body. Rows that see nothing are padding and stay finite."""
    if softcap or window or q_pos is not None or q.shape[2] != k.shape[2]:
        return REFERENCE[F.attention.default](q, k, v, mask, q_pos, k_pos, scale, causal, window, softcap, layer)
    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None, :]
    if causal:
        order = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        mask = order if mask is None else mask & order if mask.dtype == torch.bool else mask.masked_fill(~order, unseen(mask.dtype))
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(~mask, unseen(q.dtype))
    y = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return y.transpose(1, 2)


def unseen(kind: torch.dtype) -> float:
    """The logit of a key that is not seen: finite in this type, with room for a logit beside it."""
    return max(-1e30, torch.finfo(kind).min / 2)
