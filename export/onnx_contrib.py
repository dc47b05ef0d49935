"""ONNX Runtime's own operators, recognised on the FX graph: what the CPU provider runs much faster than the portable spelling.

    RMSNorm, residual + RMSNorm     SimplifiedLayerNormalization, SkipSimplifiedLayerNormalization
    residual + LayerNorm            SkipLayerNormalization
    x cos + rotate_half(x) sin      RotaryEmbedding, on [B, S, H D]: no transposes
    attention                       GroupQueryAttention (causal; keys and values written into the cache in place), MultiHeadAttention
    (not causal)
    silu, x sigmoid(1.702 x)        QuickGelu
    linear with bias                Gemm on a flat view
    attention_rows of a few rows    one product of the keys as they are, [B, T, G D], with the rows laid out block by block: nothing is
                                    split into heads or turned

`Contrib(stage)` finds the patterns; `emitters` says which FX node is written by what. Nodes inside a pattern are still translated, and
dropped when
nothing reads them, so a pattern with other readers stays correct. Valid rows are a prefix of every row (the runtime pads on the right).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from ..graph.program import Stage
from .onnx_builder import Builder, Emitter
from .onnx_dialect import Operands
from .onnx_registry import dtype, rank
from .onnx_select import masked_softmax, places
from .onnx_shape import reshape_to, same

aten, foveate = torch.ops.aten, torch.ops.foveate
MS = "com.microsoft"
F32 = torch.float32
FEW = 4  # rows of attention that are scored against the keys of all heads at once
CASTS = (aten.to.dtype, aten.to.device, aten._to_copy.default, aten.type_as.default, aten.contiguous.default, aten.clone.default)


def plain(node: Any) -> Any:
    """The value behind casts that change nothing."""
    while isinstance(node, Node) and node.op == "call_function" and node.target in CASTS and dtype(node) == dtype(node.args[0]):
        node = node.args[0]
    return node


def call(node: Any, *targets: Any) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def pair(node: Node, target: Any, first: Callable[[Any], bool]) -> tuple[Any, Any] | None:
    """The operands of a commutative node, the one that satisfies `first` in front."""
    if not call(node, target) or len(node.args) != 2:
        return None
    a, b = plain(node.args[0]), plain(node.args[1])
    return (a, b) if first(a) else (b, a) if first(b) else None


class Contrib:
    """The patterns of one stage.

    in_place: outputs k.<l>, v.<l> that are the cache itself, written by GroupQueryAttention; filled while the graph is written.
    """

    def __init__(self, stage: Stage, decode: bool, segments: list[int] | None = None) -> None:
        """segments: of the cached layers in the order of `lengths`; the layers of one hold the same tokens."""
        self.stage, self.decode = stage, decode
        self.rows = [segments.index(s) for s in segments] if segments else []
        self.outputs = {node: name for name, node in stage.output_nodes.items()}
        self.emitters: dict[Node, Emitter] = {}
        self.in_place: list[str] = []
        self.flat: dict[Node, str] = {}  # [B, H, S, D] node -> its value as [B, S, H D]
        self.context: dict[Node, str] = {}  # attention node -> its value as [B, S, H D]
        self.normed: dict[Node, str] = {}  # norm written together with the residual before it
        self._halves: dict[Node, bool] = {}
        for node in stage.graph.nodes:
            if node.op == "call_function":
                self._recognise(node)

    def _recognise(self, node: Node) -> None:
        for find in (self._rms_norm, self._layer_norm, self._rope, self._attention, self._rows, self._gelu, self._flat_view, self._linear):
            emitter = find(node)
            if emitter is not None:
                self.emitters[node] = emitter
                return

    # ** norms **

    def _rms_norm(self, node: Node) -> Emitter | None:
        """weight * (x * rsqrt(mean(x^2) + eps)), the product with the weight last."""
        if dtype_of(node) != F32:
            return None
        parts = pair(node, aten.mul.Tensor, lambda a: _rms_core(a) is not None)
        if parts is None:
            return None
        core, weight = parts
        x, eps = _rms_core(core)  # type: ignore[misc]
        val = weight.meta["val"] if isinstance(weight, Node) else None
        if not isinstance(val, Tensor) or val.dim() != 1 or not same(val.shape[0], x.meta["val"].shape[-1]) or val.dtype != F32:
            return None
        source = plain(x)
        if isinstance(weight, Node) and weight.op == "get_attr" and self._residual(source):
            self.emitters[source] = functools.partial(self._write_skip, "SkipSimplifiedLayerNormalization", node, weight, None, eps)
            return lambda b, n, *_: self.normed[n]
        return lambda b, n, *_: b.op("SimplifiedLayerNormalization", b(source), b(weight), axis=-1, epsilon=eps, stash_type=1)

    def _layer_norm(self, node: Node) -> Emitter | None:
        if not call(node, aten.layer_norm.default) or dtype(node) != F32 or len(node.args) < 4 or len(node.args[1]) != 1:
            return None
        x, _, weight, bias = node.args[:4]
        eps = node.args[4] if len(node.args) > 4 else node.kwargs.get("eps", 1e-5)
        source = plain(x)
        if not (self._residual(source) and _parameter(weight) and _parameter(bias)):
            return None
        self.emitters[source] = functools.partial(self._write_skip, "SkipLayerNormalization", node, weight, bias, eps)
        return lambda b, n, *_: self.normed[n]

    def _residual(self, node: Any) -> bool:
        """A sum of two [B, S, D] values of the same shape that no other norm has taken."""
        if not call(node, aten.add.Tensor) or node in self.emitters or node.kwargs or not all(isinstance(a, Node) for a in node.args):
            return False
        shapes = [a.meta["val"].shape for a in (node, *node.args)]
        return (
            dtype(node) == F32
            and len(shapes[0]) == 3
            and all(len(s) == 3 and all(map(same, s, shapes[0])) for s in shapes[1:])
            and all(dtype(a) == F32 for a in node.args)
        )

    def _write_skip(
        self, kind: str, norm: Node, weight: Node, bias: Node | None, eps: float, b: Builder, n: Node, x: Node, y: Node, *_: Any
    ) -> str:
        made = b.op(kind, b(x), b(y), b(weight), b(bias) if bias is not None else None, domain=MS, outputs=4, epsilon=eps)
        self.normed[norm] = made[0]
        return made[3]

    # ** rotary embedding **

    def _rope(self, node: Node) -> Emitter | None:
        """x cos + cat(-x[D/2:], x[:D/2]) sin over [B, H, S, D], with cos and sin [B, 1, S, D] that repeat their first half."""
        if not call(node, aten.add.Tensor) or rank_of(node) != 4 or dtype(node) != F32:
            return None
        found = pair(node, aten.add.Tensor, lambda a: _turned(a) is not None)
        if found is None:
            return None
        x, sin = _turned(found[0])  # type: ignore[misc]
        straight = pair(found[1], aten.mul.Tensor, lambda a: a is x)
        if straight is None:
            return None
        cos, sin = _unsqueezed(straight[1]), _unsqueezed(sin)
        if cos is None or sin is None or not (self._repeats(cos) and self._repeats(sin)):
            return None

        def emit(b: Builder, n: Node, *_: Any) -> str:
            val = x.meta["val"]
            heads, width = val.shape[1], val.shape[3]
            caches = [b.op("Slice", self._batched(b, c, x), b.ints(0), b.ints(width // 2), b.ints(2)) for c in (cos, sin)]
            flat = b.op("RotaryEmbedding", self.flatten(b, x), *caches, num_heads=heads, interleaved=0)
            self.flat[n] = flat
            return b.op("Transpose", b.op("Reshape", flat, b.ints(0, 0, heads, width)), perm=[0, 2, 1, 3])

        return emit

    def _batched(self, b: Builder, angles: Node, x: Node) -> str:
        """The operator wants a row of angles per sample."""
        if same(angles.meta["val"].shape[0], x.meta["val"].shape[0]):
            return b(angles)
        return b.op("Expand", b(angles), b.op("Concat", b.dim(x, 0), b.ints(1, 1), axis=0))

    def _repeats(self, angles: Node) -> bool:
        """Does the second half of the last axis repeat the first? Computed at random positions, before any gather of rows."""
        while call(angles, foveate.keep_tokens.default) or call(angles, *CASTS):
            angles = angles.args[0]  # type: ignore[assignment]
        if angles not in self._halves:
            value = _at_random(angles, self.stage)
            half = value.shape[-1] // 2 if value is not None else 0
            self._halves[angles] = value is not None and half * 2 == value.shape[-1] and torch.equal(value[..., :half], value[..., half:])
        return self._halves[angles]

    # ** layouts **

    def flatten(self, b: Builder, x: Node) -> str:
        """A [B, H, S, D] node as [B, S, H D]: what it was before it was split into heads, if that is what happened."""
        if x in self.flat:
            return self.flat[x]
        val = x.meta["val"]
        width = val.shape[1] * val.shape[3]
        source = plain(x)
        if call(source, foveate.kv_store.default):
            return self.flatten(b, source.args[0])
        if source is not x and source in self.flat:
            return self.flat[source]
        if call(source, aten.transpose.int) and {source.args[1] % 4, source.args[2] % 4} == {1, 2}:
            inner = plain(source.args[0])
            if (
                call(inner, aten.view.default, aten.reshape.default)
                and rank(inner.args[0]) == 3
                and same(inner.args[0].meta["val"].shape[2], width)
            ):
                return b(inner.args[0])
            return b.op("Reshape", b(inner), b.ints(0, 0, width))
        return b.op("Reshape", b.op("Transpose", b(x), perm=[0, 2, 1, 3]), b.ints(0, 0, width))

    def _flat_view(self, node: Node) -> Emitter | None:
        """[B, S, H, D] -> [B, S, H D] right after attention: the fused operators give that layout already."""
        if not call(node, aten.view.default, aten.reshape.default, aten.flatten.using_ints) or rank_of(node) != 3:
            return None
        source = plain(node.args[0])
        if not call(source, foveate.attention.default) or source not in self.emitters:
            return None

        def emit(b: Builder, n: Node, x: Node, sizes: Any, *_: Any) -> str:
            return self.context[source] if source in self.context else reshape_to(b, b(x), x.meta["val"], n.meta["val"], sizes)

        return emit

    # ** attention **

    def _attention(self, node: Node) -> Emitter | None:
        if not call(node, foveate.attention.default) or dtype(node) != F32:
            return None
        a = Operands(*node.args)
        if len({int(x.meta["val"].shape[3]) for x in (a.q, a.k, a.v)}) != 1:
            return None
        if self.decode:
            return self._decode_attention(node) if not a.causal and not a.window and a.width % 8 == 0 else None
        if a.causal and a.width % 8 == 0 and _ordered(a.q_pos, a.k_pos) and _prefix_mask(a.mask) and a.square:
            return self._prefill_attention
        if not a.causal and a.mask is None and not a.softcap and a.heads == a.groups:
            return self._free_attention
        return None

    def _prefill_attention(self, b: Builder, n: Node, *operands: Any) -> str:
        """The first rows of an empty cache. Rows beyond a sample's length are padding."""
        a, one = Operands(*operands), b.const([1], torch.int32)
        rows = b.dim(a.mask, 1) if a.mask is not None else b.dim_of(self.flatten(b, a.q), a.q.meta["val"].transpose(1, 2), 1)
        total = b.cast(rows, torch.int64, torch.int32)
        if a.mask is None:
            last = b.op("Expand", b.op("Sub", total, one), b.dim(a.q, 0))
        else:
            last = b.op("Sub", b.op("ReduceSum", b.cast(b(a.mask), torch.bool, torch.int32), b.ints(1), keepdims=0), one)
            last = b.op("Max", last, b.const([0], torch.int32))
        return self._group_query(b, n, a, (a.k, a.v), self._cache(b, a.k, a.v, a.layer), last, total)

    def _cache(self, b: Builder, k: Node, v: Node, layer: int) -> tuple[str | None, str | None]:
        """Inputs for the layer's cache, if what the stage returns for it is exactly this k and v."""
        if self.outputs.get(k) != f"k.{layer}" or self.outputs.get(v) != f"v.{layer}":
            return None, None
        names = []
        for which, node in (("k", k), ("v", v)):
            val = node.meta["val"]
            names.append(f"past_{which}.{layer}")
            b.extra_inputs.append((names[-1], val, ["B", int(val.shape[1]), f"C{layer}", int(val.shape[3])]))
        return names[0], names[1]

    def _decode_attention(self, node: Node) -> Emitter | None:
        """attention(q, kv_append(past_k, k), kv_append(past_v, v), kv_mask(past_k, lengths, row)) with k and v returned as the new rows."""
        _, keys, values, mask, *_ = node.args
        layer = node.args[-1]
        if not (call(keys, foveate.kv_append.default) and call(values, foveate.kv_append.default) and call(mask, foveate.kv_mask.default)):
            return None
        if (
            keys.args[0] is not mask.args[0]
            or any(a.args[0].op != "placeholder" for a in (keys, values))
            or mask.args[1].op != "placeholder"
        ):
            return None
        stored = [self.stage.output_nodes.get(f"{w}.{layer}") for w in "kv"]
        if not all(
            s is not None and plain(behind_store(s)) is plain(behind_store(a.args[1]))
            for s, a in zip(stored, (keys, values), strict=True)
        ):
            return None

        def emit(b: Builder, n: Node, *operands: Any) -> str:
            a = Operands(*operands)
            lengths = b.op("Cast", b(a.mask.args[1]), to=6)  # int32[L, B], once
            last = b.op("Gather", lengths, b.const(self.row(a.mask.args[2]), torch.int64), axis=0)
            total = b.op("Add", b.op("ReduceMax", last, b.ints(0), keepdims=1), b.const([1], torch.int32))
            past = (b(a.k.args[0]), b(a.v.args[0]))
            return self._group_query(b, n, a, (a.k.args[1], a.v.args[1]), past, last, total)

        return emit

    def row(self, row: int) -> int:
        """The row of `lengths` to read for a layer: the first of its segment, so that equal lengths are read once."""
        return self.rows[row] if self.rows else row

    def _group_query(
        self, b: Builder, n: Node, a: Operands, new: tuple[Node, Node], past: tuple[str | None, str | None], last: str, total: str
    ) -> str:
        """new: the rows that are not in the cache yet; last: index of every sample's last row; total: rows in the longest sample."""
        y, keys, values = b.op(
            "GroupQueryAttention",
            self.flatten(b, a.q),
            *[self.flatten(b, x) for x in new],
            *past,
            last,
            total,
            domain=MS,
            outputs=3,
            num_heads=a.heads,
            kv_num_heads=a.groups,
            scale=a.scale,
            local_window_size=a.window or None,
            softcap=a.softcap or None,
        )
        if past[0] is not None:
            dims = ["B", a.groups, f"{'P' if self.decode else 'C'}{a.layer}", a.width]
            b.replaced[f"k.{a.layer}"], b.replaced[f"v.{a.layer}"] = (keys, dims), (values, dims)
            self.in_place += [f"k.{a.layer}", f"v.{a.layer}"]
        return self._put(b, n, y, a)

    def _free_attention(self, b: Builder, n: Node, *operands: Any) -> str:
        a = Operands(*operands)
        flat = [self.flatten(b, x) for x in (a.q, a.k, a.v)]
        return self._put(b, n, b.op("MultiHeadAttention", *flat, domain=MS, num_heads=a.heads, scale=a.scale), a)

    def _rows(self, node: Node) -> Emitter | None:
        """A few rows: G times the arithmetic of a product per head, and one pass over the keys."""
        if not call(node, foveate.attention_rows.default):
            return None
        q, k, _, rows = node.args[0].meta["val"], node.args[1].meta["val"], node.args[2], node.args[3].meta["val"]
        few = isinstance(rows.shape[1], int) and rows.shape[1] <= FEW
        return self._flat_rows if few and q.dtype == k.dtype == F32 else None

    def _flat_rows(
        self, b: Builder, n: Node, q: Node, k: Node, mask: Node | None, rows: Node, scale: float, causal: bool, softcap: float
    ) -> str:
        heads, groups, width = (int(s) for s in (q.meta["val"].shape[1], k.meta["val"].shape[1], q.meta["val"].shape[3]))
        count = int(rows.meta["val"].shape[1])
        picked = b.op("GatherND", self.flatten(b, q), b.op("Unsqueeze", b(rows), b.ints(-1)), batch_dims=1)  # [B, R, H D]
        if groups > 1:
            block = torch.zeros(heads, groups, 1)  # head h reads keys of group h G / H
            block[torch.arange(heads), torch.arange(heads) * groups // heads] = 1
            picked = b.op("Mul", b.op("Reshape", picked, b.ints(0, count * heads, 1, width)), b.const(block.repeat(count, 1, 1)))
        picked = b.op("Reshape", picked, b.ints(0, count * heads, groups * width))
        product = b.op("FusedMatMul", self.flatten(b, k), picked, domain=MS, transB=1, alpha=scale)  # [B, T, R H]
        turned = b.op("Transpose", product, perm=[0, 2, 1])
        if count == 1:
            logits = b.op("Unsqueeze", turned, b.ints(2))
        else:
            logits = b.op("Transpose", b.op("Reshape", turned, b.ints(0, count, heads, -1)), perm=[0, 2, 1, 3])
        slots = places(b, self.flatten(b, k), k.meta["val"].transpose(1, 2), 1)
        return masked_softmax(b, logits, slots, mask, rows, causal, softcap)

    def _put(self, b: Builder, n: Node, y: str, a: Operands) -> str:
        self.context[n] = y
        return b.op("Reshape", y, b.ints(0, 0, a.heads, a.width))

    # ** the rest **

    def _gelu(self, node: Node) -> Emitter | None:
        if call(node, aten.silu.default) and dtype(node) == F32:
            return lambda b, n, x: b.op("QuickGelu", b(x), domain=MS, alpha=1.0)
        if not call(node, aten.mul.Tensor) or dtype_of(node) != F32:
            return None
        found = pair(node, aten.mul.Tensor, lambda a: call(a, aten.sigmoid.default))
        if found is None:
            return None
        gate, x = plain(found[0].args[0]), found[1]
        if call(gate, aten.mul.Tensor) and plain(gate.args[0]) is x and isinstance(gate.args[1], float):
            return lambda b, n, *_: b.op("QuickGelu", b(x), domain=MS, alpha=gate.args[1])
        return None

    def _linear(self, node: Node) -> Emitter | None:
        """A bias goes into the product."""
        if not call(node, aten.linear.default) or dtype(node) != F32 or len(node.args) < 3 or node.args[2] is None or rank(node) != 3:
            return None
        if not _parameter(node.args[1]):
            return None

        def emit(b: Builder, n: Node, x: Node, weight: Node, bias: Node) -> str:
            columns, width = (int(s) for s in weight.meta["val"].shape)
            raw = b.alias[str(weight.target)] in b.read_raw
            matrix = b(weight) if raw else b.weight(str(weight.target), transpose=True)
            flat = b.op("Gemm", b.op("Reshape", b(x), b.ints(-1, width)), matrix, b(bias), transB=int(raw))
            return self._unflatten(b, flat, x, n, columns)

        return emit

    def _unflatten(self, b: Builder, flat: str, x: Node, n: Node, columns: int) -> str:
        shape = n.meta["val"].shape
        fixed = [s if isinstance(s, int) else -1 for s in shape[:2]]
        if fixed.count(-1) < 2:
            return b.op("Reshape", flat, b.ints(*fixed, columns))
        return b.op("Reshape", flat, b.op("Concat", b.op("Shape", b(x), start=0, end=2), b.ints(columns), axis=0))


def dtype_of(node: Node) -> torch.dtype | None:
    val = node.meta.get("val")
    return val.dtype if isinstance(val, Tensor) else None


def rank_of(node: Node) -> int:
    val = node.meta.get("val")
    return val.dim() if isinstance(val, Tensor) else -1


def _parameter(node: Any) -> bool:
    return isinstance(node, Node) and node.op == "get_attr"


def behind_store(node: Node) -> Any:
    return node.args[0] if call(node, foveate.kv_store.default) else node


def _prefix_mask(mask: Any) -> bool:
    return mask is None or (rank_of(mask) == 2 and dtype(mask) == torch.bool)


def _ordered(q_pos: Any, k_pos: Any) -> bool:
    """No positions, or those of an uncut sequence, max(cumsum(valid) - 1, 0): with padding on the right they are the indices of the
    valid rows."""
    if q_pos is None and k_pos is None:
        return True
    top = plain(q_pos)
    if q_pos is not k_pos or not call(top, aten.clamp.default) or not call(plain(top.args[0]), aten.sub.Tensor):
        return False
    return call(plain(plain(top.args[0]).args[0]), aten.cumsum.default)


def _rms_core(node: Any) -> tuple[Node, float] | None:
    """x * rsqrt(mean(x^2, -1) + eps) -> (x, eps)"""
    found = pair(node, aten.mul.Tensor, lambda a: call(a, aten.rsqrt.default)) if call(node, aten.mul.Tensor) else None
    if found is None:
        return None
    root, x = found
    total = plain(root.args[0])
    if not call(total, aten.add.Tensor) or not isinstance(total.args[1], float):
        return None
    mean = plain(total.args[0])
    if not call(mean, aten.mean.dim) or list(mean.args[1]) not in ([-1], [rank(x) - 1]) or len(mean.args) < 3 or not mean.args[2]:
        return None
    power = plain(mean.args[0])
    squared = (
        (call(power, aten.pow.Tensor_Scalar) and power.args[1] == 2 and plain(power.args[0]) is x)
        or (call(power, aten.mul.Tensor) and plain(power.args[0]) is x and plain(power.args[1]) is x)
        or (call(power, aten.square.default) and plain(power.args[0]) is x)
    )
    return (x, total.args[1]) if squared else None


def _turned(node: Any) -> tuple[Node, Node] | None:
    """cat(-x[..., D/2:], x[..., :D/2]) * sin -> (x, sin)"""
    if not call(node, aten.mul.Tensor):
        return None
    found = pair(node, aten.mul.Tensor, lambda a: call(a, aten.cat.default) and rank(a) == 4)
    if found is None:
        return None
    cat, sin = found
    parts = cat.args[0]
    if len(parts) != 2 or not call(parts[0], aten.neg.default) or (cat.args[1] if len(cat.args) > 1 else 0) not in (-1, 3):
        return None
    high, low = parts[0].args[0], parts[1]
    if not (call(high, aten.slice.Tensor) and call(low, aten.slice.Tensor)) or high.args[0] is not low.args[0]:
        return None
    x, half = high.args[0], int(high.args[0].meta["val"].shape[3]) // 2
    right = high.args[1] in (-1, 3) and high.args[2] == half and (len(high.args) < 4 or high.args[3] >= 2 * half)
    left = low.args[1] in (-1, 3) and low.args[2] in (0, None) and low.args[3] == half
    return (plain(x), sin) if left and right else None


def _unsqueezed(node: Any) -> Node | None:
    """[B, 1, S, D] made of [B, S, D] -> the latter."""
    node = plain(node)
    if call(node, aten.unsqueeze.default) and node.args[1] in (1, -3) and rank(node.args[0]) == 3:
        return node.args[0]
    return None


def _at_random(node: Node, stage: Stage) -> Tensor | None:
    """The value of a small subgraph of the position inputs at random positions; None if it needs anything else."""
    inside: set[Node] = set()
    todo = [node]
    while todo:
        at = todo.pop()
        if at not in inside:
            inside.add(at)
            todo += at.all_input_nodes
    if len(inside) > 200:
        return None
    values: dict[Node, Any] = {}
    for at in stage.graph.nodes:
        if at not in inside:
            continue
        if at.op == "placeholder":
            name, val = at.meta.get("name", at.name), at.meta["val"]
            if val.dtype.is_floating_point or (
                "position" not in name and any(u in inside and u.target is not aten.sym_size.int for u in at.users)
            ):
                return None
            values[at] = torch.randint(
                0, 999, [s if isinstance(s, int) else 5 for s in val.shape], generator=torch.Generator().manual_seed(0)
            )
        elif at.op == "get_attr":
            value: Any = stage.module
            for part in str(at.target).split("."):
                value = getattr(value, part)
            values[at] = value.detach().cpu()
        else:
            args, kwargs = torch.fx.node.map_arg((at.args, at.kwargs), lambda n: values[n])
            values[at] = at.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]
