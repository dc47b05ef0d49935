"""How attention and the KV cache are spelt for TensorRT, on the FX graphs: every rule was found by building engines and reading their
kernels.

    respell(program, batch_one)     in place, all stages

Prefill and vision keep one attention node per layer, which becomes TensorRT's fused attention. That kernel takes a causal flag or an
additive
mask, not both; a boolean mask costs seven extra kernels per mask; a soft cap, unequal key and value widths, float32, and head widths off
the
grid (16 to 256 in eights) have no kernel and are spelt out.
Decode is spelt out always: products around a float32 softmax, keys expanded over their group, fold with the concatenation of past and new
rows
into one kernel per layer; the fused op would copy the cache first. They fold only when the batch is fixed. For batch 1 the caller binds
exactly
the valid rows, so the mask goes, and the kernel reads eight values at a time instead of one.
RoPE tables are written to memory once: left as arithmetic they would be fused into the first layer's kernel, and every further layer
would copy its
cache (found by bisection; a sum over an axis of one is the identity that is not fused through).
The cache is token-major, [B, P, G, D], and its codes are read as they lie: `_trt_cache`.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...graph.ops.attention import attention as ATTENTION
from ...graph.ops.attention_varlen import attention_varlen as ATTENTION_VARLEN
from ...graph.ops.compact_tokens import compact_tokens as COMPACT
from ...graph.ops.keep_tokens import keep_tokens as KEEP
from ...graph.ops.last_token import last_token as LAST
from ...graph.ops.top_tokens import top_tokens as TOP
from ...graph.program import Program, Stage
from ...graph.retype import reroute, retype
from ...graph.splice import splice
from ..onnx_select import SELECT
from ._trt_cache import lay_out, of_lengths

aten = torch.ops.aten
SEEN, UNSEEN = 0.0, -30000.0  # an additive mask in float16: below any logit, and the sum with one stays finite
HIDDEN = -1e30  # in float32, as the dialect's own attention
FUSED_WIDTHS = range(16, 257, 8)
# Greedy choices stay unrolled: a Loop builds on its own, and the builder of TensorRT-RTX 1.7.1 dies (SIGSEGV) on a whole stage with one.
BODIES: dict[Any, None] = dict.fromkeys(SELECT)


def respell(program: Program, batch_one: bool) -> None:
    """Rewrite the attention of every stage, and lay the cache out token-major."""
    for name, stage in program.stages.items():
        chosen = any(n.target is COMPACT for n in stage.graph.nodes)
        _Respelling(stage, decode=name == "decode", batch_one=batch_one).run()
        if name == "decode":
            write_tables(stage)
        if name == "prefill" and batch_one:
            double_last_row(stage, chosen)
        if name != "vision":
            lay_out(stage, program.kv)
        stage.graph.eliminate_dead_code()
        retype(stage)
        stage.graph.lint()
        stage.module.recompile()


def fusable(node: Node) -> str | None:
    """Why TensorRT has no fused kernel for this attention node; None when it has one."""
    q, k, v = (a.meta["val"] for a in node.args[:3])
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{str(q.dtype).removeprefix('torch.')} inputs"
    if q.shape[3] not in FUSED_WIDTHS:
        return f"head width {q.shape[3]} (fused: {FUSED_WIDTHS.start} to {FUSED_WIDTHS.stop - 1} in steps of {FUSED_WIDTHS.step})"
    if v.shape[3] != k.shape[3]:
        return f"values {v.shape[3]} wide beside keys {k.shape[3]} wide"
    if node.target is ATTENTION and node.args[9]:
        return f"a soft cap of {node.args[9]}"
    if isinstance(q.shape[2], int) and q.shape[2] == 1:
        return "one query"
    return None


class _Respelling:
    def __init__(self, stage: Stage, decode: bool, batch_one: bool) -> None:
        self.stage, self.graph, self.decode, self.batch_one = stage, stage.graph, decode, batch_one
        self.masks: dict[tuple[Any, ...], Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.target is ATTENTION_VARLEN:
                node = self._as_attention(node)
            if node.target is ATTENTION:
                self._attention(node)
            elif node.target is COMPACT:
                retype(self.stage)  # its operand may just have been respelt
                node.replace_all_uses_with(splice(self.stage, node, compact, *node.args, like=node))
                self.graph.erase_node(node)
            elif node.target is TOP and node.args[2] is None:
                self._top(node)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        made = self.graph.call_function(target, args, kwargs)
        made.meta.update(self.tags)
        return made

    def _attention(self, node: Node) -> None:
        self.tags = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "layer")}
        q, k, v, mask, q_pos, k_pos, scale, causal, window, softcap, _layer = node.args
        if self.decode and self.batch_one and of_lengths(mask):
            mask = None
        if not self.decode and not window and causal and is_padding(mask) and q_pos is k_pos:
            mask = q_pos = k_pos = None  # valid rows come first: a causal query never sees padding, and order is kept by every cut
        with self.graph.inserting_before(node):
            if self.decode or fusable(node):
                new = self._spelt_out(node, q, k, v, mask, q_pos, k_pos, scale, causal, window, softcap)
            elif mask is None and not window:
                node.args = (q, k, v, None, None, None, scale, causal, 0, softcap, _layer)
                return
            else:
                added = self._added(node, mask, q_pos, k_pos, causal, window)
                node.args = (q, k, v, added, None, None, scale, False, 0, softcap, _layer)
                return
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _spelt_out(
        self, node: Node, q: Any, k: Any, v: Any, mask: Any, q_pos: Any, k_pos: Any, scale: float, causal: bool, window: int, softcap: float
    ) -> Node:
        """softmax(q k^T) v, the softmax in float32; scaled before the product, whose float16 sum would otherwise end at 65504."""
        narrow = q.meta["val"].dtype
        groups = q.meta["val"].shape[1] // k.meta["val"].shape[1]
        keys, v = self._expanded(k, groups), self._expanded(v, groups)
        logits = self.call(aten.matmul.default, self.call(aten.mul.Tensor, q, scale), self.call(aten.transpose.int, keys, 2, 3))
        if narrow != torch.float32:
            logits = self.call(aten.to.dtype, logits, torch.float32)
        if softcap:
            logits = self.call(aten.mul.Tensor, self.call(aten.tanh.default, self.call(aten.div.Tensor, logits, softcap)), softcap)
        if isinstance(mask, Node) and mask.meta["val"].is_floating_point():
            logits, mask = self.call(aten.add.Tensor, logits, mask), None
        hidden = self._hidden(mask, q, k, q_pos, k_pos, causal, window)
        if hidden is not None:
            logits = self.call(aten.masked_fill.Scalar, logits, hidden, HIDDEN)
        p = self.call(aten.softmax.int, logits, -1)
        if narrow != torch.float32:
            p = self.call(aten.to.dtype, p, narrow)
        turned = self.call(aten.transpose.int, self.call(aten.matmul.default, p, v), 1, 2)
        return self.call(aten.contiguous.default, turned)  # as the op promises: readers view it

    def _expanded(self, x: Node, groups: int) -> Node:
        if groups == 1:
            return x
        x = self.call(aten.expand.default, self.call(aten.unsqueeze.default, x, 2), [-1, -1, groups, -1, -1])
        return self.call(aten.flatten.using_ints, x, 1, 2)

    def _added(self, node: Node, mask: Any, q_pos: Any, k_pos: Any, causal: bool, window: int) -> Node:
        """The additive mask [B or 1, 1 or H, S, T] in the type of q; layers that say the same share it."""
        key = (mask, q_pos, k_pos, causal, window)
        if key not in self.masks:
            q, k = node.args[0], node.args[1]
            narrow = q.meta["val"].dtype
            if isinstance(mask, Node) and mask.meta["val"].is_floating_point():
                base = self.call(aten.to.dtype, self.call(aten.clamp.default, mask, UNSEEN), narrow)
                hidden = self._hidden(None, q, k, q_pos, k_pos, causal, window)
                self.masks[key] = base if hidden is None else self.call(aten.masked_fill.Scalar, base, hidden, UNSEEN)
            else:
                hidden = self._hidden(mask, q, k, q_pos, k_pos, causal, window)
                self.masks[key] = self.call(aten.mul.Tensor, self.call(aten.to.dtype, hidden, narrow), UNSEEN)
        return self.masks[key]

    def _hidden(self, mask: Any, q: Node, k: Node, q_pos: Any, k_pos: Any, causal: bool, window: int) -> Node | None:
        """Which logits a query must not see, bool[B or 1, 1 or H, S or 1, T]; None when it sees all."""
        hidden = None
        if isinstance(mask, Node):
            if mask.meta["val"].dim() == 2:
                mask = self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, mask, 1), 1)
            hidden = self.call(aten.logical_not.default, mask)
        if causal:
            distance = self._distance(q, k, q_pos, k_pos)
            late = self.call(aten.lt.Scalar, distance, 0)
            if window:
                late = self.call(aten.logical_or.default, late, self.call(aten.ge.Scalar, distance, window))
            hidden = late if hidden is None else self.call(aten.logical_or.default, hidden, late)
        return hidden

    def _distance(self, q: Node, k: Node, q_pos: Any, k_pos: Any) -> Node:
        """How far back key t is of query s: [B or 1, 1, S, T]."""
        if q_pos is None or k_pos is None:
            S, T = self.call(aten.sym_size.int, q, 2), self.call(aten.sym_size.int, k, 2)
            k_pos = self.call(aten.unsqueeze.default, self.call(aten.arange.default, T), 0)
            square = str(q.meta["val"].shape[2]) == str(k.meta["val"].shape[2])
            q_pos = k_pos if square else self.call(aten.slice.Tensor, k_pos, 1, self.call(operator.sub, T, S))
        q_pos = self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, q_pos, 1), 3)
        k_pos = self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, k_pos, 1), 1)
        return self.call(aten.sub.Tensor, q_pos, k_pos)

    def _top(self, node: Node) -> None:
        """The k best through TopK itself; the reference sorts the whole row, and TensorRT sorts 3840 at most. Ties may fall otherwise."""
        score, k, _ = node.args
        self.tags = {key: v for key, v in node.meta.items() if key in ("nn_module_stack", "layer")}
        with self.graph.inserting_before(node):
            wide = score if score.meta["val"].dtype == torch.float32 else self.call(aten.to.dtype, score, torch.float32)
            known = self.call(aten.masked_fill.Scalar, wide, self.call(aten.isnan.default, wide), float("-inf"))
            best = self.call(operator.getitem, self.call(aten.topk.default, known, k, 1), 1)
            none = self.call(aten.zeros_like.default, known, dtype=torch.bool)
            new = self.call(aten.scatter.value, none, 1, best, True)
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def _as_attention(self, node: Node) -> Node:
        """Packed segments as a mask: token i sees the tokens of its own segment."""
        self.tags = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "layer")}
        q, k, v, cu_seqlens, scale, layer = node.args
        key = ("segments", cu_seqlens)
        with self.graph.inserting_before(node):
            if key not in self.masks:
                at = self.call(aten.unsqueeze.default, self.call(aten.arange.default, self.call(aten.sym_size.int, q, 2)), 1)
                ends = self.call(aten.unsqueeze.default, self.call(aten.slice.Tensor, cu_seqlens, 0, 1), 0)
                segment = self.call(aten.sum.dim_IntList, self.call(aten.to.dtype, self.call(aten.ge.Tensor, at, ends), torch.int64), [1])
                same = self.call(
                    aten.eq.Tensor, self.call(aten.unsqueeze.default, segment, 1), self.call(aten.unsqueeze.default, segment, 0)
                )
                self.masks[key] = self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, same, 0), 0)
                retype(self.stage)
            new = self.call(ATTENTION, q, k, v, self.masks[key], None, None, scale, False, 0, 0.0, layer)
        new.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)
        return new


def compact(keep: Tensor, size: int) -> Tensor:
    """`compact_tokens` by a scatter into a row of T + 1: TensorRT's takes no more indices than there are places."""
    B, T = keep.shape
    rank = keep.long().cumsum(1) - 1
    slot = torch.where(keep & (rank < size), rank, T)
    position = torch.arange(T, device=keep.device)[None].expand(B, T)
    index = torch.full((B, T + 1), 1, dtype=torch.int64, device=keep.device) * (T - 1)
    return index.scatter(1, slot, position)[:, :size].contiguous()


def is_padding(mask: Any) -> bool:
    """Is this mask made of the prompt's padding mask alone? Then valid rows are a prefix: prompts are padded on the right, and a cut puts
    kept tokens first."""
    if not isinstance(mask, Node):
        return False
    if mask.op == "placeholder":
        return mask.meta.get("name", mask.name) == "attention_mask"
    if mask.meta.get("role") == "valid":
        return True
    if mask.op != "call_function":
        return False
    if mask.target in (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor):
        return all(is_padding(a) for a in mask.args[:2])
    if mask.target in (aten.view.default, aten.reshape.default):  # of a [B, T] mask to itself
        return mask.meta["val"].dim() == 2 and is_padding(mask.args[0])
    one = (
        KEEP,
        aten.ne.Scalar,
        aten.gt.Scalar,
        aten.to.dtype,
        aten._to_copy.default,
        aten.clone.default,
        aten.alias.default,
        aten.to.device,
    )
    return mask.target in one and is_padding(mask.args[0])


# ** RoPE tables **


def write_tables(stage: Stage) -> None:
    """Every float value made of positions and constants alone that meets hidden states goes through a running sum over one element."""
    alone = _from_positions(stage)
    merged: dict[Any, Node] = {}
    for node in [n for n in stage.graph.nodes if n in alone]:  # layers make the same views of one table: make each once
        key = (node.target, repr(node.args), repr(node.kwargs))
        first = merged.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
    order = {n: i for i, n in enumerate(stage.graph.nodes)}
    for node in sorted(merged.values(), key=order.__getitem__):
        readers = [u for u in node.users if u not in alone]
        if not readers or not isinstance(node.meta["val"], Tensor):
            continue
        axis = next(
            (i for i, size in enumerate(node.meta["val"].shape) if isinstance(size, int) and size == 1), None
        )  # one query: there is one
        if axis is not None and node.meta["val"].is_floating_point():
            with stage.graph.inserting_after(node):
                table = stage.graph.call_function(aten.cumsum.default, (node, axis))
            for reader in readers:
                reader.replace_input_with(node, table)


def _from_positions(stage: Stage) -> set[Node]:
    """Nodes that depend on position_ids, and on nothing else that varies."""
    alone: set[Node] = set()
    for node in stage.graph.nodes:
        if node.op == "placeholder" and node.meta.get("name", node.name) == "position_ids":
            alone.add(node)
        elif node.op == "call_function" and isinstance(node.meta.get("val"), (Tensor, tuple, list)):
            made_of = [n for n in node.all_input_nodes if n.op != "get_attr"]
            if made_of and all(n in alone for n in made_of):
                alone.add(node)
    return {n for n in alone if n.op == "call_function"}


# ** the last row **


def double_last_row(stage: Stage, chosen: bool) -> None:
    """Behind a cut the row that predicts is computed twice: one row against a matrix becomes a sum that Myelin cannot build over a length
    that is a difference, nor over rows that were gathered where `chosen` tokens leave or bypass a layer and the length stays
    ("CHECK(is_const())"); two rows are a matrix product, which reads the same weights once."""
    ids = next((n for n in stage.graph.nodes if n.op == "placeholder" and n.meta.get("name", n.name) == "input_ids"), None)
    last = [n for n in stage.graph.nodes if n.op == "call_function" and n.target is LAST]
    logits = stage.output_nodes.get("logits")
    if ids is None or logits is None or len(last) != 1:
        return
    if not chosen and str(last[0].args[0].meta["val"].shape[1]) == str(ids.meta["val"].shape[1]):
        return
    row, out = last[0], next(n for n in reversed(stage.graph.nodes) if n.op == "output")
    readers = list(row.users)
    with stage.graph.inserting_after(row):
        both = stage.graph.call_function(aten.cat.default, ([row, row], 0))
    for reader in readers:
        reroute(reader, row, both)
    with stage.graph.inserting_before(out):
        batch = stage.graph.call_function(aten.sym_size.int, (ids, 0))
        first = stage.graph.call_function(aten.slice.Tensor, (logits, 0, 0, batch))
    out.args = (tuple(first if v is logits else v for v in out.args[0]),)
