"""The one check that runs after every pass: lint, types, token axes, KV table."""

import re

import torch
from torch.fx import Node

from .errors import GraphError
from .kv_table import derive_kv
from .program import Program, Stage
from .sites import layer_of, same

ATTENTION = torch.ops.foveate.attention.default


def verify(program: Program) -> None:
    """Raise a GraphError at the first thing that does not hold.

    1. Every stage lints, every node is typed, and every output exists.
    2. In every attention, keys and values are equally long, and a mask fits them.
    3. Behind the entry of a layer, nothing reads a token axis of another length than the layer's own (prefill).
    4. The KV table says what the prefill returns, and the decode stage takes one past per line of it.
    """
    for name, stage in program.stages.items():
        _typed(name, stage)
        for node in stage.graph.nodes:
            if node.target is ATTENTION:
                _attention_fits(name, node)
    if "prefill" in program.stages:
        _one_length_per_layer(program)
        _kv_table(program)


def _typed(name: str, stage: Stage) -> None:
    try:
        stage.graph.lint()
    except Exception as cause:
        raise GraphError(f"verify: {name} does not lint: {cause}") from cause
    for node in stage.graph.nodes:
        if node.op != "output" and "val" not in node.meta:
            raise GraphError(f"verify: {name}: {node.format_node()} has no type; call retype after an edit")
    values = next(n for n in reversed(stage.graph.nodes) if n.op == "output").args[0]
    if len(values) != len(stage.outputs) or len(set(stage.outputs)) != len(stage.outputs):
        raise GraphError(f"verify: {name} returns {len(values)} values under the names {stage.outputs}")


def _attention_fits(name: str, node: Node) -> None:
    q, k, v, mask = (a.meta["val"] if isinstance(a, Node) else None for a in node.args[:4])
    if not same(k.shape[2], v.shape[2]):
        raise GraphError(f"verify: {name}: {node.name} has keys of length {k.shape[2]} and values of length {v.shape[2]}")
    if mask is not None and not same(mask.shape[-1], k.shape[2]):
        raise GraphError(f"verify: {name}: the mask of {node.name} covers {mask.shape[-1]} keys of {k.shape[2]}")
    if q.shape[1] % k.shape[1]:
        raise GraphError(f"verify: {name}: {node.name} has {q.shape[1]} query heads over {k.shape[1]} key heads")


def _one_length_per_layer(program: Program) -> None:
    stage, pattern = program["prefill"], re.compile(program.facts.layer_path)
    length: dict[int, tuple[Node, object]] = {}
    for node in stage.graph.nodes:
        layer = layer_of(node, pattern)
        if layer is None or node.target is not ATTENTION:
            continue
        known = length.setdefault(layer, (node, node.meta["val"].shape[1]))
        if not same(known[1], node.meta["val"].shape[1]):
            raise GraphError(f"verify: layer {layer} attends with {known[1]} queries in {known[0].name} and {node.meta['val'].shape[1]} in {node.name}")


def _kv_table(program: Program) -> None:
    found = derive_kv(program)
    if [(e.layer, e.length) for e in found] != [(e.layer, e.length) for e in program.kv]:
        raise GraphError(f"verify: the KV table says {[(e.layer, e.length) for e in program.kv]}, the prefill returns {[(e.layer, e.length) for e in found]}")
    if "decode" in program.stages:
        names = set(program["decode"].inputs)
        missing = [f"past_k.{e.layer}" for e in program.kv if f"past_k.{e.layer}" not in names]
        if missing:
            raise GraphError(f"verify: decode lacks {missing}")
