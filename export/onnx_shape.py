"""Views, gathers, joins and casts of aten, as ONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .errors import LowerError
from .onnx_builder import END, Builder
from .onnx_registry import dtype, emits, rank

aten = torch.ops.aten


def same(x: Any, y: Any) -> bool:
    """Are two sizes the same number or the same symbolic expression? Never adds a guard."""
    return _key(x) == _key(y)


def _key(size: Any) -> Any:
    return size if isinstance(size, int) else str(size.node.expr)


# ** views **


def reshape_to(b: Builder, name: str, have: Tensor, want: Tensor, sizes: Any = None) -> str:
    """Reshape by a constant wherever possible: 0 copies a dimension that stays in place, -1 takes the one that is left."""
    if len(have.shape) == len(want.shape) and all(map(same, have.shape, want.shape)):
        return name
    dims: list[int] = []
    for i, size in enumerate(want.shape):
        if isinstance(size, int):
            dims.append(size)
        elif i < have.dim() and same(have.shape[i], size):
            dims.append(0)
        else:
            dims.append(-1)
    if dims.count(-1) <= 1 and not any(s == 0 for s in want.shape if isinstance(s, int)):
        return b.op("Reshape", name, b.ints(*dims))
    if sizes is None:
        raise LowerError(f"to_onnx: reshape from {tuple(have.shape)} to {tuple(want.shape)} has more than one unknown size")
    return b.op("Reshape", name, b.sizes(sizes), allowzero=int(0 in [s for s in want.shape if isinstance(s, int)]) or None)


@emits(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def view(b: Builder, n: Node, x: Node, sizes: Any) -> str:
    return reshape_to(b, b(x), x.meta["val"], n.meta["val"], sizes)


@emits(
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
)
def by_shape(b: Builder, n: Node, x: Node, *rest: Any) -> str:
    """Views that their result's shape describes completely."""
    if n.target is aten.unsqueeze.default:
        return b.op("Unsqueeze", b(x), b.ints(rest[0] % rank(n)))
    if "squeeze" in str(n.target):
        return _squeeze(b, n, x, *rest)
    return reshape_to(b, b(x), x.meta["val"], n.meta["val"], _tail_sizes(b, n, x, rest))


def _squeeze(b: Builder, n: Node, x: Node, dim: Any = None) -> str:
    shape = x.meta["val"].shape
    asked = range(len(shape)) if dim is None else [d % len(shape) for d in ([dim] if isinstance(dim, int) else dim)]
    axes = [d for d in asked if isinstance(shape[d], int) and shape[d] == 1]
    return b.op("Squeeze", b(x), b.ints(*axes)) if axes else b(x)


def _tail_sizes(b: Builder, n: Node, x: Node, rest: tuple[Any, ...]) -> Any:
    if n.target is aten.flatten.using_ints:
        start, end = rest[0] % rank(x), rest[1] % rank(x)
        return [*[_dim(b, x, i) for i in range(start)], -1, *[_dim(b, x, i) for i in range(end + 1, rank(x))]]
    if n.target is aten.unflatten.int:
        at = rest[0] % rank(x)
        return [*[_dim(b, x, i) for i in range(at)], *rest[1], *[_dim(b, x, i) for i in range(at + 1, rank(x))]]
    return [_dim(b, rest[0], i) for i in range(rank(rest[0]))]


def _dim(b: Builder, x: Node, axis: int) -> Any:
    """A size for `Builder.sizes`: the int, or the name of a value."""
    size = x.meta["val"].shape[axis]
    return size if isinstance(size, int) else b.dim(x, axis)


@emits(aten.expand.default, aten.broadcast_to.default)
def expand(b: Builder, n: Node, x: Node, sizes: Any, *_: Any) -> str:
    have, want = x.meta["val"].shape, n.meta["val"].shape
    if len(have) == len(want) and all(map(same, have, want)):
        return b(x)
    lead = len(want) - len(have)
    dims = [1 if (isinstance(s, int) and s == -1) or (i >= lead and same(have[i - lead], want[i])) else s for i, s in enumerate(sizes)]
    return b.op("Expand", b(x), b.sizes(dims))


@emits(aten.expand_as.default)
def expand_as(b: Builder, n: Node, x: Node, other: Node) -> str:
    return b.op("Expand", b(x), b.shape(b(other), other.meta["val"]))


@emits(aten.transpose.int, aten.swapaxes.default)
def transpose(b: Builder, n: Node, x: Node, i: int, j: int) -> str:
    perm = list(range(rank(x)))
    i, j = i % rank(x), j % rank(x)
    perm[i], perm[j] = perm[j], perm[i]
    return b.op("Transpose", b(x), perm=perm)


@emits(aten.t.default, aten.numpy_T.default, aten.mT.default)
def t(b: Builder, n: Node, x: Node) -> str:
    if rank(x) < 2:
        return b(x)
    return transpose(b, n, x, -1, -2) if n.target is not aten.numpy_T.default else b.op("Transpose", b(x), perm=list(range(rank(x)))[::-1])


@emits(aten.permute.default)
def permute(b: Builder, n: Node, x: Node, dims: list[int]) -> str:
    return b.op("Transpose", b(x), perm=[d % rank(x) for d in dims])


@emits(aten.movedim.int)
def movedim(b: Builder, n: Node, x: Node, source: int, target: int) -> str:
    perm = [i for i in range(rank(x)) if i != source % rank(x)]
    perm.insert(target % rank(x), source % rank(x))
    return b.op("Transpose", b(x), perm=perm)


@emits(
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
    aten.detach_.default,
    aten._assert_tensor_metadata.default,
)
def identity(b: Builder, n: Node, x: Node, *_: Any) -> Any:
    return b(x)


@emits(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other, aten.type_as.default, aten._to_copy.default)
def to(b: Builder, n: Node, x: Node, *_: Any) -> str:
    return b.cast(b(x), dtype(x), dtype(n))


# ** picking **


@emits(aten.slice.Tensor)
def slice_(b: Builder, n: Node, x: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> str:
    start = 0 if start is None else start
    end = END if end is None or (isinstance(end, int) and end >= END) else end
    if isinstance(start, int) and start == 0 and isinstance(end, int) and end == END and step == 1:
        return b(x)
    return b.op("Slice", b(x), b.size(start), b.size(end), b.ints(dim % rank(x)), b.ints(step) if step != 1 else None)


@emits(aten.select.int)
def select(b: Builder, n: Node, x: Node, dim: int, index: Any) -> str:
    return b.op("Gather", b(x), b.scalar_size(index), axis=dim % rank(x))


@emits(aten.narrow.default)
def narrow(b: Builder, n: Node, x: Node, dim: int, start: Any, length: Any) -> str:
    return b.op("Slice", b(x), b.size(start), b.op("Add", b.size(start), b.size(length)), b.ints(dim % rank(x)))


@emits(aten.index_select.default)
def index_select(b: Builder, n: Node, x: Node, dim: int, index: Node) -> str:
    return b.op("Gather", b(x), b(index), axis=dim % rank(x))


@emits(aten.embedding.default)
def embedding(b: Builder, n: Node, weight: Node, index: Node, *_: Any) -> str:
    return b.op("Gather", b(weight), b(index), axis=0)


@emits(aten.gather.default)
def gather(b: Builder, n: Node, x: Node, dim: int, index: Node, *_: Any) -> str:
    return b.op("GatherElements", b(x), b(index), axis=dim % rank(x))


@emits(aten.take_along_dim.default)
def take_along_dim(b: Builder, n: Node, x: Node, index: Node, dim: int) -> str:
    return gather(b, n, x, dim, index)


@emits(aten.index.Tensor, aten._unsafe_index.Tensor)
def index(b: Builder, n: Node, x: Node, indices: list[Node | None]) -> str:
    """x[:, i, j]: one index is a Gather; several adjacent ones broadcast and become a GatherND."""
    at = [i for i, v in enumerate(indices) if v is not None]
    picked = [v for v in indices if v is not None]
    if any(dtype(v) == torch.bool for v in picked):
        raise LowerError(
            f"to_onnx: {n.name}: indexing by a boolean mask gives a data-dependent shape; possible are integer indices and torch.where"
        )
    if len(picked) == 1:
        return b.op("Gather", b(x), b.tensor(picked[0], torch.int64), axis=at[0])
    if at != list(range(at[0], at[0] + len(at))):
        raise LowerError(f"to_onnx: {n.name}: indices at dimensions {at} are not adjacent")
    moved = b(x)
    if at[0]:
        moved = b.op("Transpose", moved, perm=[*at, *[i for i in range(rank(x)) if i not in at]])
    result = b.op("GatherND", moved, _joined(b, picked))
    if not at[0]:
        return result
    width = max(rank(v) for v in picked)  # [index dims, leading dims, trailing dims] -> the leading dims first
    lead, rest = list(range(width, width + at[0])), list(range(width + at[0], rank(n)))
    return b.op("Transpose", result, perm=[*lead, *range(width), *rest])


def _joined(b: Builder, indices: list[Node]) -> str:
    """Index tensors -> one [..., len(indices)] tensor over their broadcast shape."""
    names = [b.tensor(v, torch.int64) for v in indices]
    common = names[0]
    for name in names[1:]:
        common = b.op("Add", common, name)
    shape = b.op("Shape", common)
    return b.op("Concat", *[b.op("Unsqueeze", b.op("Expand", name, shape), b.ints(-1)) for name in names], axis=-1)


@emits(aten.index_put.default)
def index_put(b: Builder, n: Node, x: Node, indices: list[Node | None], values: Node, accumulate: bool = False) -> str:
    picked = [v for v in indices if v is not None]
    if len(picked) == 1 and dtype(picked[0]) == torch.bool and rank(values) == 0:
        mask = b(picked[0])
        for _ in range(rank(x) - rank(picked[0])):
            mask = b.op("Unsqueeze", mask, b.ints(-1))
        return b.op("Where", mask, b.tensor(values, dtype(n)), b(x))
    if len(picked) != len(indices) or any(dtype(v) == torch.bool for v in picked):
        raise LowerError(f"to_onnx: {n.name}: index_put takes leading integer indices, or one boolean mask with one value")
    joined = _joined(b, picked)
    tail = b.op("Shape", b(x), start=len(picked))
    shape = b.op("Concat", b.op("Shape", joined, end=-1), tail, axis=0)
    updates = b.op("Expand", b.tensor(values, dtype(n)), shape)
    return b.op("ScatterND", b(x), joined, updates, reduction="add" if accumulate else None)


@emits(aten.scatter.src)
def scatter(b: Builder, n: Node, x: Node, dim: int, index: Node, source: Node) -> str:
    return b.op("ScatterElements", b(x), b(index), b.tensor(source, dtype(n)), axis=dim % rank(x))


@emits(aten.scatter.value)
def scatter_value(b: Builder, n: Node, x: Node, dim: int, index: Node, value: Any) -> str:
    return b.op(
        "ScatterElements",
        b(x),
        b(index),
        b.op("Expand", b.const(value, dtype(n)), b.shape(b(index), index.meta["val"])),
        axis=dim % rank(x),
    )


@emits(aten.scatter_add.default)
def scatter_add(b: Builder, n: Node, x: Node, dim: int, index: Node, source: Node) -> str:
    return b.op("ScatterElements", b(x), b(index), b.tensor(source, dtype(n)), axis=dim % rank(x), reduction="add")


@emits(aten.slice_scatter.default)
def slice_scatter(b: Builder, n: Node, x: Node, source: Node, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> str:
    if step != 1:
        return _interleave(b, n, x, source, dim % rank(x), start or 0, end, step)
    axis = b.ints(dim % rank(x))
    start = 0 if start is None else start
    parts = [b.op("Slice", b(x), b.ints(0), b.size(start), axis), b(source)]
    if end is not None and not (isinstance(end, int) and end >= END):
        parts.append(b.op("Slice", b(x), b.size(end), b.ints(END), axis))
    return b.op("Concat", *parts, axis=dim % rank(x))


def _interleave(b: Builder, n: Node, x: Node, source: Node, axis: int, start: Any, end: Any, step: int) -> str:
    """Every step-th place takes the next row of `source`: one Gather from x and source side by side, where sizes are constants."""
    size = x.meta["val"].shape[axis]
    if not all(isinstance(v, int) for v in (size, start, source.meta["val"].shape[axis])):
        raise LowerError(f"to_onnx: {n.name}: slice_scatter with step {step} over an axis whose size is symbolic; possible is step 1")
    places = list(range(size))[start : size if end is None or end > size else end : step]
    order = [size + places.index(i) if i in places else i for i in range(size)]
    return b.op("Gather", b.op("Concat", b(x), b(source), axis=axis), b.ints(*order), axis=axis)


# ** joining and splitting **


@emits(aten.cat.default, aten.concat.default)
def cat(b: Builder, n: Node, parts: list[Node], dim: int = 0) -> str:
    parts = [p for p in parts if not (rank(p) == 1 and rank(n) > 1)]  # aten lets an empty [0] tensor join anything
    names = [b.tensor(p, dtype(n)) for p in parts]
    return names[0] if len(names) == 1 else b.op("Concat", *names, axis=dim % rank(n))


@emits(aten.stack.default)
def stack(b: Builder, n: Node, parts: list[Node], dim: int = 0) -> str:
    axis = dim % rank(n)
    return b.op("Concat", *[b.op("Unsqueeze", b.tensor(p, dtype(n)), b.ints(axis)) for p in parts], axis=axis)


@emits(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes, aten.tensor_split.sections)
def split(b: Builder, n: Node, x: Node, sizes: Any, dim: int = 0) -> list[str]:
    axis = dim % rank(x)
    parts = [v.shape[axis] for v in n.meta["val"]]
    if len(parts) == 1:
        return [b(x)]
    if all(isinstance(p, int) for p in parts):
        return b.op("Split", b(x), b.ints(*parts), axis=axis, outputs=len(parts))
    if n.target in (aten.split_with_sizes.default, aten.split.sizes):
        return b.op("Split", b(x), b.sizes(sizes), axis=axis, outputs=len(parts))
    if n.target is aten.tensor_split.sections:
        raise LowerError(f"to_onnx: {n.name}: tensor_split of a symbolic size is not lowered")
    step = b.size(sizes)
    if n.target is aten.chunk.default:
        total = b.dim(x, axis)
        step = b.op("Div", b.op("Add", total, b.ints(sizes - 1)), b.ints(sizes))
    at = [b.op("Mul", step, b.ints(i)) for i in range(len(parts))]
    return [b.op("Slice", b(x), at[i], at[i + 1] if i + 1 < len(parts) else b.ints(END), b.ints(axis)) for i in range(len(parts))]


@emits(aten.unbind.int)
def unbind(b: Builder, n: Node, x: Node, dim: int = 0) -> list[str]:
    return [b.op("Gather", b(x), b.const(i, torch.int64), axis=dim % rank(x)) for i in range(len(n.meta["val"]))]


@emits(aten.repeat.default)
def repeat(b: Builder, n: Node, x: Node, repeats: Any) -> str:
    lead = len(repeats) - rank(x)
    name = b.op("Unsqueeze", b(x), b.ints(*range(lead))) if lead else b(x)
    return name if all(isinstance(r, int) and r == 1 for r in repeats) else b.op("Tile", name, b.sizes(repeats))


@emits(aten.repeat_interleave.self_int)
def repeat_interleave(b: Builder, n: Node, x: Node, repeats: Any, dim: int | None = None, *_: Any) -> str:
    have = x.meta["val"]
    name = b(x)
    if dim is None:
        name, have, dim = b.op("Reshape", name, b.ints(-1)), have.reshape(-1), 0
    axis = dim % have.dim()
    wide = b.op("Unsqueeze", name, b.ints(axis + 1))
    ones = [1] * (have.dim() + 1)
    wide = b.op("Expand", wide, b.sizes([*ones[: axis + 1], repeats, *ones[axis + 2 :]]))
    if all(isinstance(s, int) for s in n.meta["val"].shape):
        return b.op("Reshape", wide, b.ints(*n.meta["val"].shape))
    if axis <= 1 or (isinstance(have.shape[axis], int) and isinstance(repeats, int)):
        merged = have.shape[axis] * repeats if isinstance(have.shape[axis], int) and isinstance(repeats, int) else -1
        rest = [s if isinstance(s, int) else None for s in have.shape[axis + 1 :]]
        if None not in rest:
            return b.op("Reshape", wide, b.ints(*[0] * axis, merged, *rest))
    sizes = [b.dim_of(name, have, i) for i in range(have.dim())]
    sizes[axis] = b.op("Mul", sizes[axis], b.size(repeats))
    return b.op("Reshape", wide, b.op("Concat", *sizes, axis=0))


@emits(aten.tile.default)
def tile(b: Builder, n: Node, x: Node, repeats: Any) -> str:
    return repeat(b, n, x, [*[1] * (rank(x) - len(repeats)), *repeats])


@emits(aten.roll.default)
def roll(b: Builder, n: Node, x: Node, shifts: list[Any], dims: list[int]) -> str:
    name = b(x)
    for shift, dim in zip(shifts, dims, strict=True):
        axis = b.ints(dim % rank(x))
        cut = b.op("Neg", b.size(shift))
        name = b.op("Concat", b.op("Slice", name, cut, b.ints(END), axis), b.op("Slice", name, b.ints(0), cut, axis), axis=dim % rank(x))
    return name


@emits(aten.flip.default)
def flip(b: Builder, n: Node, x: Node, dims: list[int]) -> str:
    k = len(dims)
    return b.op("Slice", b(x), b.ints(*[-1] * k), b.ints(*[-END] * k), b.ints(*[d % rank(x) for d in dims]), b.ints(*[-1] * k))


@emits(aten.pad.default, aten.constant_pad_nd.default)
def pad(b: Builder, n: Node, x: Node, pads: list[Any], *rest: Any) -> str:
    mode, value = rest if n.target is aten.pad.default else ("constant", rest[0] if rest else 0)
    modes = {"constant": "constant", "reflect": "reflect", "replicate": "edge"}
    if mode not in modes:
        raise LowerError(f"to_onnx: {n.name}: padding mode {mode!r}; possible are {list(modes)}")
    count = len(pads) // 2
    order = [*pads[0::2][::-1], *pads[1::2][::-1]]  # aten lists the last dimension first
    axes = b.ints(*range(rank(x) - count, rank(x)))
    if dtype(x) == torch.bool:
        padded = b.op("Pad", b.cast(b(x), torch.bool, torch.int32), b.sizes(order), b.const(int(value or 0), torch.int32), axes)
        return b.cast(padded, torch.int32, torch.bool)
    return b.op("Pad", b(x), b.sizes(order), b.const(value or 0, dtype(x)) if mode == "constant" else None, axes, mode=modes[mode])
