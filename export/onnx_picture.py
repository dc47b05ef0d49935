"""Resizing, pooling and patches of aten, as ONNX."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .errors import LowerError
from .onnx_builder import Builder
from .onnx_registry import EMITTERS, dtype, emits

aten = torch.ops.aten


def _resize(mode: str, **extra: Any) -> Any:
    def emit(b: Builder, n: Node, x: Node, size: Any, *rest: Any) -> str:
        align = bool(rest[0]) if mode != "nearest" and rest else False
        have, want = x.meta["val"].shape, n.meta["val"].shape
        spatial = [s if isinstance(s, int) else None for s in want[2:]]
        if None in spatial:
            if size is None:
                raise LowerError(f"to_onnx: {n.name}: resize by a scale of a symbolic size is not lowered; give the output size")
            spatial = list(size)
        sizes = (
            b.op("Concat", b.op("Shape", b(x), end=2), b.sizes(spatial), axis=0)
            if not all(isinstance(s, int) for s in have[:2])
            else b.sizes([*have[:2], *spatial])
        )
        where = "align_corners" if align else ("asymmetric" if mode == "nearest" else "half_pixel")
        return b.op("Resize", b(x), None, None, sizes, mode=mode, coordinate_transformation_mode=where, **extra)

    return emit


for _name, _mode, _extra in (
    ("upsample_nearest2d", "nearest", {"nearest_mode": "floor"}),
    ("upsample_bilinear2d", "linear", {}),
    ("upsample_bicubic2d", "cubic", {"cubic_coeff_a": -0.75}),
):
    for _overload in ("vec", "default"):
        EMITTERS[getattr(getattr(aten, _name), _overload)] = _resize(_mode, **_extra)


@emits(aten.grid_sampler.default, aten.grid_sampler_2d.default)
def grid_sampler(b: Builder, n: Node, x: Node, grid: Node, mode: int, padding: int, align: bool) -> str:
    return b.op(
        "GridSample",
        b(x),
        b(grid),
        mode=("linear", "nearest", "cubic")[mode],
        padding_mode=("zeros", "border", "reflection")[padding],
        align_corners=int(align),
    )


@emits(
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa.default,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
)
def antialiased(b: Builder, n: Node, x: Node, _size: Any, align: bool, *_: Any) -> str:
    """A separable linear map: one constant matrix per axis, taken from torch itself. (ONNX Runtime's antialiased Resize differs by
    1e-1.)"""
    have, want = x.meta["val"].shape[2:], n.meta["val"].shape[2:]
    if not all(isinstance(s, int) for s in (*have, *want)):
        raise LowerError(f"to_onnx: {n.name}: antialiased resizing from {tuple(have)} to {tuple(want)} needs fixed sizes")
    mode = "bicubic" if "bicubic" in str(n.target) else "bilinear"
    rows, columns = (
        torch.nn.functional.interpolate(torch.eye(old)[None, None], (new, old), mode=mode, antialias=True, align_corners=align)[0, 0].to(
            dtype(n)
        )
        for old, new in zip(have, want, strict=True)
    )
    return b.op("MatMul", b.op("MatMul", b.const(rows), b(x)), b.const(columns.t().contiguous()))


@emits(aten.im2col.default)
def im2col(b: Builder, n: Node, x: Node, kernel: list[int], dilation: list[int], padding: list[int], stride: list[int]) -> str:
    """Patches that tile the picture: [B, C, H, W] -> [B, C kh kw, H/kh W/kw]. (As a GatherND, ONNX Runtime 1.31's optimizer breaks it.)"""
    channels, height, width = x.meta["val"].shape[1:]
    (kh, kw) = kernel
    tiles = (
        list(kernel) == list(stride)
        and list(dilation) == [1, 1]
        and list(padding) == [0, 0]
        and all(isinstance(s, int) for s in (channels, height, width))
    )
    if not tiles or height % kh or width % kw:
        raise LowerError(
            f"to_onnx: {n.name}: unfold with kernel {kernel}, stride {stride}, padding {padding} over {(height, width)} does not tile it"
        )
    split = b.op("Reshape", b(x), b.ints(0, channels, height // kh, kh, width // kw, kw))
    return b.op("Reshape", b.op("Transpose", split, perm=[0, 1, 3, 5, 2, 4]), b.ints(0, channels * kh * kw, (height // kh) * (width // kw)))


@emits(aten.pixel_shuffle.default)
def pixel_shuffle(b: Builder, n: Node, x: Node, factor: int) -> str:
    return b.op("DepthToSpace", b(x), blocksize=factor, mode="CRD")


def _pair(value: Any) -> list[int]:
    value = [value] if isinstance(value, int) else list(value)
    return value * 2 if len(value) == 1 else value


@emits(aten.avg_pool2d.default)
def avg_pool2d(b: Builder, n: Node, x: Node, kernel: Any, stride: Any, padding: Any, ceil: bool, include_pad: bool, _divisor: Any) -> str:
    return b.op(
        "AveragePool",
        b(x),
        kernel_shape=_pair(kernel),
        strides=_pair(stride or kernel),
        pads=_pair(padding) * 2,
        ceil_mode=int(ceil),
        count_include_pad=int(include_pad),
    )


@emits(aten.avg_pool1d.default)
def avg_pool1d(
    b: Builder, n: Node, x: Node, kernel: list[int], stride: list[int], padding: list[int], ceil: bool, include_pad: bool
) -> str:
    return b.op(
        "AveragePool",
        b(x),
        kernel_shape=list(kernel),
        strides=list(stride or kernel),
        pads=[*padding] * 2,
        ceil_mode=int(ceil),
        count_include_pad=int(include_pad),
    )


@emits(aten.max_pool2d.default)
def max_pool2d(b: Builder, n: Node, x: Node, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> str:
    return b.op(
        "MaxPool",
        b(x),
        kernel_shape=_pair(kernel),
        strides=_pair(stride or kernel),
        pads=_pair(padding) * 2,
        dilations=_pair(dilation),
        ceil_mode=int(ceil),
    )


@emits(aten.adaptive_avg_pool2d.default)
def adaptive_avg_pool2d(b: Builder, n: Node, x: Node, size: Any) -> str:
    have, want = x.meta["val"].shape[-2:], _pair(size)
    if want == [1, 1]:
        return b.op("GlobalAveragePool", b(x))
    if not all(isinstance(h, int) and h % w == 0 for h, w in zip(have, want, strict=True)):
        raise LowerError(f"to_onnx: {n.name}: adaptive pooling of {tuple(have)} to {want} is not a whole number of cells")
    cell = [h // w for h, w in zip(have, want, strict=True)]
    return b.op("AveragePool", b(x), kernel_shape=cell, strides=cell)
