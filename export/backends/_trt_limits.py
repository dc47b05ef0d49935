"""What TensorRT cannot take, said before anything is built. Each rule was met as a failing parse or build."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import Node

from ...graph.program import Program
from ._trt_options import TrtOptions
from ._trt_spelling import ATTENTION, ATTENTION_VARLEN, fusable

TOPK = 3840  # largest constant k of TopK
DATA_DEPENDENT = frozenset(
    "nonzero masked_select unique unique2 unique_consecutive repeat_interleave bincount _unique2 nonzero_numpy".split()
)
UNKNOWN = {
    "index_add": "adding scatters have no TensorRT layer",
    "scatter_add": "adding scatters have no TensorRT layer",
    "scatter_reduce": "reducing scatters have no TensorRT layer",
    "index_reduce": "reducing scatters have no TensorRT layer",
    "bitwise_left_shift": "bit shifts have no TensorRT layer",
    "bitwise_right_shift": "bit shifts have no TensorRT layer",
}
NEEDS = {"bfloat16": (8, 0)}


def limits(program: Program, options: TrtOptions) -> list[str]:
    """One sentence each; empty when nothing is known to stand in the way."""
    found = list(_precision(options))
    for stage in program.stages:
        for node in program[stage].graph.nodes:
            if node.op == "call_function":
                found += [f"{stage}: {node.name}: {why}" for why in _node(node)]
            elif (
                node.op == "placeholder"
                and isinstance(node.meta.get("val"), Tensor)
                and node.meta["val"].dtype in (torch.uint8, torch.float64)
            ):
                found.append(
                    f"{stage}: input {node.meta.get('name', node.name)} is {str(node.meta['val'].dtype).removeprefix('torch.')}; "
                    "TensorRT takes float32, float16, bfloat16, int64, int32, int8 and bool"
                )
    return found


def remarks(program: Program) -> list[str]:
    """What builds, but not as one kernel: attention without a fused kernel, by stage and reason."""
    seen: dict[str, int] = {}
    for stage in ("vision", "prefill"):
        for node in program.stages[stage].graph.nodes if stage in program.stages else ():
            if node.op == "call_function" and node.target in (ATTENTION, ATTENTION_VARLEN) and (why := fusable(node)):
                key = f"{stage}: attention is spelt out, as TensorRT has no fused kernel for {why}"
                seen[key] = seen.get(key, 0) + 1
    return [f"{text} ({count} layers)" for text, count in seen.items()]


def _precision(options: TrtOptions) -> Iterator[str]:
    need = NEEDS.get(options.precision)
    have = tuple(int(p) for p in options.compute_capability.split("."))
    if need and have < need:
        why = f"{options.precision} needs compute capability {need[0]}.{need[1]}"
        yield f"{why}; {options.compute_capability} has none, use precision=float16"


def _node(node: Node) -> Iterator[str]:
    schema = getattr(node.target, "_schema", None)
    kind = schema.name.split("::")[1] if schema is not None else ""
    if schema is not None and schema.overload_name == "self_int":  # repeat_interleave by a constant: a size that is known
        return
    if kind in DATA_DEPENDENT:
        yield f"{kind} has a result whose size depends on data; TensorRT-RTX has no kernel for it, use top-k with a fixed size"
    if kind in UNKNOWN:
        yield f"{kind}: {UNKNOWN[kind]}"
    if kind in ("topk", "top_tokens") and isinstance(node.args[1], int) and node.args[1] > TOPK:  # a symbolic k builds
        yield f"top-k of {node.args[1]}; TensorRT's limit is {TOPK}: keep fewer tokens here"
