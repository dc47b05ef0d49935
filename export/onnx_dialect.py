"""The dialect ops that standard ONNX can say better than their reference bodies: portable spellings, no vendor domain.

Everything here agrees with the op's body; ops that are missing are expanded to it (`expand.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .onnx_builder import END, Builder, Emitter
from .onnx_registry import dtype
from .onnx_select import SELECT
from .onnx_shape import same

foveate = torch.ops.foveate


def keep_tokens(b: Builder, n: Node, x: Node, index: Node) -> str:
    """Whole rows: GatherND over the batch (a GatherElements would carry an index per element)."""
    have = x.meta["val"].shape[0]
    value = b(x)
    if isinstance(have, int) and have == 1 and not same(have, index.meta["val"].shape[0]):
        value = b.op("Squeeze", value, b.ints(0))
        return b.op("Gather", value, b(index), axis=0)
    return b.op("GatherND", value, b.op("Unsqueeze", b(index), b.ints(-1)), batch_dims=1)


def last_token(b: Builder, n: Node, x: Node, mask: Node) -> str:
    positions = b.op("Range", b.const(0, torch.int64), b.op("Squeeze", b.dim(mask, 1), b.ints(0)), b.const(1, torch.int64))
    last = b.op("ReduceMax", b.op("Where", b(mask), positions, b.const(0, torch.int64)), b.ints(1), keepdims=1)
    return b.op("GatherND", b(x), last, batch_dims=1)


def splice_image_features(b: Builder, n: Node, embeds: Node, features: Node, visual: Node) -> str:
    rank = b.op("Sub", b.op("CumSum", b.cast(b(visual), torch.bool, torch.int64), b.const(1, torch.int64)), b.const(1, torch.int64))
    index = b.op("Unsqueeze", b.op("Max", rank, b.const(0, torch.int64)), b.ints(-1))
    rows = b.cast(b.op("GatherND", b(features), index, batch_dims=1), dtype(features), dtype(embeds))
    return b.op("Where", b.op("Unsqueeze", b(visual), b.ints(-1)), rows, b(embeds))


def kv_store(b: Builder, n: Node, new: Node, layer: int, which: str) -> str:
    return b(new)


def kv_append(b: Builder, n: Node, past: Node, new: Node, layer: int, which: str) -> str:
    return b.op("Concat", b(past), b(new), axis=2)


def kv_mask(b: Builder, n: Node, past: Node, lengths: Node, layer: int) -> str:
    """Computed from the row numbers of past + 1: the new row is the last one."""
    rows = b.op("Squeeze", b.dim(past, 2), b.ints(0))
    slots = b.op("Range", b.const(0, torch.int64), b.op("Add", rows, b.const(1, torch.int64)), b.const(1, torch.int64))
    valid = b.op("Unsqueeze", b.op("Gather", b(lengths), b.const(layer, torch.int64), axis=0), b.ints(1))
    return b.op("Or", b.op("Less", slots, valid), b.op("Equal", slots, rows))


# ** attention **


@dataclass(frozen=True)
class Operands:
    """What `foveate.attention` is given, in its order: `Operands(*node.args)`."""

    q: Node  # [B, H, S, D]
    k: Node  # [B, G, T, D]
    v: Node
    mask: Node | None  # [B, T] bool, or [B or 1, H or 1, S or 1, T], bool or added
    q_pos: Node | None
    k_pos: Node | None
    scale: float
    causal: bool
    window: int
    softcap: float
    layer: int

    @property
    def heads(self) -> int:
        return int(self.q.meta["val"].shape[1])

    @property
    def groups(self) -> int:
        return int(self.k.meta["val"].shape[1])

    @property
    def width(self) -> int:
        return int(self.q.meta["val"].shape[3])

    @property
    def rows(self) -> Any:
        """S, an int or symbolic."""
        return self.q.meta["val"].shape[2]

    @property
    def square(self) -> bool:
        """As many queries as keys."""
        return same(self.rows, self.k.meta["val"].shape[2])

    @property
    def added(self) -> bool:
        """Is the mask one that is added to the logits?"""
        return self.mask is not None and dtype(self.mask) != torch.bool


def attention_mask(b: Builder, a: Operands, causal: bool) -> str | None:
    """Everything that hides keys as one mask over [B or 1, H or 1, S, T] (bool, or float when the given mask is float), or None."""
    seen = None
    if a.mask is not None and not a.added:
        seen = b.op("Unsqueeze", b(a.mask), b.ints(1, 2)) if a.mask.meta["val"].dim() == 2 else b(a.mask)
    if causal:
        early = _causal(b, a)
        seen = early if seen is None else b.op("And", seen, early)
    if not a.added:
        return seen
    kind = dtype(a.mask)
    return b(a.mask) if seen is None else b.op("Where", seen, b(a.mask), b.const(_hidden(kind), kind))


def _causal(b: Builder, a: Operands) -> str:
    if a.q_pos is None or a.k_pos is None:
        rows = b.op("Squeeze", b.dim(a.q, 2), b.ints(0))
        columns = b.op("Squeeze", b.dim(a.k, 2), b.ints(0))
        keys = b.op("Range", b.const(0, torch.int64), columns, b.const(1, torch.int64))
        first = b.op("Sub", columns, rows)  # bottom-right aligned
        queries = b.op("Unsqueeze", b.op("Range", first, columns, b.const(1, torch.int64)), b.ints(1))
    else:
        queries, keys = b.op("Unsqueeze", b(a.q_pos), b.ints(1, 3)), b.op("Unsqueeze", b(a.k_pos), b.ints(1, 2))
    seen = b.op("LessOrEqual", keys, queries)
    if a.window:
        near = b.op("Less", b.op("Sub", queries, keys), b.const(a.window, torch.int64))
        seen = b.op("And", seen, near)
    return seen


def _hidden(kind: torch.dtype) -> float:
    """The logit of a hidden key: far below any other, still finite in the type."""
    return -1e30 if kind in (torch.float32, torch.bfloat16, torch.float64) else -6e4


def repeat_heads(b: Builder, name: str, kv: Tensor, times: int) -> str:
    """[B, G, T, D] -> [B, G times, T, D]: Unsqueeze, Expand, Reshape, the form that TensorRT folds into its attention kernels."""
    if times == 1:
        return name
    wide = b.op("Expand", b.op("Unsqueeze", name, b.ints(2)), b.ints(1, 1, times, 1, 1))
    size = kv.shape[2] if isinstance(kv.shape[2], int) else None
    if size is not None:
        return b.op("Reshape", wide, b.ints(0, kv.shape[1] * times, size, kv.shape[3]))
    return b.op("Reshape", wide, b.ints(0, kv.shape[1] * times, -1, kv.shape[3]))


def attention_matmul(b: Builder, n: Node, *operands: Any) -> str:
    """MatMul, Softmax in float32, MatMul: valid everywhere, and what TensorRT fuses into one kernel when S is 1."""
    a = Operands(*operands)
    kind = dtype(a.q)
    if a.heads % a.groups:
        raise AssertionError("attention heads are a multiple of the key/value heads")
    keys = repeat_heads(b, b(a.k), a.k.meta["val"], a.heads // a.groups)
    values = repeat_heads(b, b(a.v), a.v.meta["val"], a.heads // a.groups)
    logits = b.op("MatMul", b(a.q), b.op("Transpose", keys, perm=[0, 1, 3, 2]))
    logits = b.op("Mul", b.cast(logits, kind, torch.float32), b.const(a.scale, torch.float32))
    if a.softcap:
        cap = b.const(a.softcap, torch.float32)
        logits = b.op("Mul", b.op("Tanh", b.op("Div", logits, cap)), cap)
    one_row = isinstance(a.rows, int) and a.rows == 1 and a.q_pos is None and not a.window
    hidden = attention_mask(b, a, a.causal and not one_row)
    if hidden is not None and a.added:
        logits = b.op("Add", logits, b.cast(hidden, dtype(a.mask), torch.float32))
    elif hidden is not None:
        logits = b.op("Where", hidden, logits, b.const(-1e30, torch.float32))
    p = b.cast(b.op("Softmax", logits, axis=-1), torch.float32, kind)
    return b.op("Transpose", b.op("MatMul", p, values), perm=[0, 2, 1, 3])


def attention_op(b: Builder, n: Node, *operands: Any) -> str:
    """The Attention operator of opset 23; a soft cap (whose order against the mask changed between opsets) is spelt out instead."""
    a = Operands(*operands)
    if a.softcap or (isinstance(a.rows, int) and a.rows == 1):
        return attention_matmul(b, n, *operands)
    plain = a.causal and not a.window and a.q_pos is None and a.square
    hidden = attention_mask(b, a, a.causal and not plain)
    if hidden is not None:
        shape = b.op("Concat", b.ints(1, 1), b.dim(a.q, 2), b.dim(a.k, 2), axis=0)
        hidden = b.op("Expand", hidden, shape)  # the operator's mask has S rows
        if a.added:
            hidden = b.cast(hidden, dtype(a.mask), dtype(a.q))
    y = b.op("Attention", b(a.q), b(a.k), b(a.v), hidden, is_causal=int(plain), scale=a.scale)
    return b.op("Transpose", y, perm=[0, 2, 1, 3])


def attention_varlen(b: Builder, n: Node, q: Node, k: Node, v: Node, cu_seqlens: Node, scale: float, layer: int) -> str:
    """Block-diagonal attention: the segment of a token is the number of ends before it."""
    ends = b.op("Slice", b(cu_seqlens), b.ints(1), b.ints(END), b.ints(0))
    rows = b.op("Squeeze", b.dim(q, 2), b.ints(0))
    slots = b.op("Range", b.const(0, torch.int64), rows, b.const(1, torch.int64))
    passed = b.op(
        "GreaterOrEqual", b.op("Unsqueeze", slots, b.ints(1)), b.op("Unsqueeze", b.cast(ends, dtype(cu_seqlens), torch.int64), b.ints(0))
    )
    segment = b.op("ReduceSum", b.cast(passed, torch.bool, torch.int64), b.ints(1), keepdims=0)
    seen = b.op("Equal", b.op("Unsqueeze", segment, b.ints(1)), b.op("Unsqueeze", segment, b.ints(0)))
    y = b.op("Attention", b(q), b(k), b(v), b.op("Unsqueeze", seen, b.ints(0, 1)), scale=scale)
    return b.op("Transpose", y, perm=[0, 2, 1, 3])


PORTABLE: dict[Any, Emitter] = {
    **SELECT,
    foveate.keep_tokens.default: keep_tokens,
    foveate.last_token.default: last_token,
    foveate.splice_image_features.default: splice_image_features,
    foveate.kv_store.default: kv_store,
    foveate.kv_append.default: kv_append,
    foveate.kv_mask.default: kv_mask,
    foveate.attention.default: attention_op,
    foveate.attention_varlen.default: attention_varlen,
}
