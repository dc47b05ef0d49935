"""The KV table, read off the prefill graph: one line per cached layer, lengths as expressions in B, S, N."""

import re
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch.fx import Node

from .program import KVLayer, Program, Stage


def symbols(stage: Stage) -> dict[Any, str]:
    """sympy symbol -> the contract's letter, for the symbols that are a whole axis of an input (others keep their own name)."""
    axes = {"input_ids": ("B", "S"), "image_features": ("B", "N"), "pixel_values": ("images",), "context_ids": ("B", "C")}
    found: dict[Any, str] = {}
    for node in stage.graph.nodes:
        if node.op != "placeholder":
            continue
        name = node.meta.get("name", node.name)
        letters = axes.get(name) or (("B", "G", past_symbol(name)) if name.startswith("past_k.") else ())
        for letter, size in zip(letters, node.meta["val"].shape, strict=False):
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                found.setdefault(size.node.expr, letter)
    return found


def past_symbol(name: str) -> str:
    """The letter of the rows of past_k.<l> or past_k.<l>.<partition>: P0, P0_lo."""
    return "P" + "_".join(part for part in name.split(".")[1:3] if part not in ("scale", "center"))


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
        if not re.fullmatch(r"k\.\d+", name):
            continue
        layer = int(name[2:])
        k, v = outputs[name].meta["val"], outputs[f"v.{layer}"].meta["val"]
        length = expression(k.shape[2], names)
        base = old.get(layer) or KVLayer(layer, 0, 0, 0)
        form = base.format and replace(base.format, partitions=tuple(
            replace(p, rows=expression(outputs[f"k.{layer}{p.suffix()}"].meta["val"].shape[2], names)) for p in base.format.partitions))
        table.append(replace(base, format=form, heads=int(k.shape[1]), head_dim=int(k.shape[3]), value_dim=int(v.shape[3]), length=length,
                             segment=segments.setdefault(f"{length}|{_mask_of(outputs[name])}", len(segments))))
    return table


def _mask_of(store: Node) -> str:
    """The mask that the layer attends with: two layers hold the same tokens when it is the same node. What a KV pass stores says it itself."""
    if "held" in store.meta:
        return str(store.meta["held"])
    attention = next((u for u in store.users if u.target is torch.ops.foveate.attention.default), None)
    mask = attention.args[3] if attention else None
    return mask.name if isinstance(mask, Node) else "none"
