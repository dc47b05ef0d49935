"""Decode attention over a quantized cache as one call of the fused kernel, in a stage that torch runs.

    fuse(module)    attention(q, keys and values made of partitions, a mask of lengths)  ->  kv_attention(q, codes, scales, lengths, new row)

What the kernel cannot say stays as it is: windows, balanced channels, codes other than int, and attention over anything else than a cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

aten, foveate = torch.ops.aten, torch.ops.foveate
ATTENTION, APPEND, DEQUANTIZE = foveate.attention.default, foveate.kv_append.default, foveate.dequantize_kv.default
MASKS = (foveate.kv_mask.default, foveate.kv_held.default)


@dataclass(frozen=True)
class Rows:
    """What keys or values are made of: (codes, scale, centre, block) per partition, and the new row."""

    parts: tuple[tuple[Node, Node | None, Node | None, int], ...]
    new: Node | None = None


def fuse(module: GraphModule) -> int:
    """In place; returns how many layers were fused."""
    count = 0
    for node in [n for n in module.graph.nodes if n.op == "call_function" and n.target is ATTENTION]:
        arguments = _arguments(node)
        if arguments is not None:
            with module.graph.inserting_before(node):
                step = module.graph.call_function(attend_step, arguments)
            node.replace_all_uses_with(step)
            module.graph.erase_node(node)
            count += 1
    module.graph.eliminate_dead_code()
    module.recompile()
    return count


def attend_step(q: Tensor, codes: list[Tensor], states: list[Tensor | None], lengths: list[tuple[Tensor, int]], new: list[Tensor], blocks: list[int],
                scale: float, softcap: float) -> Tensor:
    """q[B, H, 1, D]; codes int8 or rows of floats; lengths: (lengths[layers, B], row) per partition  ->  y[B, 1, H, D]"""
    none = torch.empty(0, device=q.device)
    valid = torch.stack([table[row] for table, row in lengths])
    bits = [8 if codes[2 * i].dtype == torch.int8 else 0 for i in range(len(lengths))]
    scales = [none if s is None else s for s in states]
    y = foveate_kernels().kv_attention(q[:, :, 0], codes, scales, valid, [t.to(q.dtype) for t in new], bits, blocks, scale, softcap)
    return y[:, None]


def foveate_kernels() -> Any:
    from . import kv_attention  # noqa: F401  (registers the op)

    return torch.ops.foveate_kernels


def _arguments(node: Node) -> tuple[Any, ...] | None:
    q, keys, values, mask, q_pos, k_pos, scale, causal, window, softcap, _layer = node.args
    k, v, lengths = _rows(keys), _rows(values), _lengths(mask)
    if k is None or v is None or lengths is None or causal or window or q_pos is not None or k_pos is not None or k.new is None or v.new is None:
        return None
    if len(k.parts) != len(v.parts) or any(part[0] not in lengths for part in k.parts):
        return None
    both = [side for pair in zip(k.parts, v.parts, strict=True) for side in pair]
    states = [state for _, scale_, center, _ in both for state in (scale_, center)]
    blocks = [block for *_, block in both]
    return q, [p[0] for p in both], states, [lengths[part[0]] for part in k.parts], [k.new, v.new], blocks, scale, softcap


def _rows(node: Any) -> Rows | None:
    if not isinstance(node, Node):
        return None
    if node.target in (aten.to.dtype, aten.clamp.default):  # of a graph that was narrowed
        return _rows(node.args[0])
    if node.target is APPEND:
        past = _rows(node.args[0])
        return None if past is None else replace(past, new=node.args[1])
    if node.target is aten.cat.default and node.args[1:] in ((2,), (-2,)):
        found = [_rows(part) for part in node.args[0]]
        if any(part is None for part in found):
            return None
        new = [part.new for part in found if part.new is not None]
        return Rows(tuple(p for part in found for p in part.parts), new[0]) if len(new) == 1 else None
    if node.target is DEQUANTIZE:
        codes, scale, center, block = node.args
        return Rows(((codes, scale, center, block),))
    return Rows(((node, None, None, 0),)) if node.op == "placeholder" else None


def _lengths(mask: Any) -> dict[Node, tuple[Node, int]] | None:
    """A past's keys -> (its lengths, the row to read)."""
    if not isinstance(mask, Node):
        return None
    if mask.target is aten.cat.default:
        found = [_lengths(part) for part in mask.args[0]]
        return None if any(part is None for part in found) else {k: v for part in found for k, v in part.items()}
    return {mask.args[0]: (mask.args[1], mask.args[2])} if mask.target in MASKS else None
