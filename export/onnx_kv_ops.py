"""The dialect's cache operators in portable ONNX: quantize, dequantize, pack, unpack, and which rows a cache holds."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from .onnx_builder import END, Builder, Emitter
from .onnx_registry import dtype

foveate = torch.ops.foveate
F32, I32, I64 = torch.float32, torch.int32, torch.int64


def kv_held(b: Builder, n: Node, past: Node, lengths: Node, layer: int) -> str:
    slots = b.op("Range", b.const(0, I64), b.op("Squeeze", b.dim(past, 2), b.ints(0)), b.const(1, I64))
    return b.op("Less", slots, b.op("Unsqueeze", b.op("Gather", b(lengths), b.const(layer, I64), axis=0), b.ints(1)))


def quantize_kv(b: Builder, n: Node, x: Node, scale: Node, center: Node | None, bits: int, block: int) -> str:
    value = b.cast(b(x), dtype(x), F32)
    if center is not None:
        value = b.op("Sub", value, _spread(b, center, x, block, F32))
    if bits == 1:
        sign = b.op("Where", b.op("Less", value, b.const(0.0, F32)), b.const(-1, torch.int8), b.const(1, torch.int8))
        return sign
    top = 2 ** (bits - 1)
    value = b.op("Round", b.op("Div", value, _spread(b, scale, x, block, F32)))
    return b.cast(b.op("Clip", value, b.const(float(-top), F32), b.const(float(top - 1), F32)), F32, torch.int8)


def dequantize_kv(b: Builder, n: Node, codes: Node, scale: Node, center: Node | None, block: int) -> str:
    kind = dtype(scale)
    value = b.op("Mul", b.cast(b(codes), torch.int8, kind), _spread(b, scale, codes, block, kind))
    return value if center is None else b.op("Add", value, _spread(b, center, codes, block, kind))


def _spread(b: Builder, state: Node, x: Node, block: int, kind: torch.dtype) -> str:
    """`quantize_kv.spread`: a scale or centre of any granularity, broadcastable against x[B, G, T, D]."""
    val, width = state.meta["val"], int(x.meta["val"].shape[3])
    value, columns = b.cast(b(state), val.dtype, kind), int(val.shape[3])
    if block:
        value = _repeat(b, value, block, 2)
        value = b.op("Slice", value, b.ints(0), b.dim(x, 2), b.ints(2))
    return value if columns in (1, width) else _repeat(b, value, width // columns, 3)


def _repeat(b: Builder, value: str, times: int, axis: int) -> str:
    """repeat_interleave"""
    wide = b.op("Expand", b.op("Unsqueeze", value, b.ints(axis + 1)), b.ints(*[times if i == axis + 1 else 1 for i in range(5)]))
    shape = b.op("Shape", value)
    counts = b.ints(*[times if i == axis else 1 for i in range(4)])
    return b.op("Reshape", wide, b.op("Mul", shape, counts))


def pack_kv(b: Builder, n: Node, codes: Node, bits: int) -> str:
    """Digits by strided slices, added up in float: exact, and known to every target."""
    each, width = 8 // bits, int(codes.meta["val"].shape[-1])
    value, axis = b.cast(b(codes), torch.int8, F32), codes.meta["val"].dim() - 1
    if bits == 1:
        value = b.op("Cast", b.op("Greater", value, b.const(0.0, F32)), to=1)
    else:
        value = b.op("Add", value, b.const(float(2 ** (bits - 1)), F32))
    if width % each:
        value = b.op("Pad", value, b.ints(0, each - width % each), b.const(0.0, F32), b.ints(axis))
    total: Any = None
    for i in range(each):
        digit = b.op("Slice", value, b.ints(i), b.ints(END), b.ints(axis), b.ints(each)) if each > 1 else value
        digit = b.op("Mul", digit, b.const(float(2 ** (bits * i)), F32)) if i else digit
        total = digit if total is None else b.op("Add", total, digit)
    return b.cast(b.op("Sub", total, b.const(128.0, F32)), F32, torch.int8)


def unpack_kv(b: Builder, n: Node, packed: Node, bits: int, width: int) -> str:
    byte = b.op("Add", b.cast(b(packed), torch.int8, F32), b.const(128.0, F32))
    rank = packed.meta["val"].dim()
    above, digits = byte, []
    for i in range(8 // bits):  # base 2^bits, the lowest digit first
        rest = b.op("Floor", b.op("Mul", above, b.const(2.0**-bits, F32))) if i < 8 // bits - 1 else None
        digit = above if rest is None else b.op("Sub", above, b.op("Mul", rest, b.const(2.0**bits, F32)))
        digits.append(b.op("Unsqueeze", digit, b.ints(rank)))
        above = rest
    value = b.op("Concat", *digits, axis=rank)
    value = b.op("Reshape", value, b.ints(*[0] * (rank - 1), int(packed.meta["val"].shape[-1]) * (8 // bits)))
    if int(packed.meta["val"].shape[-1]) * (8 // bits) != width:
        value = b.op("Slice", value, b.ints(0), b.ints(width), b.ints(rank - 1))
    if bits == 1:
        value = b.op("Sub", b.op("Mul", value, b.const(2.0, F32)), b.const(1.0, F32))
    else:
        value = b.op("Sub", value, b.const(float(2 ** (bits - 1)), F32))
    return b.cast(value, F32, torch.int8)


def quantize_fp8(b: Builder, n: Node, x: Node, scale: Node, block: int) -> str:
    """As the op's body; the exponent by a logarithm that is corrected where it rounds across a power of two."""
    y = b.op("Div", b.cast(b(x), dtype(x), F32), _spread(b, scale, x, block, F32))
    a = b.op("Min", b.op("Abs", y), b.const(448.0, F32))
    at_least = b.op("Max", a, b.const(2.0**-6, F32))
    guess = b.cast(b.op("Floor", b.op("Mul", b.op("Log", at_least), b.const(1.4426950408889634, F32))), F32, I64)
    powers = b.const([2.0**e for e in range(-8, 12)], F32)  # 2^-8 .. 2^11

    def power(e: str, plus: int) -> str:
        return b.op("Gather", powers, b.op("Add", e, b.const(8 + plus, I64)), axis=0)

    e = b.op("Add", guess, b.cast(b.op("GreaterOrEqual", at_least, power(guess, 1)), torch.bool, I64))
    e = b.op("Sub", e, b.cast(b.op("Less", at_least, power(guess, 0)), torch.bool, I64))
    eighths = b.op("Round", b.op("Div", b.op("Mul", a, b.const(8.0, F32)), power(e, 0)))
    byte = b.op("Add", b.op("Mul", b.cast(b.op("Add", e, b.const(6, I64)), I64, F32), b.const(8.0, F32)), eighths)  # 16 eighths: the next exponent
    return b.cast(b.op("Where", b.op("Less", y, b.const(0.0, F32)), b.op("Sub", byte, b.const(128.0, F32)), byte), F32, torch.int8)


def dequantize_fp8(b: Builder, n: Node, codes: Node, scale: Node, block: int) -> str:
    """Looked up among the 256 bytes."""
    values = torch.arange(256, dtype=torch.int16).sub(128).to(torch.int8).view(torch.float8_e4m3fn).float().nan_to_num()
    index = b.op("Add", b.cast(b(codes), torch.int8, I32), b.const(128, I32))
    value = b.cast(b.op("Gather", b.const(values), index, axis=0), F32, dtype(scale))
    return b.op("Mul", value, _spread(b, scale, codes, block, dtype(scale)))


KV_OPS: dict[Any, Emitter] = {
    foveate.quantize_fp8.default: quantize_fp8,
    foveate.dequantize_fp8.default: dequantize_fp8,
    foveate.kv_held.default: kv_held,
    foveate.quantize_kv.default: quantize_kv,
    foveate.dequantize_kv.default: dequantize_kv,
    foveate.pack_kv.default: pack_kv,
    foveate.unpack_kv.default: unpack_kv,
}
