"""The dialect ops that standard ONNX can say better than their reference bodies: portable spellings, no vendor domain.

Everything here agrees with the op's body; ops that are missing are expanded to it (`expand.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .onnx_builder import END, Builder, Emitter
from .onnx_registry import dtype
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


def attention_mask(
    b: Builder, n: Node, q: Node, k: Node, mask: Node | None, q_pos: Node | None, k_pos: Node | None, causal: bool, window: int
) -> str | None:
    """Everything that hides keys as one mask over [B or 1, H or 1, S, T] (bool, or float in q's type when the given mask is float), or
    None."""
    masks = []
    float_mask = None
    if mask is not None and dtype(mask) == torch.bool:
        masks.append(b.op("Unsqueeze", b(mask), b.ints(1, 2)) if mask.meta["val"].dim() == 2 else b(mask))
    elif mask is not None:
        float_mask = b(mask)
    if causal:
        masks.append(_causal(b, q, k, q_pos, k_pos, window))
    seen = masks[0] if masks else None
    for other in masks[1:]:
        seen = b.op("And", seen, other)
    if float_mask is None:
        return seen
    kind = dtype(mask)  # type: ignore[arg-type]
    if seen is None:
        return float_mask
    return b.op("Where", seen, float_mask, b.const(_hidden(kind), kind))


def _causal(b: Builder, q: Node, k: Node, q_pos: Node | None, k_pos: Node | None, window: int) -> str:
    if q_pos is None or k_pos is None:
        rows = b.op("Squeeze", b.dim(q, 2), b.ints(0))
        columns = b.op("Squeeze", b.dim(k, 2), b.ints(0))
        keys = b.op("Range", b.const(0, torch.int64), columns, b.const(1, torch.int64))
        first = b.op("Sub", columns, rows)  # bottom-right aligned
        queries = b.op("Unsqueeze", b.op("Range", first, columns, b.const(1, torch.int64)), b.ints(1))
    else:
        queries, keys = b.op("Unsqueeze", b(q_pos), b.ints(1, 3)), b.op("Unsqueeze", b(k_pos), b.ints(1, 2))
    seen = b.op("LessOrEqual", keys, queries)
    if window:
        near = b.op("Less", b.op("Sub", queries, keys), b.const(window, torch.int64))
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


def attention_matmul(
    b: Builder,
    n: Node,
    q: Node,
    k: Node,
    v: Node,
    mask: Node | None,
    q_pos: Node | None,
    k_pos: Node | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    layer: int,
) -> str:
    """MatMul, Softmax in float32, MatMul: valid everywhere, and what TensorRT fuses into one kernel when S is 1."""
    kind, heads, groups = dtype(q), q.meta["val"].shape[1], k.meta["val"].shape[1]
    if heads is not groups and int(heads) % int(groups):
        raise AssertionError("attention heads are a multiple of the key/value heads")
    keys = repeat_heads(b, b(k), k.meta["val"], int(heads) // int(groups))
    values = repeat_heads(b, b(v), v.meta["val"], int(heads) // int(groups))
    logits = b.op("MatMul", b(q), b.op("Transpose", keys, perm=[0, 1, 3, 2]))
    logits = b.op("Mul", b.cast(logits, kind, torch.float32), b.const(scale, torch.float32))
    if softcap:
        cap = b.const(softcap, torch.float32)
        logits = b.op("Mul", b.op("Tanh", b.op("Div", logits, cap)), cap)
    one_row = isinstance(q.meta["val"].shape[2], int) and q.meta["val"].shape[2] == 1 and q_pos is None and not window
    hidden = attention_mask(b, n, q, k, mask, q_pos, k_pos, causal and not one_row, window)
    if hidden is not None:
        if mask is not None and dtype(mask) != torch.bool:
            logits = b.op("Add", logits, b.cast(hidden, dtype(mask), torch.float32))
        else:
            logits = b.op("Where", hidden, logits, b.const(-1e30, torch.float32))
    p = b.cast(b.op("Softmax", logits, axis=-1), torch.float32, kind)
    return b.op("Transpose", b.op("MatMul", p, values), perm=[0, 2, 1, 3])


def attention_op(
    b: Builder,
    n: Node,
    q: Node,
    k: Node,
    v: Node,
    mask: Node | None,
    q_pos: Node | None,
    k_pos: Node | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
    layer: int,
) -> str:
    """The Attention operator of opset 23; a soft cap (whose order against the mask changed between opsets) is spelt out instead."""
    rows = q.meta["val"].shape[2]
    if softcap or (isinstance(rows, int) and rows == 1):
        return attention_matmul(b, n, q, k, v, mask, q_pos, k_pos, scale, causal, window, softcap, layer)
    plain = causal and not window and q_pos is None and same(rows, k.meta["val"].shape[2])
    hidden = attention_mask(b, n, q, k, mask, q_pos, k_pos, causal and not plain, window)
    if hidden is not None:
        shape = b.op("Concat", b.ints(1, 1), b.dim(q, 2), b.dim(k, 2), axis=0)
        hidden = b.op("Expand", hidden, shape)  # the operator's mask has S rows
        if mask is not None and dtype(mask) != torch.bool:
            hidden = b.cast(hidden, dtype(mask), dtype(q))
    y = b.op("Attention", b(q), b(k), b(v), hidden, is_causal=int(plain), scale=scale)
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
    foveate.keep_tokens.default: keep_tokens,
    foveate.last_token.default: last_token,
    foveate.splice_image_features.default: splice_image_features,
    foveate.kv_store.default: kv_store,
    foveate.kv_append.default: kv_append,
    foveate.kv_mask.default: kv_mask,
    foveate.attention.default: attention_op,
    foveate.attention_varlen.default: attention_varlen,
}
