"""The dialect ops that choose tokens, in few ONNX nodes: between two layers, what a small node costs is its dispatch.

Top-k and compaction are one TopK each. Greedy choices are a Loop over the choices: everything quadratic is computed once before it, a step
touches one row. Attention of a few rows is one product with the keys as they are: no head is split off or turned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .onnx_builder import Builder
from .onnx_registry import dtype
from .onnx_shape import same

F32, I64 = torch.float32, torch.int64


def places(b: Builder, name: str, val: Tensor, axis: int) -> str:
    """0, 1, ... along an axis of a value, int64[T]"""
    size = val.shape[axis]
    if isinstance(size, int):
        return b.const(torch.arange(size))
    return b.op("Range", b.const(0, I64), b.op("Squeeze", b.dim_of(name, val, axis), b.ints(0)), b.const(1, I64))


def top_tokens(b: Builder, n: Node, score: Node, k: Any, budget: Node | None) -> str:
    """TopK breaks ties by the lower index, as the op does; its indices are scattered into a row of False."""
    value = b.cast(b(score), dtype(score), F32)
    value = b.op("Where", b.op("IsNaN", value), b.const(float("-inf"), F32), value)
    size = score.meta["val"].shape[1]
    fits = isinstance(size, int) and isinstance(k, int) and size >= k
    count = b.ints(k) if fits else b.op("Min", b.size(k), b.dim(score, 1))
    best = b.op("TopK", value, count, axis=1, outputs=2)[1]
    if budget is None:
        taken = b.op("ConstantOfShape", b.op("Shape", best), value=b.scalar(True))
    else:
        rank = b.const(torch.arange(k)) if fits else b.op("Range", b.const(0, I64), b.op("Squeeze", count, b.ints(0)), b.const(1, I64))
        limit = b.op("Unsqueeze", b.cast(b(budget), dtype(budget), I64), b.ints(1))
        taken = b.op("Less", rank, limit)  # [B, k]
    none = b.op("ConstantOfShape", b.shape(value, score.meta["val"]), value=b.scalar(False))
    return b.op("ScatterElements", none, best, taken, axis=1)


def compact_tokens(b: Builder, n: Node, keep: Node, size: Any) -> str:
    """The `size` smallest of (position if kept else T - 1): kept positions ascend, T - 1 fills the rest."""
    T = keep.meta["val"].shape[1]
    last = b.ints(T - 1) if isinstance(T, int) else b.op("Sub", b.dim(keep, 1), b.ints(1))
    key = b.op("Where", b(keep), places(b, b(keep), keep.meta["val"], 1), last)
    if isinstance(T, int) and isinstance(size, int) and size <= T:
        return b.op("TopK", key, b.ints(size), axis=1, largest=0, outputs=2)[0]
    wanted = b.size(size)
    there = b.op("Min", wanted, b.dim(keep, 1))
    found = b.op("TopK", key, there, axis=1, largest=0, outputs=2)[0]
    spare = b.op("Concat", b.ints(0, 0, 0), b.op("Sub", wanted, there), axis=0)
    return b.op("Pad", found, spare, mode="edge")  # the last of a whole row is T - 1


def attention_rows(b: Builder, n: Node, q: Node, k: Node, mask: Node | None, rows: Node, scale: float, causal: bool, softcap: float) -> str:
    """By heads, [B, H, S, D]: a gather of the rows, one product per key/value head."""
    H, D = (int(q.meta["val"].shape[i]) for i in (1, 3))
    G = int(k.meta["val"].shape[1])
    picked = b.op("GatherND", b.op("Transpose", b(q), perm=[0, 2, 1, 3]), b.op("Unsqueeze", b(rows), b.ints(-1)), batch_dims=1)
    picked = b.cast(b.op("Transpose", picked, perm=[0, 2, 1, 3]), dtype(q), F32)  # [B, H, R, D]
    keys = b.op("Transpose", b.cast(b(k), dtype(k), F32), perm=[0, 1, 3, 2])
    if G != H:  # the queries of a group as rows of one product
        picked = b.op("Reshape", picked, b.ints(0, G, -1, D))
    logits = b.op("MatMul", picked, keys)
    if G != H:
        logits = b.op("Reshape", logits, b.op("Concat", b.dim(q, 0), b.ints(H), b.dim(rows, 1), b.dim(k, 2), axis=0))
    return masked_softmax(b, b.op("Mul", logits, b.const(scale, F32)), places(b, b(k), k.meta["val"], 2), mask, rows, causal, softcap)


def masked_softmax(b: Builder, logits: str, slots: str, mask: Node | None, rows: Node, causal: bool, softcap: float) -> str:
    """Scaled logits[B, H, R, T] -> probabilities; slots: 0 to T - 1"""
    if softcap:
        cap = b.const(softcap, F32)
        logits = b.op("Mul", b.op("Tanh", b.op("Div", logits, cap)), cap)
    if mask is not None and dtype(mask) != torch.bool:
        logits = b.op("Add", logits, b.cast(_mask_rows(b, mask, rows), dtype(mask), F32))
    seen = _seen(b, slots, mask, rows, causal)
    if seen is not None:
        logits = b.op("Where", seen, logits, b.const(-1e30, F32))
    return b.op("Softmax", logits, axis=-1)


def _seen(b: Builder, slots: str, mask: Node | None, rows: Node, causal: bool) -> str | None:
    """Which keys the rows see, bool over [B, H, R, T]; None if all."""
    flat = mask is not None and mask.meta["val"].dim() == 2
    if causal and same(rows.meta["val"].shape[1], 1) and (flat or mask is None):  # a row per sample: [B, T]
        early = b.op("LessOrEqual", slots, b(rows))
        return b.op("Unsqueeze", b.op("And", b(mask), early) if flat else early, b.ints(1, 2))
    seen = None
    if mask is not None and dtype(mask) == torch.bool:
        seen = b.op("Unsqueeze", b(mask), b.ints(1, 2)) if flat else _mask_rows(b, mask, rows)
    if causal:
        early = b.op("LessOrEqual", slots, b.op("Unsqueeze", b(rows), b.ints(1, 3)))
        seen = early if seen is None else b.op("And", seen, early)
    return seen


def _mask_rows(b: Builder, mask: Node, rows: Node) -> str:
    """mask[B or 1, H or 1, S or 1, T] at the rows"""
    batch, _, count, _ = mask.meta["val"].shape
    if isinstance(count, int) and count == 1:
        return b(mask)
    turned = b.op("Transpose", b(mask), perm=[0, 2, 1, 3])  # [B or 1, S, H, T]
    if isinstance(batch, int) and batch == 1 and not same(batch, rows.meta["val"].shape[0]):
        picked = b.op("Gather", b.op("Squeeze", turned, b.ints(0)), b(rows), axis=0)
    else:
        picked = b.op("GatherND", turned, b.op("Unsqueeze", b(rows), b.ints(-1)), batch_dims=1)
    return b.op("Transpose", picked, perm=[0, 2, 1, 3])


# ** greedy choices **


def _unit(b: Builder, x: Node) -> str:
    value = b.cast(b(x), dtype(x), F32)
    return b.op("Div", value, b.op("Max", b.op("ReduceL2", value, b.ints(-1), keepdims=1), b.const(1e-12, F32)))


def _diagonal(b: Builder, x: Node) -> str:
    """bool[T, T], T the second axis of x"""
    at = places(b, b(x), x.meta["val"], 1)
    return b.op("Equal", b.op("Unsqueeze", at, b.ints(1)), at)


def farthest_tokens(b: Builder, n: Node, x: Node, k: int, repeat: bool) -> str:
    """One product for all distances; a step is ArgMax, the row of the chosen token, Min."""
    unit = _unit(b, x)
    distance = b.op("Sub", b.const(1.0, F32), b.op("MatMul", unit, b.op("Transpose", unit, perm=[0, 2, 1])))
    diagonal = _diagonal(b, x)
    first = b.op("ReduceMin", b.op("Where", diagonal, b.const(float("inf"), F32), distance), b.ints(1), keepdims=0)
    if not repeat:  # a chosen token is nearer to itself than any distance: the running minimum never lets it be chosen again
        distance = b.op("Where", diagonal, b.const(-1.0, F32), distance)
    chosen = b.op("ArgMax", first, axis=1, keepdims=1)
    nearest = b.op("GatherND", distance, chosen, batch_dims=1)  # [B, T]

    def step(_: str, nearest: str) -> tuple[list[str], list[str]]:
        best = b.op("ArgMax", nearest, axis=1, keepdims=1)
        return [b.op("Min", nearest, b.op("GatherND", distance, best, batch_dims=1))], [best]

    return _chosen(b, chosen, b.loop(k - 1, [(nearest, F32)], [I64], step)) if k > 1 else chosen


def dpp_tokens(b: Builder, n: Node, kernel: Node, k: int, floor: float) -> str:
    """Rows of the Cholesky factor are written into one [B, T, k] as they come: a step is a product with one row of it."""
    value = b.cast(b(kernel), dtype(kernel), F32)
    diagonal = b.op("Where", _diagonal(b, kernel), value, b.const(0.0, F32))
    gain = b.op("ReduceSum", diagonal, b.ints(-1), keepdims=1)  # [B, T, 1]
    batch, tall = b.dim(kernel, 0), b.op("Shape", gain)
    known = b.op("ConstantOfShape", b.op("Concat", batch, b.dim(kernel, 1), b.ints(k), axis=0), value=b.scalar(0.0))
    closed = b.op("ConstantOfShape", b.op("Concat", batch, b.ints(1, 1), axis=0), value=b.scalar(float("-inf")))
    shut, low = b.op("ConstantOfShape", tall, value=b.scalar(0.0)), b.const(floor, F32)

    def step(i: str, gain: str, shut: str, known: str) -> tuple[list[str], list[str]]:
        pivot, best = b.op("TopK", gain, b.ints(1), axis=1, outputs=2)  # [B, 1, 1]
        own = b.op("Reshape", b.op("GatherND", known, best, batch_dims=1), b.ints(0, -1, 1))  # [B, k, 1]; zero from i on
        row = b.op("Reshape", b.op("GatherND", value, best, batch_dims=1), b.ints(0, -1, 1))  # [B, T, 1]
        row = b.op("Div", b.op("Sub", row, b.op("MatMul", known, own)), b.op("Sqrt", b.op("Max", pivot, low)))
        gain = b.op("Sub", gain, b.op("Mul", row, row))
        shut = b.op("ScatterElements", shut, best, closed, axis=1)  # 0, and -inf where chosen
        gain = b.op("Add", b.op("Max", gain, low) if floor else gain, shut)
        return [gain, shut, b.op("ScatterElements", known, b.op("Expand", i, tall), row, axis=2)], [best]

    found = b.loop(k, [(gain, F32), (shut, F32), (known, F32)], [I64], step)
    return b.op("Transpose", b.op("Squeeze", found[-1], b.ints(2, 3)), perm=[1, 0])


def _chosen(b: Builder, first: str, found: list[str]) -> str:
    """index[B, 1] and those of the loop [k - 1, B, 1] -> index[B, k]"""
    rest = b.op("Transpose", b.op("Squeeze", found[-1], b.ints(-1)), perm=[1, 0])
    return b.op("Concat", first, rest, axis=1)


foveate = torch.ops.foveate
SELECT: dict[Any, Any] = {
    foveate.top_tokens.default: top_tokens,
    foveate.compact_tokens.default: compact_tokens,
    foveate.attention_rows.default: attention_rows,
    foveate.farthest_tokens.default: farthest_tokens,
    foveate.dpp_tokens.default: dpp_tokens,
}
