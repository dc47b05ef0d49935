"""Evaluate the size expressions of the manifest (`S - N + 64`, `Max(1, S//2)`) at run time, without sympy and without eval."""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

from .errors import LowerError

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
CALLS: dict[str, Callable[..., Any]] = {
    "Max": max,
    "Min": min,
    "floor": math.floor,
    "ceiling": math.ceil,
    "Mod": operator.mod,
    "FloorDiv": operator.floordiv,
}


def evaluate(expression: int | str, symbols: Mapping[str, int]) -> int:
    """The value of a size expression; LowerError for an unknown symbol or anything that is not arithmetic."""
    if isinstance(expression, int):
        return expression
    return int(_value(_parsed(expression), expression, symbols))


@functools.lru_cache(maxsize=1024)
def _parsed(expression: str) -> ast.expr:
    """A prefill asks for the same few sizes every time."""
    return ast.parse(expression, mode="eval").body


def _value(node: ast.AST, text: str, symbols: Mapping[str, int]) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in symbols:
            raise LowerError(f"sizes: {text!r} needs {node.id}; known are {sorted(symbols)}")
        return symbols[node.id]
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        return BINARY[type(node.op)](_value(node.left, text, symbols), _value(node.right, text, symbols))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, text, symbols)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
        return CALLS[node.func.id](*[_value(a, text, symbols) for a in node.args])
    raise LowerError(f"sizes: {text!r} is no size expression ({type(node).__name__} in it)")
