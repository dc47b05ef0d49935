"""Codes of less than a byte, as an engine keeps them: packed by the stage itself (uint8, lowest element first, as GroupQueryAttention wants 4 bits)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.kv_format import BITS, Partition
from ..graph.program import KVLayer, Stage
from ..graph.retype import new_value, retype
from ..graph.splice import splice
from .onnx_contrib import call

aten, foveate = torch.ops.aten, torch.ops.foveate


def packs(part: Partition) -> bool:
    """Are its codes smaller than a byte?"""
    return 0 < BITS[part.code] < 8


def packed_width(width: int, bits: int) -> int:
    return -(-width * bits // 8)


def pack_codes(stage: Stage, kv: Sequence[KVLayer]) -> Stage:
    """A copy of the stage that takes and returns sub-byte codes packed: uint8[..., ceil(D bits / 8)]; the stage itself if it has none."""
    names = {f"{w}.{e.layer}{p.suffix()}": BITS[p.code] for e in kv for p in (e.format.partitions if e.format else ()) if packs(p) for w in "kv"}
    inputs = [n for n in names if f"past_{n}" in stage.inputs]
    outputs = [n for n in names if n in stage.outputs]
    if not inputs and not outputs:
        return stage
    stage = stage.clone()
    for name in inputs:
        _take_packed(stage, stage.placeholder(f"past_{name}"), names[name])
    out = next(n for n in reversed(stage.graph.nodes) if n.op == "output")
    values = list(out.args[0])
    for name in outputs:
        at = stage.outputs.index(name)
        values[at] = splice(stage, out, _pack, values[at], names[name])
    out.args = (tuple(values),)
    retype(stage)
    stage.module.recompile()
    return stage


def _take_packed(stage: Stage, past: Node, bits: int) -> None:
    val = past.meta["val"]
    readers = [u for u in past.users if u.target not in (aten.sym_size.int, foveate.kv_mask.default, foveate.kv_held.default)]  # rows only
    past.meta["val"] = new_value(stage, (*val.shape[:3], packed_width(int(val.shape[3]), bits)), torch.uint8)
    codes = splice(stage, min(readers), _unpack, past, bits, int(val.shape[3]))
    for reader in readers:
        reader.replace_input_with(past, codes)
        reader.meta["stale"] = True


def _pack(codes: Tensor, bits: int) -> Tensor:
    return (foveate.pack_kv(codes, bits).to(torch.int16) + 128).to(torch.uint8)


def _unpack(stored: Tensor, bits: int, width: int) -> Tensor:
    return foveate.unpack_kv((stored.to(torch.int16) - 128).to(torch.int8), bits, width)


def behind_packing(node: Any) -> Any:
    """The codes that were packed into `node`, or the placeholder that was unpacked into it."""
    while call(node, *PACKING):
        node = node.args[0]
    return node


PACKING = (
    *(aten.to.dtype, aten._to_copy.default, aten.add.Tensor, aten.sub.Tensor, aten.clone.default),
    *(foveate.pack_kv.default, foveate.unpack_kv.default),
)
