"""Caches of codes on ONNX Runtime: what GroupQueryAttention can read runs in place, everything else is spelt out.

    partition of float, int8 or int4 rows,      GroupQueryAttention over a cache in place; scales, centres and balances are folded into q,
    one scale per channel                       the new rows and the output, so that the operator's own scale is 1 (its fastest kernel) and
                                                every sample may have its own
    int2, one scale per channel                 the same over twice the bytes, made by one multiplication (`planes`) in memory that all layers
                                                share (`scratch`)
    several such partitions                     one GroupQueryAttention each, their outputs weighted by log-sum-exp of their logits
    anything else (a scale per token or group,  dequantize to memory, join, attend: smaller caches, not faster steps (`notes` says so)
    other codes)

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
from ..graph.retype import new_value, retype
from ..graph.splice import splice
from .onnx_builder import END, Builder, Emitter
from .onnx_contrib import MS, Contrib, _behind_store, call, plain
from .onnx_dialect import Operands
from .onnx_registry import dtype
from .onnx_shape import same

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
    past.meta["val"] = new_value(stage, (*val.shape[:3], packed_width(int(val.shape[3]), bits)), torch.uint8)
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


def quantize_fp8(b: Builder, n: Node, x: Node, scale: Node, block: int) -> str:
    """As the op's body; the exponent by a logarithm that is corrected where it rounds across a power of two."""
    y = b.op("Div", b.cast(b(x), dtype(x), F32), _spread(b, scale, x, block, F32))
    a = b.op("Min", b.op("Abs", y), b.const(448.0, F32))
    at_least = b.op("Max", a, b.const(2.0**-6, F32))
    guess = b.cast(b.op("Floor", b.op("Mul", b.op("Log", at_least), b.const(1.4426950408889634, F32))), F32, I64)
    powers = b.const([2.0**e for e in range(-8, 12)], F32)  # 2^-8 .. 2^11

    def power(e: str, plus: int) -> str:
        return b.op("Gather", powers, b.op("Add", e, b.const(8 + plus, I64)), axis=0)

    e = b.op("Add", guess, b.cast(b.op("GreaterOrEqual", at_least, power(guess, 1)), torch.bool, I64))
    e = b.op("Sub", e, b.cast(b.op("Less", at_least, power(guess, 0)), torch.bool, I64))
    eighths = b.op("Round", b.op("Div", b.op("Mul", a, b.const(8.0, F32)), power(e, 0)))
    byte = b.op("Add", b.op("Mul", b.cast(b.op("Add", e, b.const(6, I64)), I64, F32), b.const(8.0, F32)), eighths)  # 16 eighths: the next exponent
    return b.cast(b.op("Where", b.op("Less", y, b.const(0.0, F32)), b.op("Sub", byte, b.const(128.0, F32)), byte), F32, torch.int8)


def dequantize_fp8(b: Builder, n: Node, codes: Node, scale: Node, block: int) -> str:
    """Looked up among the 256 bytes."""
    values = torch.arange(256, dtype=torch.int16).sub(128).to(torch.int8).view(torch.float8_e4m3fn).float().nan_to_num()
    index = b.op("Add", b.cast(b(codes), torch.int8, I32), b.const(128, I32))
    value = b.cast(b.op("Gather", b.const(values), index, axis=0), F32, dtype(scale))
    return b.op("Mul", value, _spread(b, scale, codes, block, dtype(scale)))


KV_OPS: dict[Any, Emitter] = {
    foveate.quantize_fp8.default: quantize_fp8,
    foveate.dequantize_fp8.default: dequantize_fp8,
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
    if found is None or not isinstance(past := _behind_packing(found[0]), Node) or past.op != "placeholder":
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
            stored = plain(_behind_packing(outputs.get(name)))
            if p.code == "float":
                stored, row = _behind_store(stored), _behind_store(read.new)  # type: ignore[arg-type]
                if plain(stored) is not plain(row):
                    return None
            elif stored is not read.codes:
                return None
        found.append(read)
    return found[0], found[1]


# ** the patterns of a stage **


class KVContrib(Contrib):
    """`Contrib`, and the caches of codes of a stage (a copy that may be edited).

    notes: what became smaller but not faster, in sentences. padded: outputs of the prefill that have as many rows as the cache.
    scratch: outputs of decode that no step reads again -> the past that they are twice as wide as; those of keys may all be bound to one memory,
    those of values to another, and must be where the operator is to append in place.
    """

    def __init__(self, stage: Stage, name: str, kv: Sequence[KVLayer]) -> None:
        self.kv = {e.layer: e for e in kv}
        self.notes: list[str] = []
        self.padded: list[str] = []
        self.scratch: dict[str, str] = {}
        super().__init__(stage, name == "decode", [e.segment for e in kv])
        if name == "prefill":
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
        slow = form.partitions if parts is None else [p.partition for p in parts if not p.reads]
        if slow:
            self.notes.append(_note(a.layer, slow, bool(narrow)))
        if parts is None:
            return None
        for part in parts:  # the operator returns the cache it was given: bound to the same memory, nothing is copied
            for which, read in zip("kv", part.reads, strict=False):
                name = f"{which}.{a.layer}{part.partition.suffix()}"
                for output in [f"wide.{name}", f"wide.{name}.after"] if part.wide else [name] if not part.grown else []:
                    self.stage.add_output(output, read.past)
        return functools.partial(self._emit_parts, parts)

    def _emit_parts(self, parts: list[Part], b: Builder, n: Node, *operands: Any) -> str:
        a = Operands(*operands)
        found = [self._part(b, a, p, len(parts) > 1) if p.reads else self._spelt(b, a, p) for p in parts]
        y, total = found[0]
        for other, its in found[1:]:
            y, total = _merge(b, y, total, other, its)
        if found[1:] or not _by_channel(a, parts[0]):
            y = b.op("Reshape", y, b.ints(0, 1, a.heads * a.width))
        return self._put(b, n, y, a)

    def _part(self, b: Builder, a: Operands, part: Part, merged: bool) -> tuple[str, str | None]:
        """One partition -> its attention [B, G, H/G, D], and the log-sum-exp of its logits [B, G, H/G, 1] where it is merged.

        Alone and `_by_channel`, the attention is [B, 1, H D] as the operator gives it.
        """
        bits = max(BITS[part.partition.code], 4) if part.partition.code != "float" else 0
        lengths, row = part.held.args[1:3]
        held = b.op("Gather", b.op("Cast", b(lengths), to=6), b.const(self.row(row) if part.grown else row, I64), axis=0)  # int32[B]
        total = b.op("Add", b.op("ReduceMax", held, b.ints(0), keepdims=1), b.const([1], I32))
        queries = self._queries(b, a, part)
        pasts = [b(read.past) for read in part.reads]
        pasts = [_two_planes(b, past, queries) for past in pasts] if part.wide else pasts
        made = b.op(
            "GroupQueryAttention",
            queries,
            *([self._row(b, a, part, read) for read in part.reads] if part.grown else [_blank(b, a, lengths)] * 2),
            *pasts,
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
        self._returned(b, part, a, pasts, made[1:3])
        y = self._context(b, a, part, made[0], merged)
        return y, self._log_sum_exp(b, a, part, made[3], held, total) if merged else None

    def _spelt(self, b: Builder, a: Operands, part: Part) -> tuple[str, str]:
        """The same, of a partition that the graph dequantizes."""
        keys, values = (b(t) for t in part.terms)
        q = b.op("Reshape", self.flatten(b, a.q), _grouped(b, a))
        logits = b.op("Mul", b.op("MatMul", q, b.op("Transpose", keys, perm=[0, 1, 3, 2])), b.const(a.scale, F32))
        logits = b.op("Where", b.op("Unsqueeze", b(part.held), b.ints(1, 2)), logits, b.const(HIDDEN, F32))
        top = b.op("ReduceMax", logits, b.ints(3), keepdims=1)
        p = b.op("Softmax", logits, axis=-1)
        return b.op("MatMul", p, values), b.op("Sub", top, b.op("Log", b.op("ReduceMax", p, b.ints(3), keepdims=1)))

    def _queries(self, b: Builder, a: Operands, part: Part) -> str:
        """q[B, 1, H D] in units of the keys' codes."""
        q, scale = self.flatten(b, a.q), _scale(b, part.k)
        if scale is None:
            return q
        if _by_channel(a, part):
            return b.op("Mul", q, _in_a_row(b, a, scale))
        q = b.op("Mul", b.op("Reshape", q, _grouped(b, a)), scale)
        if part.wide:
            q = b.op("MatMul", q, b.const(planes(a.width)[1]))
        return b.op("Reshape", q, b.ints(0, 1, a.heads * a.width))

    def _context(self, b: Builder, a: Operands, part: Part, y: str, merged: bool) -> str:
        """What the operator returns, in codes, as values: [B, G, H/G, D], or [B, 1, H D] (see `_part`)."""
        flat = _by_channel(a, part) and not merged
        y = y if flat else b.op("Reshape", y, _grouped(b, a))
        if part.wide:
            _, inverse, offset = planes(a.width)
            y = b.op("Add", b.op("MatMul", y, b.const(inverse.T.contiguous())), b.const(offset))
        for kind, state in (("Mul", part.v.scale), ("Add", part.v.center), ("Mul", part.v.balance)):
            if state is not None:
                y = b.op(kind, y, _in_a_row(b, a, b(state)) if flat else b(state))
        return y

    def _row(self, b: Builder, a: Operands, part: Part, read: Read) -> str:
        """The new row in units of the scale, [B, 1, G D]: the operator rounds and clips it."""
        if read.scale is None:
            return self.flatten(b, read.new)  # type: ignore[arg-type]
        if part.wide:  # what is stored already, as the operator reads it
            digits = b.op("Add", b.cast(b(read.codes), torch.int8, F32), b.const(2.0, F32))
            value = b.op("Sub", b.op("MatMul", digits, b.const(planes(a.width)[0].T.contiguous())), b.const(8.0, F32))
            return b.op("Reshape", value, b.ints(0, 1, a.groups * a.width))
        value = self.flatten(b, read.new)  # type: ignore[arg-type]
        for kind, state in (("Div", read.balance), ("Sub", read.center), ("Div", read.scale)):
            value = value if state is None else b.op(kind, value, _in_a_row(b, a, b(state)))
        return value

    def _returned(self, b: Builder, part: Part, a: Operands, given: list[str], present: list[str]) -> None:
        for which, read, before, after in zip("kv", part.reads, given, present, strict=True):
            name = f"{which}.{a.layer}{part.partition.suffix()}"
            dims = ["B", a.groups, past_symbol(f"past_{name}"), int(read.past.meta["val"].shape[3])]
            if part.wide:
                dims[3] *= 2
                b.replaced |= {f"wide.{name}": (before, dims), f"wide.{name}.after": (after, dims)}
                self.scratch |= dict.fromkeys((f"wide.{name}", f"wide.{name}.after"), f"past_{name}")
            else:
                b.replaced[name] = (after, dims)
                self.in_place.append(name)

    def _log_sum_exp(self, b: Builder, a: Operands, part: Part, logits: str, held: str, total: str) -> str:
        """logits[B, H, 1, T] of which a sample's rows are the first  ->  [B, G, H/G, 1], by the largest probability: never below 1/T."""
        slots = b.op("Range", b.const(0, I32), b.op("Squeeze", total, b.ints(0)), b.const(1, I32))
        seen = b.op("LessOrEqual" if part.grown else "Less", slots, b.op("Unsqueeze", held, b.ints(1, 2, 3)))
        logits = b.op("Where", seen, logits, b.const(HIDDEN, F32))
        top = b.op("ReduceMax", logits, b.ints(3), keepdims=1)
        mass = b.op("Log", b.op("ReduceMax", b.op("Softmax", logits, axis=-1), b.ints(3), keepdims=1))
        found = b.op("Reshape", b.op("Sub", top, mass), b.ints(0, a.groups, a.heads // a.groups, 1))
        shift = _middle(b, a, part)
        if shift is None:
            return found
        q = b.op("Reshape", self.flatten(b, a.q), _grouped(b, a))
        shift = b.op("MatMul", q, b.op("Reshape", shift, b.ints(0, a.groups, a.width, 1)))
        return b.op("Add", found, b.op("Mul", shift, b.const(a.scale, F32)))


def _by_channel(a: Operands, part: Part) -> bool:
    """Do queries and outputs [B, 1, H D] meet the partition's scales channel by channel?"""
    return a.heads == a.groups and part.partition.code in ("int8", "int4")


def _in_a_row(b: Builder, a: Operands, state: str) -> str:
    """[B, G, 1, D] -> [B, 1, G D]"""
    return b.op("Reshape", state, b.ints(0, 1, a.groups * a.width))


def _grouped(b: Builder, a: Operands) -> str:
    return b.ints(0, a.groups, a.heads // a.groups, a.width)


def _scale(b: Builder, read: Read) -> str | None:
    """What a code of one is worth, [B, G, 1, D]."""
    if read.scale is None or read.balance is None:
        return None if read.scale is None else b(read.scale)
    return b.op("Mul", b(read.scale), b(read.balance))


def _middle(b: Builder, a: Operands, part: Part) -> str | None:
    """The key that codes of zero stand for, [B, G, 1, D]: softmax does not see it, a merge does. None if it is zero."""
    k, middle = part.k, None
    if part.wide:
        middle = b.op("Mul", b(k.scale), b.const(planes(a.width)[2]))
    if k.center is not None:
        middle = b(k.center) if middle is None else b.op("Add", middle, b(k.center))
    return middle if middle is None or k.balance is None else b.op("Mul", middle, b(k.balance))


@functools.cache
def planes(width: int) -> tuple[Tensor, Tensor, Tensor]:
    """2-bit codes as 4-bit ones: (forward[D, D], inverse[D, D], offset[D]) with  nibbles - 8 = forward (codes + 2) - 8  and
    codes = inverse (nibbles - 8) + offset.

    A byte u0 + 4 u1 + 16 u2 + 64 u3 is two nibbles, (u0 + 4 u1, u2 + 4 u3); four times the byte, modulo 256, is two more,
    (4 u0, u1 + 4 u2). The four determine u linearly, so q and the output are transformed, and the rows need one multiplication.
    """
    digits = torch.tensor([[1.0, 4, 0, 0], [0, 0, 1, 4], [4, 0, 0, 0], [0, 1, 4, 0]])
    forward = torch.zeros(width, width)
    for byte in range(width // 4):
        at = torch.tensor([2 * byte, 2 * byte + 1, width // 2 + 2 * byte, width // 2 + 2 * byte + 1])
        forward[at[:, None], torch.arange(4 * byte, 4 * byte + 4)] = digits
    inverse = torch.linalg.inv(forward.double())
    return forward, inverse.float(), (8 * inverse.sum(1) - 2).float()


def _two_planes(b: Builder, past: str, queries: str) -> str:
    """A layer's rows as `planes` promises. The factor has its shape from the layer's queries: without them to wait for, ONNX Runtime would unpack
    all layers first, and hold them."""
    shape = b.op("Concat", b.op("Shape", queries, start=0, end=1), b.ints(1, 1, 1), axis=0)
    four = b.op("Expand", b.const(torch.full((1, 1, 1, 1), 4, dtype=torch.uint8)), shape)
    return b.op("Concat", past, b.op("Mul", past, four), axis=3)


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


def _blank(b: Builder, a: Operands, lengths: Node) -> str:
    """A row of zeros [B, 1, G D], the same for all layers: the operator always appends one."""
    shape = b.op("Concat", b.op("Shape", b(lengths), start=1, end=2), b.ints(1, 1), axis=0)
    return b.op("Expand", b.const(torch.zeros(1, 1, a.groups * a.width)), shape)


def _hide_last(b: Builder, held: str, total: str) -> str:
    """Added to the logits [B, 1, 1, T]: the appended row, the one behind a sample's last, is not there."""
    slots = b.op("Range", b.const(0, I32), b.op("Squeeze", total, b.ints(0)), b.const(1, I32))
    last = b.op("Equal", slots, b.op("Unsqueeze", held, b.ints(1, 2, 3)))
    return b.op("Where", last, b.const(-1e9, F32), b.const(0.0, F32))


def _note(layer: int, slow: Sequence[Partition], narrow: bool) -> str:
    what = " + ".join(f"{p.code} per {p.k_per}/{p.v_per}" if p.code != "float" else "float" for p in slow)
    why = "its heads, window or type do not fit the fused operator" if narrow else "no fused operator reads it"
    return f"layer {layer}: the cache's {what} part is dequantized in every step, {why}: it saves memory, not time"
