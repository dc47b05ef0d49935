"""Reductions, sorts and norms of aten, as ONNX."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Node

from .errors import LowerError
from .onnx_builder import Builder
from .onnx_registry import dtype, emits, rank

aten = torch.ops.aten


# ** reductions **


def _axes(n: Node, x: Node, dim: Any) -> list[int]:
    if dim is None or dim == []:
        return list(range(rank(x)))
    return [d % max(rank(x), 1) for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def _reduce(b: Builder, n: Node, kind: str, x: Node, dim: Any, keepdim: bool, want: torch.dtype) -> str:
    return b.op(kind, b.tensor(x, want), b.ints(*_axes(n, x, dim)), keepdims=int(keepdim))


@emits(aten.mean.dim)
def mean(b: Builder, n: Node, x: Node, dim: Any, keepdim: bool, _dtype: Any) -> str:
    return _reduce(b, n, "ReduceMean", x, dim, keepdim, dtype(n))


@emits(aten.mean.default)
def mean_all(b: Builder, n: Node, x: Node, _dtype: Any) -> str:
    return _reduce(b, n, "ReduceMean", x, None, False, dtype(n))


@emits(aten.sum.dim_IntList)
def sum_(b: Builder, n: Node, x: Node, dim: Any, keepdim: bool, _dtype: Any) -> str:
    return _reduce(b, n, "ReduceSum", x, dim, keepdim, dtype(n))


@emits(aten.sum.default)
def sum_all(b: Builder, n: Node, x: Node, _dtype: Any) -> str:
    return _reduce(b, n, "ReduceSum", x, None, False, dtype(n))


@emits(aten.amax.default, aten.amin.default)
def amax(b: Builder, n: Node, x: Node, dim: Any, keepdim: bool) -> str:
    return _reduce(b, n, "ReduceMax" if n.target is aten.amax.default else "ReduceMin", x, dim, keepdim, dtype(n))


@emits(aten.logsumexp.default)
def logsumexp(b: Builder, n: Node, x: Node, dim: Any, keepdim: bool = False) -> str:
    return _reduce(b, n, "ReduceLogSumExp", x, dim, keepdim, dtype(n))


@emits(aten.max.default, aten.min.default)
def max_all(b: Builder, n: Node, x: Node) -> str:
    return _reduce(b, n, "ReduceMax" if n.target is aten.max.default else "ReduceMin", x, None, False, dtype(n))


@emits(aten.max.dim, aten.min.dim)
def max_dim(b: Builder, n: Node, x: Node, dim: int, keepdim: bool) -> list[str]:
    largest = n.target is aten.max.dim
    value = _reduce(b, n, "ReduceMax" if largest else "ReduceMin", x, dim, keepdim, dtype(x))
    return [value, b.op("ArgMax" if largest else "ArgMin", b(x), axis=dim % rank(x), keepdims=int(keepdim))]


@emits(aten.argmax.default, aten.argmin.default)
def argmax(b: Builder, n: Node, x: Node, dim: int | None, keepdim: bool) -> str:
    kind = "ArgMax" if n.target is aten.argmax.default else "ArgMin"
    if dim is None:
        return b.op("Squeeze", b.op(kind, b.op("Reshape", b(x), b.ints(-1)), axis=0, keepdims=1), b.ints(0))
    number = b.cast(b(x), dtype(x), torch.int32) if dtype(x) == torch.bool else b(x)
    return b.op(kind, number, axis=dim % rank(x), keepdims=int(keepdim))


@emits(aten.any.dim, aten.all.dim, aten.any.dims)
def any_dim(b: Builder, n: Node, x: Node, dim: Any, keepdim: bool) -> str:
    kind = "ReduceMin" if n.target is aten.all.dim else "ReduceMax"
    return b.cast(_reduce(b, n, kind, x, dim, keepdim, torch.int32), torch.int32, torch.bool)


@emits(aten.any.default, aten.all.default)
def any_all(b: Builder, n: Node, x: Node) -> str:
    kind = "ReduceMin" if n.target is aten.all.default else "ReduceMax"
    return b.cast(_reduce(b, n, kind, x, None, False, torch.int32), torch.int32, torch.bool)


@emits(aten.cumsum.default)
def cumsum(b: Builder, n: Node, x: Node, dim: int, _dtype: Any) -> str:
    return b.op("CumSum", b.tensor(x, dtype(n)), b.const(dim % rank(x), torch.int64))


@emits(aten.linalg_vector_norm.default)
def vector_norm(b: Builder, n: Node, x: Node, order: float, dim: Any, keepdim: bool, _dtype: Any) -> str:
    kinds = {2: "ReduceL2", 1: "ReduceL1", math.inf: "ReduceMax"}
    if order not in kinds:
        raise LowerError(f"to_onnx: {n.name}: linalg_vector_norm of order {order}; possible are {list(kinds)}")
    value = b.tensor(x, dtype(n))
    value = b.op("Abs", value) if order == math.inf else value
    return b.op(kinds[order], value, b.ints(*_axes(n, x, dim)), keepdims=int(keepdim))


@emits(aten.norm.ScalarOpt_dim)
def norm(b: Builder, n: Node, x: Node, order: Any, dim: Any, keepdim: bool) -> str:
    return vector_norm(b, n, x, 2 if order is None else order, dim, keepdim, None)


@emits(aten.var.correction)
def var(b: Builder, n: Node, x: Node, dim: Any, correction: Any, keepdim: bool) -> str:
    axes = _axes(n, x, dim)
    centred = b.op("Sub", b(x), b.op("ReduceMean", b(x), b.ints(*axes), keepdims=1))
    total = b.op("ReduceSum", b.op("Mul", centred, centred), b.ints(*axes), keepdims=int(keepdim))
    count = b.op("ReduceProd", b.op("Concat", *[b.dim(x, a) for a in axes], axis=0), keepdims=0)
    count = b.op("Sub", count, b.const(1 if correction is None else int(correction), torch.int64))
    return b.op("Div", total, b.cast(count, torch.int64, dtype(n)))


@emits(aten.var.dim)
def var_dim(b: Builder, n: Node, x: Node, dim: Any, unbiased: bool = True, keepdim: bool = False) -> str:
    return var(b, n, x, dim, int(unbiased), keepdim)


@emits(aten.softmax.int, aten._softmax.default)
def softmax(b: Builder, n: Node, x: Node, dim: int, _dtype: Any) -> str:
    return b.op("Softmax", b.tensor(x, dtype(n)), axis=dim % rank(x))


@emits(aten.log_softmax.int, aten._log_softmax.default)
def log_softmax(b: Builder, n: Node, x: Node, dim: int, _dtype: Any) -> str:
    return b.op("LogSoftmax", b.tensor(x, dtype(n)), axis=dim % rank(x))


@emits(aten.topk.default)
def topk(b: Builder, n: Node, x: Node, k: Any, dim: int, largest: bool, sorted_: bool) -> list[str]:
    return b.op("TopK", b(x), b.size(k), axis=dim % rank(x), largest=int(largest), sorted=int(sorted_), outputs=2)


@emits(aten.sort.default)
def sort(b: Builder, n: Node, x: Node, dim: int = -1, descending: bool = False) -> list[str]:
    return stable_sort(b, n, x, True, dim, descending)


@emits(aten.sort.stable)
def stable_sort(b: Builder, n: Node, x: Node, stable: bool, dim: int = -1, descending: bool = False) -> list[str]:
    """TopK over everything: sorted, and of equal values the lower index first, which is what a stable sort gives."""
    value = b.cast(b(x), dtype(x), torch.int32) if dtype(x) in (torch.bool, torch.uint8, torch.int8) else b(x)
    values, index = b.op("TopK", value, b.dim(x, dim), axis=dim % rank(x), largest=int(descending), sorted=1, outputs=2)
    return [b.cast(values, torch.int32, dtype(x)) if value != b(x) else values, index]


@emits(aten.argsort.default, aten.argsort.stable)
def argsort(b: Builder, n: Node, x: Node, *rest: Any) -> str:
    rest = rest[1:] if n.target is aten.argsort.stable else rest
    return stable_sort(b, n, x, True, *rest)[1]


# ** norms **


@emits(aten.layer_norm.default)
def layer_norm(
    b: Builder, n: Node, x: Node, shape: list[int], weight: Node | None, bias: Node | None, eps: float, _cudnn: bool = True
) -> str:
    scale = b(weight) if weight is not None else b.const(torch.ones(*shape, dtype=dtype(n)))
    return b.op("LayerNormalization", b(x), scale, b(bias) if bias is not None else None, axis=rank(x) - len(shape), epsilon=eps)


@emits(aten.native_layer_norm.default)
def native_layer_norm(b: Builder, n: Node, x: Node, shape: list[int], weight: Node | None, bias: Node | None, eps: float) -> list[Any]:
    return [layer_norm(b, x, x, shape, weight, bias, eps), None, None]


@emits(aten.rms_norm.default)
def rms_norm(b: Builder, n: Node, x: Node, shape: list[int], weight: Node | None, eps: float | None) -> str:
    """Spelt out in float32, as torch computes it."""
    eps = torch.finfo(dtype(x)).eps if eps is None else eps
    wide = b.cast(b(x), dtype(x), torch.float32)
    power = b.op("ReduceMean", b.op("Mul", wide, wide), b.ints(*range(rank(x) - len(shape), rank(x))), keepdims=1)
    y = b.op("Div", wide, b.op("Sqrt", b.op("Add", power, b.const(eps, torch.float32))))
    y = b.cast(y, torch.float32, dtype(n))
    return y if weight is None else b.op("Mul", y, b.tensor(weight, dtype(n)))


@emits(aten.group_norm.default)
def group_norm(b: Builder, n: Node, x: Node, groups: int, weight: Node | None, bias: Node | None, eps: float, _cudnn: bool = True) -> str:
    channels = x.meta["val"].shape[1]
    scale = b(weight) if weight is not None else b.const(torch.ones(channels, dtype=dtype(n)))
    shift = b(bias) if bias is not None else b.const(torch.zeros(channels, dtype=dtype(n)))
    return b.op("GroupNormalization", b(x), scale, shift, epsilon=eps, num_groups=groups)


@emits(aten.batch_norm.default)
def batch_norm(
    b: Builder, n: Node, x: Node, weight: Any, bias: Any, mean_: Node, var_: Node, training: bool, _m: float, eps: float, _c: bool
) -> str:
    if training:
        raise LowerError(f"to_onnx: {n.name}: batch_norm in training mode; call .eval() before capture")
    channels = x.meta["val"].shape[1]
    scale = b(weight) if weight is not None else b.const(torch.ones(channels, dtype=dtype(n)))
    shift = b(bias) if bias is not None else b.const(torch.zeros(channels, dtype=dtype(n)))
    return b.op("BatchNormalization", b(x), scale, shift, b(mean_), b(var_), epsilon=eps)
