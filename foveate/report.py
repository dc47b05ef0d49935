"""Before and after: tokens per layer, FLOPs, KV bytes, for one request size, from the cost model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import sympy

from .graph.cost import OTHER, cost
from .graph.errors import GraphError
from .graph.kv_table import past_symbol, symbols
from .graph.program import KVLayer, Program

TEXT_TOKENS = 32  # prompt tokens besides the pictures, when the caller does not say


@dataclass(frozen=True)
class Workload:
    """The request that the figures are for: one sample."""

    text_tokens: int
    images: int
    visual_tokens: int  # of all images, as prefill receives them


@dataclass(frozen=True)
class Figures:
    """One program at one workload. FLOPs count a multiply-add as two; `decode` is one token right after the prompt."""

    workload: Workload
    tokens: dict[int, int]  # layer -> sequence length in prefill
    vision_flops: int
    prefill_flops: int
    decode_flops: int
    kv_bytes: int
    decode_bytes: int  # weights and cache that one decode step reads and writes
    scratch_bytes: int = 0  # what a decode step of the target needs beside the cache

    @classmethod
    def of(cls, program: Program, text_tokens: int = TEXT_TOKENS, images: int = 1, scratch: Callable[[Mapping[str, int]], int] | None = None) -> Figures:
        """scratch: what the target says of its `scratch_bytes`, given the prompt's sizes"""
        N = visual_tokens(program, images)
        sizes = {"B": 1, "S": text_tokens + N, "N": N, "C": 1}  # C: this prompt has no long prefix to compress
        prefill = cost(program, "prefill").at(**sizes)
        rows = {row["layer"]: row["tokens"] for row in prefill["layers"] if row["layer"] != OTHER and row["tokens"]}
        lengths = {past_symbol(f"past_k.{e.layer}{suffix}"): _length(held, sizes) for e in program.kv for suffix, held in _stored(e)}
        decode = cost(program, "decode").at(B=1, **lengths)
        return cls(
            Workload(text_tokens, images, N),
            rows,
            _vision_flops(program, images),
            prefill["flops"],
            decode["flops"],
            prefill["kv_bytes"],
            decode["bytes"],
            scratch(sizes) if scratch else 0,
        )


@dataclass(frozen=True)
class Report:
    """What an optimization does, forecast by the cost model. `str(report)` is the table."""

    recipe: str
    before: Figures
    after: Figures

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(what, before, after, change)"""
        a, b = self.before, self.after
        out = [
            (
                "visual tokens into the LLM",
                f"{a.workload.visual_tokens}",
                f"{b.workload.visual_tokens}",
                _times(a.workload.visual_tokens, b.workload.visual_tokens),
            ),
            ("tokens per layer", spans(a.tokens), spans(b.tokens), _times(sum(a.tokens.values()), sum(b.tokens.values()))),
        ]
        for label, name, unit in (
            ("vision GFLOPs", "vision_flops", 1e9),
            ("prefill GFLOPs", "prefill_flops", 1e9),
            ("decode MFLOPs per token", "decode_flops", 1e6),
            ("KV cache MB per sample", "kv_bytes", 1e6),
            ("decode scratch MB per sample", "scratch_bytes", 1e6),
            ("decode MB moved per token", "decode_bytes", 1e6),
        ):
            x, y = getattr(a, name), getattr(b, name)
            if not x and not y and name == "scratch_bytes":
                continue
            out.append((label, f"{x / unit:,.3f}", f"{y / unit:,.3f}", _times(x, y)))
        return out

    def __str__(self) -> str:
        w = self.before.workload
        head = f"recipe {self.recipe}: {w.images} image(s), {w.text_tokens} text tokens (cost model, not a measurement)"
        table = [("", "before", "after", "less"), *self.rows()]
        widths = [max(len(r[i]) for r in table) for i in range(4)]
        return "\n".join(
            [
                head,
                *("  ".join(c.ljust(n) if i == 0 else c.rjust(n) for i, (c, n) in enumerate(zip(r, widths, strict=True))) for r in table),
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able"""
        return {"recipe": self.recipe, "before": asdict(self.before), "after": asdict(self.after)}


def spans(tokens: dict[int, int]) -> str:
    """{0: 608, 1: 608, 2: 96} -> "0-1: 608, 2: 96" """
    out: list[list[int]] = []
    for layer, length in sorted(tokens.items()):
        if out and out[-1][2] == length and out[-1][1] == layer - 1:
            out[-1][1] = layer
        else:
            out.append([layer, layer, length])
    return ", ".join(f"{a}-{b}: {n}" if a != b else f"{a}: {n}" for a, b, n in out)


def visual_tokens(program: Program, images: int) -> int:
    """How many rows `images` pictures bring into prefill: from the facts, else from the geometry that the vision stage was captured with."""
    if program.facts.visual_per_image is not None:
        return images * program.facts.visual_per_image
    rows = program["vision"].output_nodes[program.facts.features[0]].meta["val"].shape[0]
    if isinstance(rows, int):
        return rows
    found = sympy.sympify(rows.node.expr)
    values = {s: _hint(rows, s) for s in found.free_symbols}
    return int(found.subs(values)) * images // max(1, _captured_images(program))


def _hint(size: Any, symbol: Any) -> int:
    """The value that a symbol had in the captured example."""
    known = getattr(size.node.shape_env, "backed_var_to_val", None) or getattr(size.node.shape_env, "var_to_val", {})
    if symbol not in known:
        raise GraphError(f"report: the number of visual tokens depends on {symbol}, which the captured example does not fix")
    return int(known[symbol])


def _captured_images(program: Program) -> int:
    """Pictures in the captured example."""
    for name in program["vision"].inputs:
        if name == "image_grid_thw":
            count = program["vision"].placeholder(name).meta["val"].shape[0]
            return count if isinstance(count, int) else _hint(count, count.node.expr)
    return 1


def _vision_flops(program: Program, images: int) -> int:
    """FLOPs of the vision stage for `images` pictures; sizes that no picture count explains take their captured value."""
    stage = program["vision"]
    total = cost(program, "vision").flops
    by_name = {name: symbol for symbol, name in symbols(stage).items()}
    values: dict[Any, int] = {}
    for symbol in total.free_symbols:
        values[symbol] = images if symbol.name in ("images", "I") else _any_hint(stage, by_name.get(symbol.name, symbol))
    return int(total.subs(values))


def _any_hint(stage: Any, symbol: Any) -> int:
    for node in stage.graph.nodes:
        if node.op == "placeholder":
            for size in node.meta["val"].shape:
                if not isinstance(size, int) and symbol in size.node.expr.free_symbols:
                    return _hint(size, symbol)
    raise GraphError(f"report: size {symbol} of the vision stage belongs to no input")


def _stored(entry: KVLayer) -> list[tuple[str, str]]:
    """How many rows a layer's partitions have behind the prompt: (suffix, expression)."""
    return [(p.suffix(), p.rows) for p in entry.format.partitions] if entry.format else [("", entry.length)]


def _length(expression: str, sizes: dict[str, int]) -> int:
    letters = {name: sympy.Symbol(name) for name in sizes}
    return int(sympy.sympify(expression, locals=letters).subs({letters[k]: v for k, v in sizes.items()}))


def _times(before: float, after: float) -> str:
    return "-" if not (before and after) else f"{before / after:.2f}x"
