"""What a TensorRT build can be told, and the shape ranges that follow from it and from the facts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor
from torch.fx import Node

from ...graph.program import Program, Stage
from ..errors import LowerError
from ..precision import PRECISIONS, RESIDUALS
from ._trt_cache import is_codes

Range = tuple[int, int, int]  # min, opt, max
UNFUSED = ("error", "warn")
SMALLEST_GPU = {"float16": "7.5", "bfloat16": "8.0", "float32": "7.5"}  # Turing has no bfloat16


@dataclass(frozen=True)
class TrtOptions:
    """One build. Ranges are "opt", "min:opt:max" or three numbers; None means: from the facts.

    batch must be a single number for decode to run one attention kernel per layer; a range works and copies the cache every step.
    """

    precision: str = "float16"
    residual: str = "float32"  # the stream between layers; "half" reads less and overflows on models with large activations
    compute_capability: str = "8.9"
    batch: Any = 1
    images: Any = None  # per sample
    text: Any = None  # prompt tokens that are not visual, per sample
    visual: Any = None  # visual tokens per sample
    context: Any = None  # tokens of a prefix that is read compressed
    sequence: Any = None
    past: Any = None  # rows of the cache
    new_tokens: int = 512
    workspace_mb: int = 0  # 0: the builder's default
    optimization_level: int | None = None
    timing_cache: str | None = None  # a file, read if it exists and written after the build
    unfused: str = "error"  # or "warn": what happens when a plan dequantizes a quantized cache to memory before attention reads it

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise LowerError(f"trt: precision={self.precision!r} is none of {list(PRECISIONS)}")
        if self.residual not in RESIDUALS:
            raise LowerError(f"trt: residual={self.residual!r} is none of {list(RESIDUALS)}")
        if self.unfused not in UNFUSED:
            raise LowerError(f"trt: unfused={self.unfused!r} is none of {list(UNFUSED)}")
        for name in ("batch", "images", "text", "visual", "context", "sequence", "past"):
            as_range(name, getattr(self, name))

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> TrtOptions:
        """From plain options; an unknown name says which were possible."""
        known = [f.name for f in fields(cls)]
        for name in options or {}:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                raise LowerError(f"trt: no option {name!r}{f'; did you mean {close[0]!r}?' if close else ''}; there are {known}")
        return cls(**(options or {}))

    @property
    def batch_one(self) -> bool:
        return as_range("batch", self.batch) == (1, 1, 1)


def as_range(name: str, value: Any) -> Range | None:
    """ "1:64:512", 64, [1, 64, 512] -> (min, opt, max)"""
    if value is None:
        return None
    parts = value.split(":") if isinstance(value, str) else list(value) if isinstance(value, (list, tuple)) else [value]
    try:
        numbers = [int(p) for p in parts]
    except (TypeError, ValueError):
        numbers = []
    numbers = numbers * 3 if len(numbers) == 1 else numbers
    if len(numbers) != 3 or not 0 < numbers[0] <= numbers[1] <= numbers[2]:
        raise LowerError(f"trt: {name}={value!r} is no range; write one number, or min:opt:max with 0 < min <= opt <= max")
    return numbers[0], numbers[1], numbers[2]


def axis_ranges(program: Program, options: TrtOptions) -> dict[str, Range]:
    """B, N, C, S, P, I, rows -> ranges. S and P follow from images and text; each can be given outright.

    A prompt is text plus visual tokens; at least two tokens, as fused attention wants.
    """
    facts = program.facts
    per_image = facts.features_per_image or facts.tokens_per_image or 256
    batch = as_range("batch", options.batch) or (1, 1, 1)
    images = as_range("images", options.images) or (1, 1, 4)
    text = as_range("text", options.text) or (1, 64, 1024)
    context = as_range("context", options.context) or (1, 256, 4096)
    least = max(facts.min_visual, 1)
    visual = as_range("visual", options.visual) or tuple(max(least, i * per_image) for i in images)
    sequence = as_range("sequence", options.sequence) or tuple(max(2, t + v) for t, v in zip(text, visual, strict=True))
    past = as_range("past", options.past) or (1, sequence[1], sequence[2] + options.new_tokens)
    whole = tuple(b * i for b, i in zip(batch, images, strict=True))
    return {"B": batch, "N": visual, "C": context, "S": sequence, "P": past, "I": whole, "per_image": (per_image,) * 3}  # type: ignore[dict-item]


def symbol_ranges(stage: Stage, axes: Mapping[str, Range]) -> dict[Any, Range]:
    """Every symbol of the stage's inputs (sympy) -> its range. What the contract does not name counts images or patches of the vision
    tower."""
    ranges: dict[Any, Range] = {}
    for node in stage.graph.nodes:
        if node.op != "placeholder" or not isinstance(node.meta["val"], Tensor):
            continue
        for axis, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, int) and size.node.expr.is_Symbol:
                found = _axis(node, axis, axes)
                if found is not None:
                    ranges.setdefault(size.node.expr, found)
    return ranges


def _axis(node: Node, axis: int, axes: Mapping[str, Range]) -> Range | None:
    name, rank = node.meta.get("name", node.name), node.meta["val"].dim()
    if name in ("input_ids", "attention_mask", "slot"):
        return axes["BS"[axis]]
    if name == "position_ids":
        return axes["BS"[axis - (rank - 2)]]
    if name == "context_position_ids":
        return axes["BC"[axis - (rank - 2)]]
    if name.startswith("context_"):
        return axes["BC"[axis]]
    if name.partition(".")[0] == "lengths":
        return axes["B"]
    if name.startswith("conv."):
        return axes["B"]
    if name.startswith(("past_k.", "past_v.", "past_pos.")):
        low, opt, high = axes["B" if axis == 0 else "P"]
        aside = is_codes(name) and name.count(".") > 1  # a partition beside the appended one may hold nothing; were both empty, nothing would fuse
        return (0, opt, high) if axis and aside else (low, opt, high)
    if (node.graph.owning_module is not None and name in ("pixel_values",)) or (axis == 0 and "input_ids" not in _names(node)):
        return axes["I"] if rank > 2 else _patches(node, axes)
    return axes["B"] if axis == 0 else axes["N"] if axis == 1 else None


def _names(node: Node) -> list[str]:
    return [n.meta.get("name", n.name) for n in node.graph.nodes if n.op == "placeholder"]


def _patches(node: Node, axes: Mapping[str, Range]) -> Range:
    """Packed towers take all patches of all images as rows: four to a merged visual token in the Qwen lineage."""
    per_image = axes["per_image"][0]
    return tuple(i * per_image * 4 for i in axes["I"])  # type: ignore[return-value]


def shape_range(node: Node, ranges: Mapping[Any, Range]) -> list[tuple[int, ...]]:
    """min, opt and max shape of an input: its dimensions, symbolic ones evaluated."""
    shapes: list[list[int]] = [[], [], []]
    for size in node.meta["val"].shape:
        for i, shape in enumerate(shapes):
            shape.append(size if isinstance(size, int) else _evaluate(node, size, ranges, i))
    return [tuple(s) for s in shapes]


def _evaluate(node: Node, size: Any, ranges: Mapping[Any, Range], which: int) -> int:
    expr = size.node.expr
    free = [s for s in expr.free_symbols if s not in ranges]
    if free:
        raise LowerError(
            f"trt: input {node.meta.get('name', node.name)} has a size {expr} whose symbols {[str(s) for s in free]} have no range"
        )
    return int(expr.subs({s: ranges[s][which] for s in expr.free_symbols}))
