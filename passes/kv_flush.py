"""The flush: a small stage of its own, run now and then outside the token loop, that stores the oldest appended rows in other partitions.

    in:   past_k.l, past_v.l [B, G, R, D]       the R oldest appended rows, float
          past_k.l.<p>.<state> ...              scales, centres and balances that belong to whole channels: the prompt's, they stay
          q.l [B, H, 1, D]                      where there is more than one partition to go to: the query of the step before
    out:  k.l.<p>, v.l.<p> [B, G, R_p, D], and the states that the rows bring; they go behind the partition's valid rows

A row is quantized once, when it leaves the appended partition.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from ..graph.kv_format import KVFormat, Partition
from ..graph.program import KVLayer, Program
from ..graph.stage import from_exported
from . import kv_codecs
from .kv_rows import give

F = torch.ops.foveate
SAMPLES = 2  # of the trace


def add_flush(program: Program) -> None:
    """Build the stage from the formats in the KV table; without a format that flushes there is none. Decode returns q.l where it is asked for."""
    entries = [e for e in program.kv if e.format is not None and e.format.residual]
    if not entries:
        return
    named = {e.layer: _inputs(program, e) for e in entries}
    names = [n for inputs in named.values() for n in inputs]
    outputs = [n for e in entries for n in _outputs(e)]
    values = [t for inputs in named.values() for t in inputs.values()]
    module = _Flush(entries, [len(inputs) for inputs in named.values()])
    exported = torch.export.export(module, (values,), dynamic_shapes=([{0: Dim("batch", min=1, max=4096)}] * len(values),), strict=False)
    program.stages["flush"] = from_exported(exported, names, outputs)


class _Flush(nn.Module):
    def __init__(self, entries: list[KVLayer], counts: list[int]) -> None:
        super().__init__()
        self.entries, self.counts = entries, counts

    def forward(self, values: list[Tensor]) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        at = 0
        for entry, count in zip(self.entries, self.counts, strict=True):
            read = dict(zip(_names(entry), values[at : at + count], strict=True))
            found += _moved(entry, read)
            at += count
        return tuple(found)


def _moved(entry: KVLayer, read: dict[str, Tensor]) -> list[Tensor]:
    form, l = _format(entry), entry.layer
    k, v = read[f"past_k.{l}"], read[f"past_v.{l}"]
    groups = [(k, v)]
    if len(form.flush) > 1:
        groups = _ranked(k, v, read[f"q.{l}"], [rows for _, rows in form.flush])
    found = []
    for (name, _), pair in zip(form.flush, groups, strict=True):
        part = next(p for p in form.partitions if p.name == name)
        for which, x in zip("kv", pair, strict=True):
            known = {s: read[f"past_{which}.{l}.{name}.{s}"] for s in _frozen(part, which)}
            state = tuple(known.get(s) for s in part.states(which))
            if brought := _brought(part, which):
                valid = torch.ones_like(x[:, 0, :, 0], dtype=torch.bool)
                state = kv_codecs.states(x, valid, part, which, 1.0, known.get("balance"))
            found += [kv_codecs.encode(x, state, part, which), *state[: len(brought)]]
    return found


def _ranked(k: Tensor, v: Tensor, q: Tensor, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    """The rows by what the newest query gives them among themselves, all heads together; the first partition gets the most looked at."""
    D = k.shape[3]
    logits = q.float().unflatten(1, (k.shape[1], -1)).squeeze(3) @ k.float().transpose(2, 3)
    order = (logits / D**0.5).softmax(-1).sum((1, 2)).sort(dim=1, descending=True, stable=True).indices
    groups, at = [], 0
    for size in sizes:
        index = order[:, at : at + size].sort(dim=1).values
        groups.append(tuple(F.keep_tokens(x.transpose(1, 2), index).transpose(1, 2).contiguous() for x in (k, v)))
        at += size
    return groups


def _frozen(part: Partition, which: str) -> tuple[str, ...]:
    """States that belong to whole channels."""
    return tuple(s for s in part.states(which) if s == "balance" or part.per(which) == "channel")


def _brought(part: Partition, which: str) -> tuple[str, ...]:
    """States that rows bring with them."""
    return tuple(s for s in part.states(which) if s not in _frozen(part, which))


def _format(entry: KVLayer) -> KVFormat:
    assert entry.format is not None
    return entry.format


def _names(entry: KVLayer) -> list[str]:
    form, l = _format(entry), entry.layer
    parts = [p for p in form.partitions if p.name in dict(form.flush)]
    states = [f"past_{which}.{l}.{p.name}.{s}" for p in parts for which in "kv" for s in _frozen(p, which)]
    return [f"past_k.{l}", f"past_v.{l}", *states, *([f"q.{l}"] if len(form.flush) > 1 else [])]


def _outputs(entry: KVLayer) -> list[str]:
    form = _format(entry)
    parts = {p.name: p for p in form.partitions}
    return [f"{which}.{entry.layer}.{name}{suffix}" for name, _ in form.flush for which in "kv"
            for suffix in ("", *(f".{s}" for s in _brought(parts[name], which)))]


def _inputs(program: Program, entry: KVLayer) -> dict[str, Tensor]:
    """Examples of the inputs, in the types of the decode stage."""
    form, stage = _format(entry), program["decode"]
    found: dict[str, Any] = {}
    for name in _names(entry):
        if name.startswith("q."):
            continue
        like = stage.placeholder(name).meta["val"]
        rows = form.residual if name in (f"past_k.{entry.layer}", f"past_v.{entry.layer}") else 1
        found[name] = torch.ones((SAMPLES, int(like.shape[1]), rows, int(like.shape[3])), dtype=like.dtype)
    if len(form.flush) > 1:
        query = _query(program, entry)
        like = query.meta["val"]
        found[f"q.{entry.layer}"] = torch.ones((SAMPLES, *(int(size) for size in like.shape[1:])), dtype=like.dtype)
        give(stage, f"q.{entry.layer}", query)
        stage.module.recompile()
    return found


def _query(program: Program, entry: KVLayer) -> Any:
    attentions = [n for n in program["decode"].graph.nodes if n.target is F.attention.default]
    return next(n.args[0] for n in attentions if n.args[10] == entry.layer)
