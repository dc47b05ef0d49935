"""The KV table, read off the prefill graph: one line per cached layer, lengths as expressions in B, S, N."""

from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from .program import KVLayer, Program, Stage


def symbols(stage: Stage) -> dict[Any, str]:
    """sympy symbol -> the contract's letter, for the symbols that are a whole axis of an input (others keep their own name)."""
    axes = {"input_ids": ("B", "S"), "image_features": ("B", "N"), "pixel_values": ("images",)}
    found: dict[Any, str] = {}
    for node in stage.graph.nodes:
        if node.op != "placeholder":
            continue
        name = node.meta.get("name", node.name)
        letters = axes.get(name) or (("B", "G", f"P{name.split('.')[1]}") if name.startswith("past_k.") else ())
        for letter, size in zip(letters, node.meta["val"].shape, strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, letter)
    return found


def expression(size: Any, names: dict[Any, str]) -> str:
    """An int or SymInt as text in the contract's letters: `S - N + 64`."""
    if not isinstance(size, torch.SymInt):
        return str(size)
    return str(size.node.expr.subs({s: sympy.Symbol(n, integer=True, positive=True) for s, n in names.items()}))


def derive_kv(program: Program) -> list[KVLayer]:
    """The table as the prefill's outputs have it now; formats and windows are kept from the old table."""
    stage = program["prefill"]
    outputs, names = stage.output_nodes, symbols(stage)
    old = {entry.layer: entry for entry in program.kv}
    table: list[KVLayer] = []
    segments: dict[str, int] = {}
    for name in stage.outputs:
        if not name.startswith("k."):
            continue
        layer = int(name[2:])
        k, v = outputs[name].meta["val"], outputs[f"v.{layer}"].meta["val"]
        length = expression(k.shape[2], names)
        base = old.get(layer) or KVLayer(layer, 0, 0, 0)
        table.append(replace(base, heads=int(k.shape[1]), head_dim=int(k.shape[3]), value_dim=int(v.shape[3]), length=length,
                             segment=segments.setdefault(f"{length}|{_mask_of(outputs[name])}", len(segments))))
    return table


def _mask_of(store: Node) -> str:
    """The mask that the layer attends with: two layers hold the same tokens when it is the same node."""
    attention = next((u for u in store.users if u.target is torch.ops.foveate.attention.default), None)
    mask = attention.args[3] if attention else None
    return mask.name if isinstance(mask, Node) else "none"
