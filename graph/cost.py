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
from .program import KVLayer, Program, Stage
from .sites import layer_of

A, F = torch.ops.aten, torch.ops.foveate
ATTENTION = (F.attention.default, F.attention_varlen.default)
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
    """FLOPs of every linear, matmul, convolution and attention node; bytes of every tensor read and written; KV bytes of the KV table.

    A cache is read once, by the attention and as it is stored: appending and dequantizing are part of that kernel. Where a target cannot do so it
    says it when it builds.
    """
    graph = program[stage]
    pattern = re.compile(program.facts.vision_layer_path if stage == "vision" else program.facts.layer_path)
    names = {s: sympy.Symbol(n, integer=True, positive=True) for s, n in symbols(graph).items()}
    flops: dict[int, list[Any]] = {}
    moved: dict[int, list[Any]] = {}
    tokens: dict[int, Any] = {}
    cached, pasts = _of_the_cache(graph), {n.meta.get("name", n.name): n.meta["val"] for n in graph.graph.nodes if n.op == "placeholder"}
    held = {e.layer: _held(program, e, pasts, "past_k") for e in program.kv} if cached else {}
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        layer = layer_of(node, pattern)
        layer = OTHER if layer is None else layer
        flops.setdefault(layer, []).append(_flops(node))
        moved.setdefault(layer, []).append(_bytes(node, cached, held))
        if node.target in ATTENTION:
            tokens.setdefault(layer, _size(node.args[1].meta["val"].shape[2]))
    rows = tuple(Row(i, _named(tokens.get(i, 0), names), _named(sympy.Add(*flops[i]), names), _named(sympy.Add(*moved[i]), names)) for i in sorted(flops))
    return Cost(rows, _kv_bytes(program, graph, names) if stage == "prefill" else sympy.Integer(0))


def _kv_bytes(program: Program, stage: Stage, names: dict[Any, Any]) -> sympy.Expr:
    """Of a batch, all overheads included: `KVFormat.bytes` over the rows that the prefill returns."""
    outputs = {n: node.meta["val"] for n, node in stage.output_nodes.items()}
    return _named(sympy.Add(*(_held(program, entry, outputs, "k") for entry in program.kv)), names)


def _held(program: Program, entry: KVLayer, values: Mapping[str, Any], key: str) -> Any:
    """Bytes of one layer's cache, whose keys are the values `key`.<layer>.<partition>."""
    form, element = entry.format or FLOAT, getattr(torch, program.facts.dtype).itemsize
    shapes = {p.name: values[f"{key}.{entry.layer}{p.suffix()}"].shape for p in form.partitions}
    rows = {name: _size(shape[2]) for name, shape in shapes.items()}
    return _size(next(iter(shapes.values()))[0]) * form.bytes(rows, entry.heads, entry.head_dim, entry.value_dim, element)


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


def _of_the_cache(stage: Stage) -> set[Node]:
    """A cache, and what is made of it before an attention reads it."""
    found: set[Node] = set()
    for node in stage.graph.nodes:
        if node.op == "placeholder":
            made = node.meta.get("name", node.name).startswith(("past_k.", "past_v."))
        else:
            made = node.target not in ATTENTION and not isinstance(node.meta.get("val"), torch.SymInt) and not found.isdisjoint(node.all_input_nodes)
        if made:
            found.add(node)
    return found


def _bytes(node: Node, cached: set[Node], held: Mapping[int, Any]) -> Any:
    if node in cached or any(word in str(node.target) for word in VIEWS):
        return sympy.Integer(0)
    read = [_tensor_bytes(a.meta.get("val")) for a in node.all_input_nodes if a not in cached]
    stored = [] if cached.isdisjoint(node.all_input_nodes) else [held[node.args[-1]]]
    return sympy.Add(*read, *stored, _tensor_bytes(node.meta.get("val")))


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
