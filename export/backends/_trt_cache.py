"""The cache as TensorRT reads it: token-major, [B, P, G, D], codes of less than a byte packed, and nothing between memory and attention but arithmetic.

    lay_out(stage, kv)      in place: pasts token-major at the inputs, new rows token-major at the outputs

Keys and values of a decode step are a tree: concatenations of partitions, each of codes, scales and centres, and of the new row as it will be
stored. The tree is rebuilt over token-major leaves and turned once, at its top: that folds into one attention kernel per layer, which reads eight
codes at a time (found by building engines; a concatenation of codes, or turning each leaf, makes it read one at a time or copy the cache first).
A past is read-only and a new row leaves the engine alone: with one sample the caller binds it right behind the past, so nothing is ever moved.

Packed codes: byte i of a row holds the channels i, i + W, i + 2W, ... of W = D bits / 8, the first in the lowest bits, minus 128. Neighbouring bytes
then are neighbouring channels, and the kernel still loads vectors; with neighbouring channels in a byte it loads one value at a time.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ...graph.kv_format import BITS
from ...graph.ops.dequantize_fp8 import dequantize_fp8
from ...graph.ops.dequantize_fsq import dequantize_fsq
from ...graph.ops.dequantize_kv import dequantize_kv
from ...graph.ops.kv_append import kv_append as APPEND
from ...graph.ops.kv_held import kv_held as HELD
from ...graph.ops.kv_mask import kv_mask as KV_MASK
from ...graph.ops.quantize_fp8 import quantize_fp8
from ...graph.ops.quantize_fsq import quantize_fsq
from ...graph.ops.quantize_kv import quantize_kv
from ...graph.program import KVLayer, Stage
from ...graph.retype import fake_mode, reroute
from ...graph.splice import splice
from ..errors import LowerError
from ..precision import LARGEST

aten = torch.ops.aten
CODES = re.compile(r"(past_)?[kv]\.\d+(\.(?!scale$|center$|balance$)\w+)?")  # a partition's codes; its scales and centres have one more name
DECODES = (dequantize_kv, dequantize_fp8, dequantize_fsq)  # (codes, scale, ..., block)
ENCODES = (quantize_kv, quantize_fp8, quantize_fsq)  # (rows, scale, ..., block)
HALF_MAX = LARGEST[torch.float16]
POINTWISE = (aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor)


def is_codes(name: str) -> bool:
    """past_k.0, v.3.lo: rows of a partition, not what is stored beside them."""
    return CODES.fullmatch(name) is not None


def of_lengths(mask: Any) -> bool:
    """Is this decode mask made of lengths alone: kv_mask, or several partitions' together? One sample binds exactly the valid rows instead."""
    if not isinstance(mask, Node):
        return False
    if mask.target is aten.cat.default:
        return all(of_lengths(part) for part in mask.args[0])
    return mask.target in (KV_MASK, HELD)


def packed_bits(kv: Sequence[KVLayer]) -> dict[str, int]:
    """Names of codes that share bytes ("k.0.lo") -> their bits."""
    found = {}
    for entry in kv:
        for part in entry.format.partitions if entry.format else ():
            bits = BITS[part.code]
            if 0 < bits < 8:
                for which, width in (("k", entry.head_dim), ("v", entry.value_dim)):
                    if width * bits % 8:
                        raise LowerError(f"trt: layer {entry.layer}: {width} channels of {bits} bits do not fill whole bytes")
                    found[f"{which}.{entry.layer}{part.suffix()}"] = bits
    return found


def lay_out(stage: Stage, kv: Sequence[KVLayer]) -> None:
    """Token-major pasts and rows, packed where codes are smaller than a byte."""
    _TokenMajor(stage, packed_bits(kv)).run()


class _TokenMajor:
    def __init__(self, stage: Stage, bits: dict[str, int]) -> None:
        self.stage, self.graph, self.bits = stage, stage.graph, bits
        self.leaves: dict[Node, Node] = {}  # a past -> its codes, token-major and unpacked
        self.known: dict[Node, Node] = {}  # a value -> the same token-major
        self.old: dict[Node, Tensor] = {}  # a past -> its head-major type
        self.own: set[Node] = set()  # readers of token-major pasts

    def run(self) -> None:
        for node in [n for n in self.graph.nodes if n.op == "placeholder" and _name(n).startswith(("past_k.", "past_v."))]:
            self._take(node)
        for top in self._tops():
            self._rebuild(top)
        out = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        values = [self._row(out, name, v) if name.startswith(("k.", "v.")) else v for name, v in zip(self.stage.outputs, out.args[0], strict=True)]
        out.args = (tuple(values),)
        self.graph.eliminate_dead_code()
        for past in self.leaves:
            self._head_major(past)

    def _take(self, past: Node) -> None:
        """The input is [B, P, G, D] from here on, or [B, P, G, D bits / 8]; who reads it as it was is dealt with later."""
        self.old[past] = val = past.meta["val"]
        bits = self.bits.get(_name(past).removeprefix("past_"), 8)
        B, G, P, D = val.shape
        with fake_mode(self.stage):
            past.meta["val"] = torch.empty((B, P, G, D * bits // 8), dtype=val.dtype)
        self.leaves[past] = past
        if bits < 8:
            self.leaves[past] = self._splice(past.next, unpack, past, bits, self._half())

    def _tops(self) -> list[Node]:
        """What attention reads: a concatenation of past and new, or of that and further partitions, casts between them aside."""
        tops = []
        for node in [n for n in self.graph.nodes if n.target is APPEND]:
            above: Node | None = node
            while above is not None:
                node, above = above, next((u for u in above.users if _is_cast(u) or _is_join(u)), None)
            tops.append(node)
        return list(dict.fromkeys(tops))

    def _rebuild(self, top: Node) -> None:
        turned = self._turned(top)
        with self.graph.inserting_after(turned):
            whole = self._call(aten.transpose.int, (turned, 1, 2), top)
        if whole.meta["val"].dtype != top.meta["val"].dtype:
            with self.graph.inserting_after(whole):
                whole = self._call(aten.to.dtype, (whole, top.meta["val"].dtype), top)
        top.replace_all_uses_with(whole, delete_user_cb=lambda user: user not in self.own)

    def _turned(self, node: Node) -> Node:
        """The value [B, T, G, D] of a node [B, G, T, D], down to leaves that are so already."""
        if node not in self.known:
            self.known[node] = self._make(node)
        return self.known[node]

    def _make(self, node: Node) -> Node:
        if node in self.leaves:
            return self.leaves[node]
        if (source := self._uncast(node)) is not node:
            return self._turned(source)
        if node.target is APPEND:
            return self._join(node, node.args[:2])
        if _is_join(node):
            return self._join(node, node.args[0])
        if node.target in DECODES or node.target in ENCODES:
            return self._coded(node)
        if node.target is aten.to.dtype and self._held(node):
            return self._with(node, (self._turned(node.args[0]), *node.args[1:]))
        if node.target in POINTWISE and self._held(node) and all(isinstance(a, Node) and _rank(a) == 4 for a in node.args[:2]):
            return self._with(node, tuple(self._turned(a) for a in node.args[:2]))
        return self._with(node, (node, 1, 2), aten.transpose.int)

    def _uncast(self, node: Node) -> Node:
        """Behind casts to and fro, which narrowing a graph writes around a `to`: what was dequantized into the narrow type stays in it."""
        source = node
        while _is_cast(source):
            source = source.args[0]  # type: ignore[assignment]
        made = source in self.leaves or source.target in (*DECODES, APPEND, *POINTWISE) or _is_join(source)
        return source if made and (self._held(source) or source.target is APPEND or _is_join(source)) else node

    def _held(self, node: Any) -> bool:
        """Arithmetic over what is in the cache (a balance of channels, say), not how a new row came about."""
        if not isinstance(node, Node):
            return False
        if node in self.leaves or node.target in DECODES:
            return True
        return node.target in (*POINTWISE, aten.to.dtype, aten.clamp.default) and any(self._held(a) for a in node.args[:2])

    def _coded(self, node: Node) -> Node:
        """Codes from rows, or rows from codes: arithmetic that broadcasts alike in both layouts, but for scales of blocks of tokens, which are
        spread first."""
        *operands, block = node.args
        rows, *rest = [self._turned(a) if isinstance(a, Node) else a for a in operands]
        if block:
            rest = [self._spread(node, a, rows, block) if isinstance(a, Node) else a for a in rest]
        return self._with(node, (rows, *rest, 0))

    def _spread(self, before: Node, state: Node, rows: Node, block: int) -> Node:
        return self._splice(before, spread_blocks, state, rows, block, like=before)

    def _join(self, node: Node, parts: Sequence[Node]) -> Node:
        return self._with(node, ([self._turned(p) for p in parts], 1), aten.cat.default)

    def _with(self, node: Node, args: tuple[Any, ...], target: Any = None) -> Node:
        """The node again, of other operands, right behind it."""
        with self.graph.inserting_after(node):
            return self._call(target or node.target, args, node)

    def _call(self, target: Any, args: tuple[Any, ...], like: Node) -> Node:
        made = self.graph.call_function(target, args)
        made.meta |= {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "layer")}
        with fake_mode(self.stage), torch.no_grad():
            made.meta["val"] = target(*torch.fx.node.map_arg(args, lambda n: n.meta["val"]))
        self.own.add(made)
        return made

    def _row(self, out: Node, name: str, value: Node) -> Node:
        """An output, token-major and packed."""
        turned = self._turned(value)
        bits = self.bits.get(name, 8)
        if bits == 8:
            return turned
        return self._splice(out, pack, turned, bits, self._half())

    def _splice(self, before: Node, function: Any, *args: Any, like: Node | None = None) -> Node:
        """`splice`, whose nodes read token-major values knowingly."""
        known = set(self.graph.nodes)
        made = splice(self.stage, before, function, *args, like=like)
        self.own.update(n for n in self.graph.nodes if n not in known)
        return made

    def _head_major(self, past: Node) -> None:
        """Readers outside the trees (masks ask for its rows, a scale of what is to come) see it as it was."""
        readers = [u for u in past.users if u not in self.own]
        if not readers:
            return
        source = self.leaves[past]
        with self.graph.inserting_after(source):
            turned = self._call(aten.transpose.int, (source, 1, 2), past)
        for reader in readers:
            reroute(reader, past, turned)

    def _half(self) -> torch.dtype:
        """The type to unpack in: that of the pasts beside it; every byte is exact in it (bfloat16 holds 0 to 255)."""
        floats = [v.dtype for v in self.old.values() if v.is_floating_point()]
        return floats[0] if floats else torch.float32


def _is_cast(node: Node) -> bool:
    return node.target is aten.to.dtype or (node.target is aten.clamp.default and node.args[2:] == (HALF_MAX,))


def _is_join(node: Node) -> bool:
    """A concatenation along tokens."""
    if node.target is not aten.cat.default or _rank(node) != 4:
        return False
    axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return operator.index(axis) % 4 == 2  # type: ignore[arg-type]


def unpack(packed: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """int8[..., D bits / 8]  ->  codes[..., D] in a float type, by arithmetic that every target has"""
    rest, streams = packed.to(dtype) + 128.0, []
    for i in reversed(range(1, 8 // bits)):
        digit = (rest * 2.0 ** (-bits * i)).floor()
        rest = rest - digit * 2.0 ** (bits * i)
        streams.insert(0, digit)
    unsigned = torch.cat([rest, *streams], -1)
    return unsigned * 2.0 - 1.0 if bits == 1 else unsigned - 2.0 ** (bits - 1)


def pack(codes: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """The reverse: int8[..., D]  ->  int8[..., D bits / 8]"""
    x = codes.to(dtype)
    unsigned = (x + 1.0) * 0.5 if bits == 1 else x + 2.0 ** (bits - 1)
    width = codes.shape[-1] * bits // 8
    total = unsigned[..., :width] - 128.0
    for i in range(1, 8 // bits):
        total = total + unsigned[..., i * width : (i + 1) * width] * 2.0 ** (bits * i)
    return total.to(torch.int8)


def spread_blocks(state: Tensor, rows: Tensor, block: int) -> Tensor:
    """A scale per block of tokens [B, ceil(T / n), G, D] as one per token [B, T, G, D]."""
    return state[:, :, None].expand(-1, -1, block, -1, -1).flatten(1, 2)[:, : rows.shape[1]]


def _name(node: Node) -> str:
    return node.meta.get("name", node.name)


def _rank(node: Node) -> int:
    val = node.meta.get("val")
    return val.dim() if isinstance(val, Tensor) else -1
