"""What a decode attention reads of a cache of codes, and whether GroupQueryAttention can read it in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from ..graph.kv_format import KVFormat, Partition
from .kv_packing import behind_packing
from .onnx_contrib import behind_store, call, plain
from .onnx_dialect import Operands
from .onnx_shape import same

aten, foveate = torch.ops.aten, torch.ops.foveate


@dataclass(frozen=True)
class Read:
    """Keys or values of one partition: codes (or rows) in a cache, and the row that is appended."""

    past: Node  # placeholder
    scale: Node | None
    center: Node | None
    balance: Node | None  # multiplies what the codes say
    new: Node | None  # [B, G, 1, D] before it is quantized; None where nothing is appended
    codes: Node | None  # of `new`


@dataclass(frozen=True)
class Part:
    """One partition as attention sees it. k, v: what the operator can read in place; None: `terms`, keys and values [B, G, P, D] as the
    graph computes them, are spelt out."""

    partition: Partition
    terms: tuple[Node, Node]
    held: Node  # which rows are valid
    k: Read | None
    v: Read | None

    @property
    def grown(self) -> bool:
        return not self.partition.name

    @property
    def wide(self) -> bool:
        """Read through `planes`?"""
        return self.partition.code == "int2"

    @property
    def reads(self) -> tuple[Read, ...]:
        return () if self.k is None or self.v is None else (self.k, self.v)


def _terms(node: Any) -> list[Any]:
    """cat and kv_append along tokens, flattened: the pasts, and (past, new) where a row is appended."""
    node = plain(node)
    if call(node, aten.cat.default) and (node.args[1] if len(node.args) > 1 else 0) == 2:
        return [t for x in node.args[0] for t in _terms(x)]
    return [node]


def _read(node: Any) -> Read | None:
    """kv_append(past, new), or a past; each maybe behind dequantize_kv and a balance."""
    new: Any = None
    if call(node, foveate.kv_append.default):
        node, new = plain(node.args[0]), plain(node.args[1])
    if isinstance(node, Node) and node.op == "placeholder":
        return Read(node, None, None, None, new, None)
    found = _stored(node)
    if found is None or not isinstance(past := behind_packing(found[0]), Node) or past.op != "placeholder":
        return None
    _, *states = found
    if new is None:
        return Read(past, *states, None, None)
    made = _stored(new)
    if made is None or made[1:] != found[1:] or not call(plain(made[0]), foveate.quantize_kv.default):
        return None
    codes = plain(made[0])
    row, scale, center, _, block = codes.args
    if [scale, center, block] != [*states[:2], 0]:
        return None
    if states[2] is not None:
        if not call(row, aten.div.Tensor) or row.args[1] is not states[2]:
            return None
        row = row.args[0]
    return Read(past, *states, row, codes)


def _stored(node: Any) -> tuple[Any, Node, Node | None, Node | None] | None:
    """dequantize_kv(codes, scale, center) * balance, with one row of states, that are inputs -> codes, scale, center, balance"""
    balance = None
    if call(node, aten.mul.Tensor):
        node, balance = plain(node.args[0]), node.args[1]
    if not call(node, foveate.dequantize_kv.default):
        return None
    codes, scale, center, block = node.args
    states = (scale, center, balance)
    return None if block or not all(s is None or (isinstance(s, Node) and s.op == "placeholder") for s in states) else (codes, *states)


def _held(mask: Any) -> list[Node] | None:
    """The terms of cat([kv_held ..., kv_mask], 1)."""
    mask = plain(mask)
    if call(mask, aten.cat.default) and (mask.args[1] if len(mask.args) > 1 else 0) == 1:
        found = [_held(x) for x in mask.args[0]]
        return None if any(f is None for f in found) else [t for f in found for t in f]  # type: ignore[union-attr]
    return [mask] if call(mask, foveate.kv_held.default, foveate.kv_mask.default) else None


def read_parts(node: Node, form: KVFormat, outputs: dict[str, Node]) -> list[Part] | None:
    """The partitions of a decode attention, in the format's order, if GroupQueryAttention can read the one that grows; else None."""
    a = Operands(*node.args)
    keys, values, held = _terms(a.k), _terms(a.v), _held(a.mask)
    if held is None or not len(keys) == len(values) == len(held) == len(form.partitions) or (a.softcap and len(keys) > 1):
        return None  # a soft cap hides the logits that a merge needs
    found = []
    for partition in form.partitions:
        name = f"past_k.{a.layer}{partition.suffix()}"
        at = next((i for i, h in enumerate(held) if h.args[0].meta.get("name") == name), None)  # type: ignore[union-attr]
        if at is None or held[at].args[1].op != "placeholder" or call(held[at], foveate.kv_mask.default) == bool(partition.name):  # type: ignore[union-attr]
            return None
        rows = held[at].meta["val"].shape[1]
        if not all(same(t.meta["val"].shape[2], rows) for t in (keys[at], values[at])):
            return None
        reads = _reads(a, partition, keys[at], values[at], outputs)
        if not reads and not partition.name:
            return None
        found.append(Part(partition, (keys[at], values[at]), held[at], *(reads or (None, None))))
    return found


def _reads(a: Operands, p: Partition, keys: Node, values: Node, outputs: dict[str, Node]) -> tuple[Read, Read] | None:
    """What GroupQueryAttention is to read, if it can say it: one scale per channel, and the row that decode returns the one that it stores."""
    if p.code not in ("float", "int8", "int4", "int2") or (p.code != "float" and (p.k_per, p.v_per) != ("channel", "channel")):
        return None
    if p.code == "int2" and a.width % 4:
        return None
    found = []
    for which, term in (("k", keys), ("v", values)):
        read, name = _read(term), f"{which}.{a.layer}{p.suffix()}"
        if read is None or read.past.meta.get("name") != f"past_{name}" or (read.new is None) != bool(p.name):
            return None
        if a.softcap and p.code != "float" and (read.center is not None or p.code == "int2"):
            return None  # a soft cap does not commute with the shift of the keys
        if not p.name:
            stored = plain(behind_packing(outputs.get(name)))
            if p.code == "float":
                stored, row = behind_store(stored), behind_store(read.new)  # type: ignore[arg-type]
                if plain(stored) is not plain(row):
                    return None
            elif stored is not read.codes:
                return None
        found.append(read)
    return found[0], found[1]
