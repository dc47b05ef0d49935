"""Arithmetic, comparisons and matrix products of aten, as ONNX."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from .errors import LowerError
from .onnx_builder import Builder
from .onnx_registry import EMITTERS, dtype, emits, rank

aten = torch.ops.aten


# ** elementwise **


def _binary(kind: str) -> Any:
    def emit(b: Builder, n: Node, x: Any, y: Any, *rest: Any) -> str:
        if rest and rest[0] not in (1, None):
            y = _scaled(b, n, y, rest[0])
            return b.op(kind, b.tensor(x, dtype(n)), y)
        return b.op(kind, b.tensor(x, dtype(n)), b.tensor(y, dtype(n)))

    return emit


def _scaled(b: Builder, n: Node, y: Any, alpha: Any) -> str:
    return b.op("Mul", b.tensor(y, dtype(n)), b.tensor(alpha, dtype(n)))


for _targets, _kind in (
    ((aten.add.Tensor, aten.add.Scalar), "Add"),
    ((aten.sub.Tensor, aten.sub.Scalar), "Sub"),
    ((aten.mul.Tensor, aten.mul.Scalar), "Mul"),
    ((aten.maximum.default,), "Max"),
    ((aten.minimum.default,), "Min"),
):
    for _target in _targets:
        EMITTERS[_target] = _binary(_kind)


@emits(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(b: Builder, n: Node, x: Any, y: Any, alpha: Any = 1) -> str:
    scaled = b.tensor(x, dtype(n)) if alpha == 1 else _scaled(b, n, x, alpha)
    return b.op("Sub", b.tensor(y, dtype(n)), scaled)


@emits(aten.div.Tensor, aten.div.Scalar)
def div(b: Builder, n: Node, x: Any, y: Any) -> str:
    return b.op("Div", b.tensor(x, dtype(n)), b.tensor(y, dtype(n)))


@emits(aten.div.Tensor_mode, aten.floor_divide.default, aten.div.Scalar_mode)
def div_mode(b: Builder, n: Node, x: Any, y: Any, rounding_mode: str | None = "floor") -> str:
    x, y = b.tensor(x, dtype(n)), b.tensor(y, dtype(n))
    if dtype(n).is_floating_point:
        quotient = b.op("Div", x, y)
        if rounding_mode == "trunc":
            return b.op("Mul", b.op("Sign", quotient), b.op("Floor", b.op("Abs", quotient)))
        return b.op("Floor", quotient) if rounding_mode == "floor" else quotient
    return _floor_div(b, x, y) if rounding_mode == "floor" else b.op("Div", x, y)


def _floor_div(b: Builder, x: str, y: str) -> str:
    """ONNX divides integers towards zero; (x - x mod y) / y is exact, and Mod takes the divisor's sign as python does."""
    return b.op("Div", b.op("Sub", x, b.op("Mod", x, y)), y)


@emits(aten.remainder.Tensor, aten.remainder.Scalar)
def remainder(b: Builder, n: Node, x: Any, y: Any) -> str:
    x, y = b.tensor(x, dtype(n)), b.tensor(y, dtype(n))
    if not dtype(n).is_floating_point:
        return b.op("Mod", x, y)
    return b.op("Sub", x, b.op("Mul", b.op("Floor", b.op("Div", x, y)), y))


for _target, _kind in (
    (aten.cos.default, "Cos"),
    (aten.sin.default, "Sin"),
    (aten.neg.default, "Neg"),
    (aten.sigmoid.default, "Sigmoid"),
    (aten.tanh.default, "Tanh"),
    (aten.relu.default, "Relu"),
    (aten.sqrt.default, "Sqrt"),
    (aten.exp.default, "Exp"),
    (aten.log.default, "Log"),
    (aten.abs.default, "Abs"),
    (aten.floor.default, "Floor"),
    (aten.ceil.default, "Ceil"),
    (aten.round.default, "Round"),
    (aten.erf.default, "Erf"),
    (aten.sign.default, "Sign"),
    (aten.reciprocal.default, "Reciprocal"),
    (aten.softplus.default, "Softplus"),
    (aten.isnan.default, "IsNaN"),
):

    def _unary(b: Builder, n: Node, x: Node, *_: Any, kind: str = _kind) -> str:
        return b.op(kind, b.tensor(x, dtype(x) if dtype(n) == torch.bool else dtype(n)))

    EMITTERS[_target] = _unary


@emits(aten.rsqrt.default)
def rsqrt(b: Builder, n: Node, x: Node) -> str:
    return b.op("Reciprocal", b.op("Sqrt", b.tensor(x, dtype(n))))


@emits(aten.silu.default)
def silu(b: Builder, n: Node, x: Node) -> str:
    return b.op("Mul", b(x), b.op("Sigmoid", b(x)))


@emits(aten.gelu.default)
def gelu(b: Builder, n: Node, x: Node, approximate: str) -> str:
    return b.op("Gelu", b(x), approximate=approximate)


@emits(aten.square.default)
def square(b: Builder, n: Node, x: Node) -> str:
    return b.op("Mul", b(x), b(x))


@emits(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar)
def power(b: Builder, n: Node, x: Any, exponent: Any) -> str:
    if exponent == 2:
        return b.op("Mul", b.tensor(x, dtype(n)), b.tensor(x, dtype(n)))
    return b.op("Pow", b.tensor(x, dtype(n)), b.tensor(exponent, dtype(n)))


@emits(aten.clamp.default, aten.clip.default, aten.clamp_min.default)
def clamp(b: Builder, n: Node, x: Node, low: Any = None, high: Any = None) -> str:
    value = b.tensor(x, dtype(n))
    value = value if low is None else b.op("Max", value, b.tensor(low, dtype(n)))
    return value if high is None else b.op("Min", value, b.tensor(high, dtype(n)))


@emits(aten.clamp_max.default)
def clamp_max(b: Builder, n: Node, x: Node, high: Any) -> str:
    return b.op("Min", b.tensor(x, dtype(n)), b.tensor(high, dtype(n)))


@emits(aten.clamp.Tensor)
def clamp_tensor(b: Builder, n: Node, x: Node, low: Any = None, high: Any = None) -> str:
    return clamp(b, n, x, low, high)


# ** comparison and logic **


def _compare(kind: str, negate: bool = False) -> Any:
    def emit(b: Builder, n: Node, x: Any, y: Any) -> str:
        common = promoted(x, y)
        if kind != "Equal" and common == torch.bool:
            common = torch.int32  # ONNX orders numbers only
        result = b.op(kind, b.tensor(x, common), b.tensor(y, common))
        return b.op("Not", result) if negate else result

    return emit


def promoted(x: Any, y: Any) -> torch.dtype:
    """The type in which aten would compare x with y."""
    values = [a.meta["val"] if isinstance(a, Node) else a for a in (x, y)]
    values = [v if isinstance(v, (Tensor, bool, int, float)) else 1 for v in values]  # a symbolic size promotes like an int
    return torch.result_type(*values) if any(isinstance(v, Tensor) for v in values) else torch.int64


for _name, _kind, _negate in (
    ("eq", "Equal", False),
    ("ne", "Equal", True),
    ("lt", "Less", False),
    ("le", "LessOrEqual", False),
    ("gt", "Greater", False),
    ("ge", "GreaterOrEqual", False),
):
    for _overload in ("Tensor", "Scalar"):
        EMITTERS[getattr(getattr(aten, _name), _overload)] = _compare(_kind, _negate)


def _logical(kind: str) -> Any:
    def emit(b: Builder, n: Node, x: Any, y: Any) -> str:
        return b.op(kind, b.tensor(x, torch.bool), b.tensor(y, torch.bool))

    return emit


for _kind, _targets in (
    ("And", (aten.logical_and.default, aten.bitwise_and.Tensor, aten.__and__.Tensor)),
    ("Or", (aten.logical_or.default, aten.bitwise_or.Tensor, aten.__or__.Tensor)),
    ("Xor", (aten.logical_xor.default, aten.bitwise_xor.Tensor)),
):
    for _target in _targets:
        EMITTERS[_target] = _logical(_kind)


@emits(aten.logical_not.default, aten.bitwise_not.default)
def logical_not(b: Builder, n: Node, x: Node) -> str:
    if n.target is aten.bitwise_not.default and dtype(n) != torch.bool:
        return b.op("BitwiseNot", b(x))
    return b.op("Not", b.tensor(x, torch.bool))


@emits(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(b: Builder, n: Node, condition: Node, x: Any, y: Any) -> str:
    return b.op("Where", b.tensor(condition, torch.bool), b.tensor(x, dtype(n)), b.tensor(y, dtype(n)))


@emits(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(b: Builder, n: Node, x: Node, mask: Node, value: Any) -> str:
    return b.op("Where", b.tensor(mask, torch.bool), b.tensor(value, dtype(n)), b.tensor(x, dtype(n)))


# ** products **


@emits(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(b: Builder, n: Node, x: Node, y: Node) -> str:
    return b.op("MatMul", b.tensor(x, dtype(n)), b.tensor(y, dtype(n)))


@emits(aten.linear.default)
def linear(b: Builder, n: Node, x: Node, weight: Node, bias: Node | None) -> str:
    """x W^T + bias. The weight is stored transposed, unless something else reads it as it is (tied embeddings): then Gemm transposes."""
    found = b.parameter(weight)
    if found is None:
        product = b.op("MatMul", b(x), b.op("Transpose", b(weight), perm=[1, 0]))
    elif rank(x) == 2:
        return b.op("Gemm", b(x), b(weight), b(bias) if bias is not None else None, transB=1)
    elif b.alias[found[0]] in b.read_raw:
        flat = b.op(
            "Gemm",
            b.op("Reshape", b(x), b.ints(-1, weight.meta["val"].shape[1])),
            b(weight),
            b(bias) if bias is not None else None,
            transB=1,
        )
        return b.op("Reshape", flat, b.op("Concat", b.op("Shape", b(x), end=-1), b.ints(weight.meta["val"].shape[0]), axis=0))
    else:
        product = b.op("MatMul", b(x), b.weight(found[0], transpose=True, dtype=found[1]))
    return product if bias is None else b.op("Add", product, b(bias))


@emits(aten.addmm.default)
def addmm(b: Builder, n: Node, bias: Node, x: Node, y: Node, beta: Any, alpha: Any) -> str:
    return b.op("Gemm", b(x), b(y), b(bias), alpha=float(alpha), beta=float(beta))


@emits(aten.baddbmm.default)
def baddbmm(b: Builder, n: Node, bias: Node, x: Node, y: Node, beta: Any, alpha: Any) -> str:
    product = b.op("Mul", b.op("MatMul", b(x), b(y)), b.tensor(alpha, dtype(n)))
    return b.op("Add", product, b.op("Mul", b(bias), b.tensor(beta, dtype(n))))


@emits(aten.outer.default)
def outer(b: Builder, n: Node, x: Node, y: Node) -> str:
    return b.op("Mul", b.op("Unsqueeze", b.tensor(x, dtype(n)), b.ints(1)), b.op("Unsqueeze", b.tensor(y, dtype(n)), b.ints(0)))


@emits(aten.einsum.default)
def einsum(b: Builder, n: Node, equation: str, operands: list[Node], *_: Any) -> str:
    return b.op("Einsum", *[b.tensor(o, dtype(n)) for o in operands], equation=equation)


@emits(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def conv(b: Builder, n: Node, x: Node, weight: Node, bias: Node | None, stride: Any, padding: Any, dilation: Any, groups: int) -> str:
    spatial = rank(x) - 2

    def spread(v: Any) -> list[int]:
        v = [v] if isinstance(v, int) else list(v)
        return v * spatial if len(v) == 1 else v

    return b.op(
        "Conv",
        b(x),
        b(weight),
        b(bias) if bias is not None else None,
        strides=spread(stride),
        pads=spread(padding) * 2,
        dilations=spread(dilation),
        group=groups,
    )


@emits(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def conv_named_padding(
    b: Builder, n: Node, x: Node, weight: Node, bias: Node | None, stride: Any, padding: str, dilation: Any, groups: int
) -> str:
    """ "valid", or "same": what is odd goes to the end."""
    kernel = [int(s) for s in weight.meta["val"].shape[2:]]
    spread = [dilation] * len(kernel) if isinstance(dilation, int) else list(dilation) * (len(kernel) if len(dilation) == 1 else 1)
    total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(spread, kernel, strict=True)]
    steps = [stride] * len(kernel) if isinstance(stride, int) else list(stride) * (len(kernel) if len(stride) == 1 else 1)
    return b.op(
        "Conv",
        b(x),
        b(weight),
        b(bias) if bias is not None else None,
        strides=steps,
        dilations=spread,
        group=groups,
        pads=[t // 2 for t in total] + [t - t // 2 for t in total],
    )


@emits(aten.convolution.default)
def convolution(
    b: Builder,
    n: Node,
    x: Node,
    weight: Node,
    bias: Node | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    _out: Any,
    groups: int,
) -> str:
    if transposed:
        raise LowerError(f"to_onnx: {n.name}: transposed convolution is not lowered")
    return conv(b, n, x, weight, bias, stride, padding, dilation, groups)


@emits(aten.scaled_dot_product_attention.default)
def sdpa(
    b: Builder, n: Node, q: Node, k: Node, v: Node, mask: Node | None, dropout: float, causal: bool, scale: float | None, gqa: bool
) -> str:
    """The towers that bypass the attention interface."""
    if dropout:
        raise LowerError(f"to_onnx: {n.name}: attention with dropout {dropout}; call .eval() before capture")
    width = q.meta["val"].shape[-1]
    return b.op(
        "Attention", b(q), b(k), b(v), b(mask) if mask is not None else None, is_causal=int(causal), scale=float(scale or width**-0.5)
    )


# ** sizes **

for _target, _kind in (
    (operator.add, "Add"),
    (operator.sub, "Sub"),
    (operator.mul, "Mul"),
    (torch.sym_max, "Max"),
    (torch.sym_min, "Min"),
    (operator.mod, "Mod"),
):

    def _size_op(b: Builder, n: Node, *args: Any, kind: str = _kind) -> str:
        return b.op(kind, *[b.size(a) for a in args])

    EMITTERS[_target] = _size_op


@emits(operator.neg)
def neg_size(b: Builder, n: Node, x: Any) -> str:
    return b.op("Neg", b.size(x))


@emits(operator.floordiv)
def floordiv_size(b: Builder, n: Node, x: Any, y: Any) -> str:
    return _floor_div(b, b.size(x), b.size(y))


@emits(aten.sym_size.int)
def sym_size(b: Builder, n: Node, x: Node, dim: int) -> str:
    return b.dim(x, dim)


@emits(aten.sym_numel.default)
def sym_numel(b: Builder, n: Node, x: Node) -> str:
    return b.op("Size", b(x))


@emits(operator.getitem)
def getitem(b: Builder, n: Node, x: Node, index: int) -> Any:
    return b(x)[index]
