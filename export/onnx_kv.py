"""Caches of codes on ONNX Runtime: what GroupQueryAttention can read runs in place, everything else is spelt out.

    partition of float, int8 or int4 rows,      GroupQueryAttention over a cache in place; scales, centres and balances are folded into q,
    one scale per channel                       the new rows and the output, so that the operator's own scale is 1 (its fastest kernel) and
                                                every sample may have its own
    int2, one scale per channel                 the same over twice the bytes, made by one multiplication (`planes`) in memory that all layers
                                                share (`scratch`)
    several such partitions                     one GroupQueryAttention each, their outputs weighted by log-sum-exp of their logits
    anything else (a scale per token or group,  dequantize to memory, join, attend: smaller caches, not faster steps (`notes` says so)
    other codes)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.kv_format import BITS, Partition
from ..graph.kv_table import past_symbol
from ..graph.program import KVLayer, Stage
from .onnx_builder import Builder, Emitter
from .onnx_contrib import MS, Contrib, call
from .onnx_dialect import Operands
from .onnx_kv_ops import KV_OPS
from .onnx_kv_read import Part, Read, read_parts
from .onnx_registry import dtype

foveate = torch.ops.foveate
F32, I32, I64 = torch.float32, torch.int32, torch.int64
CAPACITY = "capacity"  # input of the prefill: rows to write per padded output
PER_ROW = ("scale", "center")  # what a row brings with it where scales are per token or group
HIDDEN = -1e30  # logit of a row that is not there


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
