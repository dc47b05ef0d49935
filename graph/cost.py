"""What a program costs: FLOPs, bytes moved and KV bytes per layer, as expressions of the token counts.

A multiply-add counts as two FLOPs (the convention of the papers we compare with). Element-wise work is counted in bytes, not FLOPs.
Symbols: B batch, S sequence, N visual tokens, P<l> past rows of layer l, images, C tokens of a compressed prefix.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Node

from .kv_format import FLOAT
from .kv_table import symbols
from .program import Program, Stage
from .sites import layer_of

A, F = torch.ops.aten, torch.ops.foveate
OTHER = -1  # the row of nodes outside layers: embedding, head, selection


@dataclass(frozen=True)
class Row:
    """One layer (or OTHER): expressions in the contract's symbols."""

    layer: int
    tokens: sympy.Expr
    flops: sympy.Expr
    bytes: sympy.Expr


@dataclass(frozen=True)
class Cost:
    """The cost of one stage. `flops`, `bytes` are sums over the rows; evaluate with `at`."""

    rows: tuple[Row, ...]
    kv_bytes: sympy.Expr

    @property
    def flops(self) -> sympy.Expr:
        return sum((r.flops for r in self.rows), sympy.Integer(0))

    @property
    def bytes(self) -> sympy.Expr:
        return sum((r.bytes for r in self.rows), sympy.Integer(0))

    def at(self, **sizes: int) -> dict[str, Any]:
        """Numbers for these sizes: {"flops", "bytes", "kv_bytes", "layers": [{"layer", "tokens", "flops", "bytes"}]}; a missing symbol is a KeyError."""
        rows = [
            {"layer": r.layer, "tokens": evaluate(r.tokens, sizes), "flops": evaluate(r.flops, sizes), "bytes": evaluate(r.bytes, sizes)} for r in self.rows
        ]
        totals = {key: sum(row[key] for row in rows) for key in ("flops", "bytes")}
        return {**totals, "kv_bytes": evaluate(self.kv_bytes, sizes), "layers": rows}


def evaluate(expr: sympy.Expr, sizes: Mapping[str, int]) -> int:
    values = {symbol: sizes[symbol.name] for symbol in expr.free_symbols}
    return int(expr.subs(values))


def cost(program: Program, stage: str = "prefill") -> Cost:
    """FLOPs of every linear, matmul, convolution and attention node; bytes of every tensor read and written; KV bytes of the KV table."""
    graph = program[stage]
    pattern = re.compile(program.facts.vision_layer_path if stage == "vision" else program.facts.layer_path)
    names = {s: sympy.Symbol(n, integer=True, positive=True) for s, n in symbols(graph).items()}
    flops: dict[int, list[Any]] = {}
    moved: dict[int, list[Any]] = {}
    tokens: dict[int, Any] = {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        layer = layer_of(node, pattern)
        layer = OTHER if layer is None else layer
        flops.setdefault(layer, []).append(_flops(node))
        moved.setdefault(layer, []).append(_bytes(node))
        if node.target in (F.attention.default, F.attention_varlen.default):
            tokens.setdefault(layer, _size(node.args[1].meta["val"].shape[2]))
    rows = tuple(Row(i, _named(tokens.get(i, 0), names), _named(sympy.Add(*flops[i]), names), _named(sympy.Add(*moved[i]), names)) for i in sorted(flops))
    return Cost(rows, _kv_bytes(program, graph, names) if stage == "prefill" else sympy.Integer(0))


def _kv_bytes(program: Program, stage: Stage, names: dict[Any, Any]) -> sympy.Expr:
    """Of a batch, all overheads included: `KVFormat.bytes` over the rows that the prefill returns."""
    outputs, element = stage.output_nodes, getattr(torch, program.facts.dtype).itemsize
    total: Any = sympy.Integer(0)
    for entry in program.kv:
        form = entry.format or FLOAT
        stored = {p.name: outputs[f"k.{entry.layer}{p.suffix()}"].meta["val"].shape for p in form.partitions}
        rows = {name: _size(shape[2]) for name, shape in stored.items()}
        total += _size(next(iter(stored.values()))[0]) * form.bytes(rows, entry.heads, entry.head_dim, entry.value_dim, element)
    return _named(total, names)


def _named(expr: Any, names: dict[Any, Any]) -> sympy.Expr:
    return sympy.sympify(expr).subs(names)


def _size(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else sympy.Integer(value)


def _product(values: Any) -> Any:
    return math.prod((_size(v) for v in values), start=sympy.Integer(1))


def _tensor_bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _product(value.shape) * value.element_size()
    return sum((_tensor_bytes(v) for v in value), sympy.Integer(0)) if isinstance(value, (list, tuple)) else sympy.Integer(0)


VIEWS = (
    "view",
    "reshape",
    "transpose",
    "permute",
    "unsqueeze",
    "squeeze",
    "expand",
    "slice",
    "select",
    "chunk",
    "split",
    "getitem",
    "sym_size",
    "alias",
    "flatten",
)


def _bytes(node: Node) -> Any:
    if any(word in str(node.target) for word in VIEWS):
        return sympy.Integer(0)
    return sum((_tensor_bytes(a.meta.get("val")) for a in node.all_input_nodes), _tensor_bytes(node.meta.get("val")))


def _flops(node: Node) -> Any:
    rule = RULES.get(node.target)
    return rule(node) if rule else sympy.Integer(0)


def _shape(node: Any) -> Any:
    return node.meta["val"].shape


def _linear(node: Node) -> Any:
    return 2 * _product(_shape(node)) * _size(_shape(node.args[1])[-1])


def _matmul(node: Node) -> Any:
    return 2 * _product(_shape(node)) * _size(_shape(node.args[0])[-1])


def _attention(node: Node) -> Any:
    (B, H, S, D), T, Dv = _shape(node.args[0]), _shape(node.args[1])[2], _shape(node.args[2])[3]
    pairs = _product((B, H, S, T))  # a causal kernel may skip half; we count what a dense one does, as the papers do
    return 2 * pairs * (_size(D) + _size(Dv))


def _rows(node: Node) -> Any:
    (B, H, R, T), D = _shape(node), _shape(node.args[0])[3]
    return 2 * _product((B, H, R, T, D))


def _columns(node: Node) -> Any:
    (B, H, S, D), T = _shape(node.args[0]), _shape(node)[2]
    return 2 * _product((B, H, S, T)) * (_size(D) + 1)


def _convolution(node: Node) -> Any:
    weight = _shape(node.args[1])
    return 2 * _product(_shape(node)) * _product(weight[1:])


RULES: dict[Any, Callable[[Node], Any]] = {
    A.linear.default: _linear,
    A.matmul.default: _matmul,
    A.mm.default: _matmul,
    A.bmm.default: _matmul,
    A.addmm.default: lambda n: 2 * _product(_shape(n)) * _size(_shape(n.args[1])[-1]),
    A.conv1d.default: _convolution,
    A.conv2d.default: _convolution,
    A.conv3d.default: _convolution,
    A.scaled_dot_product_attention.default: _attention,
    F.attention.default: _attention,
    F.attention_varlen.default: _attention,
    F.attention_rows.default: _rows,
    F.attention_columns.default: _columns,
    F.merge_tokens.default: lambda n: 2 * _product(_shape(n)) * _size(_shape(n.args[0])[1]),
}
