"""Caches of codes on ONNX Runtime: what GroupQueryAttention can read runs in place, everything else is spelt out.

    partition of float, int8 or int4 rows,      GroupQueryAttention over a cache in place; scales and centres are folded into q, the new
    one scale per channel                       rows and the output, so that the operator's own scale is 1 (its fastest kernel) and every
                                                sample may have its own
    several such partitions                     one GroupQueryAttention each, their outputs weighted by log-sum-exp of their logits
    anything else (a scale per token or group,  dequantize to memory, join, attend: smaller caches, not faster steps (`notes` says so)
    2 bits, other codes)

Codes of less than a byte are packed by the stage itself (uint8, lowest element first, as GroupQueryAttention wants 4 bits).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.kv_format import BITS, KVFormat, Partition
from ..graph.kv_table import past_symbol
from ..graph.program import KVLayer, Stage
from ..graph.retype import fake_mode, retype
from ..graph.splice import splice
from .onnx_builder import END, Builder, Emitter
from .onnx_contrib import MS, Contrib, call, plain
from .onnx_dialect import Operands
from .onnx_registry import dtype

aten, foveate = torch.ops.aten, torch.ops.foveate
F32, I32, I64 = torch.float32, torch.int32, torch.int64
CAPACITY = "capacity"  # input of the prefill: rows to write per padded output
PER_ROW = ("scale", "center")  # what a row brings with it where scales are per token or group
HIDDEN = -1e30  # logit of a row that is not there


# ** storage: what the engine keeps of a partition **


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
    with fake_mode(stage):
        past.meta["val"] = torch.empty((*val.shape[:3], packed_width(int(val.shape[3]), bits)), dtype=torch.uint8)
    codes = splice(stage, min(readers), _unpack, past, bits, int(val.shape[3]))
    for reader in readers:
        reader.replace_input_with(past, codes)
        reader.meta["stale"] = True


def _pack(codes: Tensor, bits: int) -> Tensor:
    return (foveate.pack_kv(codes, bits).to(torch.int16) + 128).to(torch.uint8)


def _unpack(stored: Tensor, bits: int, width: int) -> Tensor:
    return foveate.unpack_kv((stored.to(torch.int16) - 128).to(torch.int8), bits, width)


def _behind_packing(node: Any) -> Any:
    """The codes that were packed into `node`, or the placeholder that was unpacked into it."""
    while call(node, *PACKING):
        node = node.args[0]
    return node


PACKING = (
    *(aten.to.dtype, aten._to_copy.default, aten.add.Tensor, aten.sub.Tensor, aten.clone.default),
    *(foveate.pack_kv.default, foveate.unpack_kv.default),
)


# ** the dialect's operators, portable **


def kv_held(b: Builder, n: Node, past: Node, lengths: Node, layer: int) -> str:
    slots = b.op("Range", b.const(0, I64), b.op("Squeeze", b.dim(past, 2), b.ints(0)), b.const(1, I64))
    return b.op("Less", slots, b.op("Unsqueeze", b.op("Gather", b(lengths), b.const(layer, I64), axis=0), b.ints(1)))


def quantize_kv(b: Builder, n: Node, x: Node, scale: Node, center: Node | None, bits: int, block: int) -> str:
    value = b.cast(b(x), dtype(x), F32)
    if center is not None:
        value = b.op("Sub", value, _spread(b, center, x, block, F32))
    if bits == 1:
        sign = b.op("Where", b.op("Less", value, b.const(0.0, F32)), b.const(-1, torch.int8), b.const(1, torch.int8))
        return sign
    top = 2 ** (bits - 1)
    value = b.op("Round", b.op("Div", value, _spread(b, scale, x, block, F32)))
    return b.cast(b.op("Clip", value, b.const(float(-top), F32), b.const(float(top - 1), F32)), F32, torch.int8)


def dequantize_kv(b: Builder, n: Node, codes: Node, scale: Node, center: Node | None, block: int) -> str:
    kind = dtype(scale)
    value = b.op("Mul", b.cast(b(codes), torch.int8, kind), _spread(b, scale, codes, block, kind))
    return value if center is None else b.op("Add", value, _spread(b, center, codes, block, kind))


def _spread(b: Builder, state: Node, x: Node, block: int, kind: torch.dtype) -> str:
    """`quantize_kv.spread`: a scale or centre of any granularity, broadcastable against x[B, G, T, D]."""
    val, width = state.meta["val"], int(x.meta["val"].shape[3])
    value, columns = b.cast(b(state), val.dtype, kind), int(val.shape[3])
    if block:
        value = _repeat(b, value, block, 2)
        value = b.op("Slice", value, b.ints(0), b.dim(x, 2), b.ints(2))
    return value if columns in (1, width) else _repeat(b, value, width // columns, 3)


def _repeat(b: Builder, value: str, times: int, axis: int) -> str:
    """repeat_interleave"""
    wide = b.op("Expand", b.op("Unsqueeze", value, b.ints(axis + 1)), b.ints(*[times if i == axis + 1 else 1 for i in range(5)]))
    shape = b.op("Shape", value)
    counts = b.ints(*[times if i == axis else 1 for i in range(4)])
    return b.op("Reshape", wide, b.op("Mul", shape, counts))


def pack_kv(b: Builder, n: Node, codes: Node, bits: int) -> str:
    """Digits by strided slices, added up in float: exact, and known to every target."""
    each, width = 8 // bits, int(codes.meta["val"].shape[-1])
    value, axis = b.cast(b(codes), torch.int8, F32), codes.meta["val"].dim() - 1
    if bits == 1:
        value = b.op("Cast", b.op("Greater", value, b.const(0.0, F32)), to=1)
    else:
        value = b.op("Add", value, b.const(float(2 ** (bits - 1)), F32))
    if width % each:
        value = b.op("Pad", value, b.ints(0, each - width % each), b.const(0.0, F32), b.ints(axis))
    total: Any = None
    for i in range(each):
        digit = b.op("Slice", value, b.ints(i), b.ints(END), b.ints(axis), b.ints(each)) if each > 1 else value
        digit = b.op("Mul", digit, b.const(float(2 ** (bits * i)), F32)) if i else digit
        total = digit if total is None else b.op("Add", total, digit)
    return b.cast(b.op("Sub", total, b.const(128.0, F32)), F32, torch.int8)


def unpack_kv(b: Builder, n: Node, packed: Node, bits: int, width: int) -> str:
    byte = b.op("Add", b.cast(b(packed), torch.int8, F32), b.const(128.0, F32))
    rank = packed.meta["val"].dim()
    above, digits = byte, []
    for i in range(8 // bits):  # base 2^bits, the lowest digit first
        rest = b.op("Floor", b.op("Mul", above, b.const(2.0**-bits, F32))) if i < 8 // bits - 1 else None
        digit = above if rest is None else b.op("Sub", above, b.op("Mul", rest, b.const(2.0**bits, F32)))
        digits.append(b.op("Unsqueeze", digit, b.ints(rank)))
        above = rest
    value = b.op("Concat", *digits, axis=rank)
    value = b.op("Reshape", value, b.ints(*[0] * (rank - 1), int(packed.meta["val"].shape[-1]) * (8 // bits)))
    if int(packed.meta["val"].shape[-1]) * (8 // bits) != width:
        value = b.op("Slice", value, b.ints(0), b.ints(width), b.ints(rank - 1))
    if bits == 1:
        value = b.op("Sub", b.op("Mul", value, b.const(2.0, F32)), b.const(1.0, F32))
    else:
        value = b.op("Sub", value, b.const(float(2 ** (bits - 1)), F32))
    return b.cast(value, F32, torch.int8)


KV_OPS: dict[Any, Emitter] = {
    foveate.kv_held.default: kv_held,
    foveate.quantize_kv.default: quantize_kv,
    foveate.dequantize_kv.default: dequantize_kv,
    foveate.pack_kv.default: pack_kv,
    foveate.unpack_kv.default: unpack_kv,
}


# ** what decode attention reads **


@dataclass(frozen=True)
class Read:
    """Keys or values of one partition: codes (or rows) in a cache, and the row that is appended."""

    past: Node  # placeholder
    scale: Node | None
    center: Node | None
    new: Node | None  # [B, G, 1, D] before it is quantized; None where nothing is appended


@dataclass(frozen=True)
class Part:
    """One partition as attention sees it."""

    k: Read
    v: Read
    lengths: Node
    row: int
    partition: Partition

    @property
    def grown(self) -> bool:
        return self.k.new is not None


def _terms(node: Any) -> list[Any]:
    """cat and kv_append along tokens, flattened: the pasts, and (past, new) where a row is appended."""
    node = plain(node)
    if call(node, aten.cat.default) and (node.args[1] if len(node.args) > 1 else 0) == 2:
        return [t for x in node.args[0] for t in _terms(x)]
    return [node]


def _read(node: Any) -> Read | None:
    """kv_append(past, new), or a past; each maybe behind dequantize_kv."""
    new: Node | None = None
    if call(node, foveate.kv_append.default):
        node, new = plain(node.args[0]), plain(node.args[1])
    if not call(node, foveate.dequantize_kv.default):
        return Read(node, None, None, new) if isinstance(node, Node) and node.op == "placeholder" else None
    codes, scale, center, block = node.args
    past = _behind_packing(codes)
    if block or not isinstance(past, Node) or past.op != "placeholder" or not all(s is None or s.op == "placeholder" for s in (scale, center)):
        return None
    if new is not None:
        if not call(new, foveate.dequantize_kv.default) or tuple(new.args[1:]) != (scale, center, block):
            return None
        made = plain(new.args[0])
        if not call(made, foveate.quantize_kv.default) or made.args[1:3] != (scale, center):
            return None
        new = made.args[0]
    return Read(past, scale, center, new)


def _held(mask: Any) -> list[Node] | None:
    """The terms of cat([kv_held ..., kv_mask], 1)."""
    mask = plain(mask)
    if call(mask, aten.cat.default) and (mask.args[1] if len(mask.args) > 1 else 0) == 1:
        found = [_held(x) for x in mask.args[0]]
        return None if any(f is None for f in found) else [t for f in found for t in f]  # type: ignore[union-attr]
    return [mask] if call(mask, foveate.kv_held.default, foveate.kv_mask.default) else None


def read_parts(node: Node, form: KVFormat, outputs: dict[str, Node]) -> list[Part] | None:
    """The partitions of a decode attention, in the format's order, if GroupQueryAttention can read them all; else None."""
    a = Operands(*node.args)
    keys, values, held = [_read(t) for t in _terms(a.k)], [_read(t) for t in _terms(a.v)], _held(a.mask)
    if held is None or not len(keys) == len(values) == len(held) == len(form.partitions) or None in keys or None in values:
        return None
    found = []
    for partition in form.partitions:
        name = f"{a.layer}{partition.suffix()}"
        at = [i for i, k in enumerate(keys) if k.past.meta.get("name") == f"past_k.{name}"]  # type: ignore[union-attr]
        if len(at) != 1:
            return None
        part = Part(keys[at[0]], values[at[0]], held[at[0]].args[1], held[at[0]].args[2], partition)  # type: ignore[arg-type]
        if not _fits(part, a, held[at[0]], outputs):
            return None
        found.append(part)
    return found


def _fits(part: Part, a: Operands, held: Node, outputs: dict[str, Node]) -> bool:
    """Can GroupQueryAttention say it? Codes in place, one scale per channel, the row that decode returns the one that it stores."""
    p, name = part.partition, f"{a.layer}{part.partition.suffix()}"
    if p.code not in ("float", "int8", "int4") or (p.code != "float" and (p.k_per, p.v_per) != ("channel", "channel")):
        return False
    if part.v.past.meta.get("name") != f"past_v.{name}" or held.args[0] is not part.k.past or part.lengths.op != "placeholder":
        return False
    if (part.v.new is None) == part.grown or (p.name == "") != part.grown:
        return False
    if a.softcap and (part.k.center is not None or p.name):
        return False  # a soft cap does not commute with the shift, and hides the logits that the merge needs
    for which, read in (("k", part.k), ("v", part.v)):
        if part.grown and p.code != "float":
            made = plain(_behind_packing(outputs.get(f"{which}.{name}")))
            if not call(made, foveate.quantize_kv.default) or made.args[0] is not read.new:
                return False
    return True


# ** the patterns of a stage **


class KVContrib(Contrib):
    """`Contrib`, and the caches of codes of a stage (a copy that may be edited).

    notes: what became smaller but not faster, in sentences. padded: outputs of the prefill that have as many rows as the cache.
    """

    def __init__(self, stage: Stage, decode: bool, kv: Sequence[KVLayer]) -> None:
        self.kv = {e.layer: e for e in kv}
        self.notes: list[str] = []
        self.padded: list[str] = []
        super().__init__(stage, decode, [e.segment for e in kv])
        if not decode:
            self._pad_outputs()

    # prefill: the outputs have the rows of the cache, so that they are written where they stay

    def _pad_outputs(self) -> None:
        for entry in self.kv.values():
            for part in entry.format.partitions if entry.format else ():
                for which in "kv":
                    name = f"{which}.{entry.layer}{part.suffix()}"
                    per_row = part.per(which).startswith(("token", "group"))
                    for output in (name, *(f"{name}.{s}" for s in PER_ROW if per_row)):
                        if output in self.stage.outputs and (node := self.stage.output_nodes[output]).op == "call_function":
                            self._pad(node, output)

    def _pad(self, node: Node, output: str) -> None:
        row = len(self.padded)
        self.padded.append(output)
        before = self.emitters.get(node)

        def emit(b: Builder, n: Node, *arguments: Any) -> Any:
            value = (before or _emitter(n))(b, n, *arguments)
            val = n.meta["val"]
            if all(extra[0] != CAPACITY for extra in b.extra_inputs):
                b.extra_inputs.append((CAPACITY, torch.empty(0, dtype=I64), [len(self.padded)]))
            want = b.op("Slice", CAPACITY, b.ints(row), b.ints(row + 1), b.ints(0))
            spare = b.op("Sub", want, b.dim_of(value, val, 2))
            rows = b.op("Pad", value, b.op("Concat", b.ints(0), spare, axis=0), None, b.ints(2))
            b.replaced[output] = (rows, ["B", int(val.shape[1]), f"C_{output}".replace(".", "_"), int(val.shape[3])])
            return value

        self.emitters[node] = emit

    # decode

    def _attention(self, node: Node) -> Emitter | None:
        form = self.kv[node.args[-1]].format if self.decode and call(node, foveate.attention.default) and node.args[-1] in self.kv else None
        if form is None:
            return super()._attention(node)
        a = Operands(*node.args)
        widths = {int(x.meta["val"].shape[3]) for x in (a.q, a.k, a.v)}
        narrow = len(widths) != 1 or a.width % 8 or dtype(node) != F32 or a.causal or a.window
        parts = None if narrow else read_parts(node, form, self.stage.output_nodes)
        if parts is None:
            self.notes.append(_note(a.layer, form, bool(narrow)))
            return None
        for part in parts[1:]:  # the operator returns the cache it was given: bound to the same memory, nothing is copied
            for which, read in (("k", part.k), ("v", part.v)):
                self.stage.add_output(f"{which}.{a.layer}{part.partition.suffix()}", read.past)
        return functools.partial(self._emit_parts, parts)

    def _emit_parts(self, parts: list[Part], b: Builder, n: Node, *operands: Any) -> str:
        a = Operands(*operands)
        found = [self._part(b, a, part, len(parts) > 1) for part in parts]
        y, total = found[0]
        for other, its in found[1:]:
            y, total = _merge(b, y, total, other, its)
        return self._put(b, n, b.op("Reshape", y, b.ints(0, 1, a.heads * a.width)), a)

    def _part(self, b: Builder, a: Operands, part: Part, merged: bool) -> tuple[str, str | None]:
        """One partition -> its attention [B, G, H/G, D], and the log-sum-exp of its logits [B, G, H/G, 1] where it is merged."""
        bits, one = BITS[part.partition.code], b.const([1], I32)
        grouped = b.ints(0, a.groups, a.heads // a.groups, a.width)
        lengths = b.op("Cast", b(part.lengths), to=6)  # int32[L, B], once
        held = b.op("Gather", lengths, b.const(self.row(part.row) if part.grown else part.row, I64), axis=0)
        total = b.op("Add", b.op("ReduceMax", held, b.ints(0), keepdims=1), one)
        q = self.flatten(b, a.q)
        if part.k.scale is not None:
            q = b.op("Reshape", b.op("Mul", b.op("Reshape", q, grouped), b(part.k.scale)), b.ints(0, 1, a.heads * a.width))
        fresh = [self._row(b, a, read) for read in (part.k, part.v)] if part.grown else [_blank(b, a, held)] * 2
        made = b.op(
            "GroupQueryAttention",
            q,
            *fresh,
            b(part.k.past),
            b(part.v.past),
            held,
            total,
            *[None] * 3,
            None if part.grown else _hide_last(b, held, total),
            None,
            *([b.const([1.0], F32)] * 2 if bits else []),
            domain=MS,
            outputs=4 if merged else 3,
            num_heads=a.heads,
            kv_num_heads=a.groups,
            scale=a.scale,
            softcap=a.softcap or None,
            qk_output=1 if merged else None,
            **({"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": bits} if bits else {}),
        )
        self._returned(b, part, a, made[1:3])
        y = b.op("Reshape", made[0], grouped)
        if part.v.scale is not None:
            y = b.op("Mul", y, b(part.v.scale))
        if part.v.center is not None:
            y = b.op("Add", y, b(part.v.center))
        return y, self._log_sum_exp(b, a, part, made[3], held, total) if merged else None

    def _row(self, b: Builder, a: Operands, read: Read) -> str:
        """The new row in units of the scale, [B, 1, G D]: the operator rounds and clips it."""
        flat = self.flatten(b, read.new)  # type: ignore[arg-type]
        if read.scale is None:
            return flat
        value = b.op("Reshape", flat, b.ints(0, a.groups, 1, a.width))
        if read.center is not None:
            value = b.op("Sub", value, b(read.center))
        return b.op("Reshape", b.op("Div", value, b(read.scale)), b.ints(0, 1, a.groups * a.width))

    def _returned(self, b: Builder, part: Part, a: Operands, present: list[str]) -> None:
        for which, read, value in zip("kv", (part.k, part.v), present, strict=True):
            name = f"{which}.{a.layer}{part.partition.suffix()}"
            width = int(read.past.meta["val"].shape[3])
            b.replaced[name] = (value, ["B", a.groups, past_symbol(f"past_{name}"), width])
            self.in_place.append(name)

    def _log_sum_exp(self, b: Builder, a: Operands, part: Part, logits: str, held: str, total: str) -> str:
        """logits[B, H, 1, T] of which a sample's rows are the first  ->  [B, G, H/G, 1], by the largest probability: never below 1/T."""
        slots = b.op("Range", b.const(0, I32), b.op("Squeeze", total, b.ints(0)), b.const(1, I32))
        seen = b.op("LessOrEqual" if part.grown else "Less", slots, b.op("Unsqueeze", held, b.ints(1, 2, 3)))
        logits = b.op("Where", seen, logits, b.const(HIDDEN, F32))
        top = b.op("ReduceMax", logits, b.ints(3), keepdims=1)
        mass = b.op("Log", b.op("ReduceMax", b.op("Softmax", logits, axis=-1), b.ints(3), keepdims=1))
        total_ = b.op("Reshape", b.op("Sub", top, mass), b.ints(0, a.groups, a.heads // a.groups, 1))
        if part.k.center is None:
            return total_
        q = b.op("Reshape", self.flatten(b, a.q), b.ints(0, a.groups, a.heads // a.groups, a.width))
        shift = b.op("MatMul", q, b.op("Reshape", b(part.k.center), b.ints(0, a.groups, a.width, 1)))  # the codes have no centre
        return b.op("Add", total_, b.op("Mul", shift, b.const(a.scale, F32)))


def _emitter(node: Node) -> Emitter:
    from .onnx_dialect import PORTABLE
    from .onnx_registry import EMITTERS

    return {**EMITTERS, **PORTABLE, **KV_OPS}[node.target]


def _merge(b: Builder, y: str, total: str | None, other: str, its: str | None) -> tuple[str, str]:
    """Two attentions over disjoint keys -> the attention over all of them, and its log-sum-exp."""
    apart = b.op("Sub", total, its)
    weight = b.op("Sigmoid", apart)
    joined = b.op("Add", other, b.op("Mul", weight, b.op("Sub", y, other)))
    return joined, b.op("Add", b.op("Max", total, its), b.op("Softplus", b.op("Neg", b.op("Abs", apart))))


def _blank(b: Builder, a: Operands, held: str) -> str:
    """A row of zeros [B, 1, G D]: the operator always appends one."""
    return b.op("Expand", b.const(torch.zeros(1, 1, a.groups * a.width)), b.op("Concat", b.op("Shape", held), b.ints(1, 1), axis=0))


def _hide_last(b: Builder, held: str, total: str) -> str:
    """Added to the logits [B, 1, 1, T]: the appended row, the one behind a sample's last, is not there."""
    slots = b.op("Range", b.const(0, I32), b.op("Squeeze", total, b.ints(0)), b.const(1, I32))
    last = b.op("Equal", slots, b.op("Unsqueeze", held, b.ints(1, 2, 3)))
    return b.op("Where", last, b.const(-1e9, F32), b.const(0.0, F32))


def _note(layer: int, form: KVFormat, narrow: bool) -> str:
    what = " + ".join(f"{p.code} per {p.k_per}/{p.v_per}" if p.code != "float" else "float" for p in form.partitions)
    why = "its heads, window or type do not fit the fused operator" if narrow else "no fused operator reads it"
    return f"layer {layer}: the cache ({what}) is dequantized in every step, {why}: it saves memory, not time"
