"""Constants, ranges and filled tensors of aten, as ONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .errors import LowerError
from .onnx_builder import Builder
from .onnx_registry import dtype, emits
from .onnx_shape import same

aten = torch.ops.aten
FOLD = 1 << 16  # elements; a static arange or full up to this size is a constant


def _filled(b: Builder, n: Node, sizes: Any, value: Any) -> str:
    shape = n.meta["val"].shape
    if isinstance(value, Node):
        return b.op("Expand", b.tensor(value, dtype(n)), b.sizes(sizes) if len(shape) else b.ints())
    if all(isinstance(s, int) for s in shape) and n.meta["val"].numel() <= FOLD:
        return b.const(torch.full(tuple(shape), value, dtype=dtype(n)))
    return b.op("Expand", b.const(torch.full([1] * len(shape), value, dtype=dtype(n))), sizes if isinstance(sizes, str) else b.sizes(sizes))


@emits(aten.full.default)
def full(b: Builder, n: Node, sizes: Any, value: Any, *_: Any) -> str:
    return _filled(b, n, sizes, value)


@emits(aten.zeros.default, aten.empty.memory_format)
def zeros(b: Builder, n: Node, sizes: Any, *_: Any) -> str:
    return _filled(b, n, sizes, 0)


@emits(aten.ones.default)
def ones(b: Builder, n: Node, sizes: Any, *_: Any) -> str:
    return _filled(b, n, sizes, 1)


@emits(aten.new_full.default)
def new_full(b: Builder, n: Node, x: Node, sizes: Any, value: Any, *_: Any) -> str:
    return _filled(b, n, sizes, value)


@emits(aten.new_zeros.default, aten.new_empty.default)
def new_zeros(b: Builder, n: Node, x: Node, sizes: Any, *_: Any) -> str:
    return _filled(b, n, sizes, 0)


@emits(aten.new_ones.default)
def new_ones(b: Builder, n: Node, x: Node, sizes: Any, *_: Any) -> str:
    return _filled(b, n, sizes, 1)


@emits(aten.full_like.default)
def full_like(b: Builder, n: Node, x: Node, value: Any, *_: Any) -> str:
    if isinstance(value, Node):
        return b.op("Expand", b.tensor(value, dtype(n)), b.shape(b(x), x.meta["val"]))
    if all(isinstance(s, int) for s in n.meta["val"].shape):
        return _filled(b, n, list(n.meta["val"].shape), value)
    return _filled(b, n, b.shape(b(x), x.meta["val"]), value)


@emits(aten.zeros_like.default, aten.empty_like.default)
def zeros_like(b: Builder, n: Node, x: Node, *_: Any) -> str:
    return full_like(b, n, x, 0)


@emits(aten.ones_like.default)
def ones_like(b: Builder, n: Node, x: Node, *_: Any) -> str:
    return full_like(b, n, x, 1)


@emits(aten.fill.Scalar, aten.fill.Tensor)
def fill(b: Builder, n: Node, x: Node, value: Any) -> str:
    return full_like(b, n, x, value)


@emits(aten.copy.default)
def copy(b: Builder, n: Node, x: Node, source: Node, *_: Any) -> str:
    """The values of `source` in the shape and type of x."""
    value = b.tensor(source, dtype(n))
    have, want = source.meta["val"].shape, x.meta["val"].shape
    if len(have) == len(want) and all(map(same, have, want)):
        return value
    return b.op("Expand", value, b.shape(b(x), x.meta["val"]))


@emits(aten.eye.default, aten.eye.m)
def eye(b: Builder, n: Node, rows: Any, *rest: Any) -> str:
    columns = rest[0] if n.target is aten.eye.m else rows
    if isinstance(rows, int) and isinstance(columns, int):
        return b.const(torch.eye(rows, columns, dtype=dtype(n)))
    where = [b.op("Range", b.const(0, torch.int64), b.scalar_size(s), b.const(1, torch.int64)) for s in (rows, columns)]
    return b.cast(b.op("Equal", b.op("Unsqueeze", where[0], b.ints(1)), where[1]), torch.bool, dtype(n))


@emits(aten.scalar_tensor.default)
def scalar_tensor(b: Builder, n: Node, value: Any, *_: Any) -> str:
    return b.tensor(value, dtype(n))


@emits(aten.arange.default)
def arange(b: Builder, n: Node, end: Any, *_: Any) -> str:
    return _range(b, n, 0, end, 1)


@emits(aten.arange.start)
def arange_start(b: Builder, n: Node, start: Any, end: Any, *_: Any) -> str:
    return _range(b, n, start, end, 1)


@emits(aten.arange.start_step)
def arange_step(b: Builder, n: Node, start: Any, end: Any, step: Any, *_: Any) -> str:
    return _range(b, n, start, end, step)


def _range(b: Builder, n: Node, start: Any, end: Any, step: Any) -> str:
    if not any(isinstance(a, Node) for a in (start, end, step)):
        return b.const(torch.arange(start, end, step, dtype=dtype(n)))
    if dtype(n) in (torch.int64, torch.int32):
        return b.op("Range", *[b.tensor(a, dtype(n)) for a in (start, end, step)])
    return b.cast(b.op("Range", *[b.tensor(a, torch.float32) for a in (start, end, step)]), torch.float32, dtype(n))


@emits(aten.linspace.default)
def linspace(b: Builder, n: Node, start: Any, end: Any, steps: Any, *_: Any) -> str:
    if not any(isinstance(a, Node) for a in (start, end, steps)):
        return b.const(torch.linspace(start, end, steps, dtype=dtype(n)))
    index = b.op("Range", b.const(0.0, torch.float32), b.tensor(steps, torch.float32), b.const(1.0, torch.float32))
    span = b.op("Sub", b.tensor(end, torch.float32), b.tensor(start, torch.float32))
    last = b.op("Max", b.op("Sub", b.tensor(steps, torch.float32), b.const(1.0, torch.float32)), b.const(1.0, torch.float32))
    return b.cast(b.op("Add", b.op("Div", b.op("Mul", index, span), last), b.tensor(start, torch.float32)), torch.float32, dtype(n))


@emits(aten.tril.default, aten.triu.default)
def tril(b: Builder, n: Node, x: Node, diagonal: int = 0) -> str:
    upper = int(n.target is aten.triu.default)
    if dtype(x) == torch.bool:
        return b.cast(
            b.op("Trilu", b.cast(b(x), torch.bool, torch.int32), b.const(diagonal, torch.int64), upper=upper), torch.int32, torch.bool
        )
    return b.op("Trilu", b(x), b.const(diagonal, torch.int64), upper=upper)


@emits(aten.one_hot.default)
def one_hot(b: Builder, n: Node, x: Node, classes: int) -> str:
    return b.cast(b.op("Equal", b.op("Unsqueeze", b(x), b.ints(-1)), b.const(torch.arange(classes))), torch.bool, dtype(n))


@emits(aten.meshgrid.indexing, aten.meshgrid.default)
def meshgrid(b: Builder, n: Node, parts: list[Node], indexing: str = "ij") -> list[str]:
    if indexing != "ij":
        raise LowerError(f"to_onnx: {n.name}: meshgrid with indexing {indexing!r}; possible is 'ij'")
    sizes = b.op("Concat", *[b.op("Shape", b(p)) for p in parts], axis=0)
    out = []
    for i, p in enumerate(parts):
        lifted = b.op("Reshape", b(p), b.ints(*[-1 if j == i else 1 for j in range(len(parts))]))
        out.append(b.op("Expand", lifted, sizes))
    return out
