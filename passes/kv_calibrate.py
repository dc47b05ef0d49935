"""Ranges of keys and values over a calibration set, for scales that do not depend on the prompt.

    ranges = calibrate(program, feeds)      feeds: what `Session.encode(samples).batch.feeds` gives, one dict of arrays per batch
    save(ranges, "ranges.safetensors")      then kv-int8{scales: ranges.safetensors}
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..graph.program import KVLayer, Program
from .base import PassError

Ranges = dict[str, Tensor]  # k.<l>.min, k.<l>.max, v.<l>.min, v.<l>.max: [G, D]


@torch.no_grad()
def calibrate(program: Program, feeds: Iterable[Mapping[str, Any]]) -> Ranges:
    """Smallest and largest key and value per layer, head and channel, over the valid rows of all prompts. The program has no format yet."""
    if stored := [e.layer for e in program.kv if e.format is not None]:
        raise PassError(f"calibrate: layers {stored} are stored in a format already; calibrate the program before its KV pass")
    stage, found, batches = program["prefill"], dict[str, Tensor](), 0
    for batches, feed in enumerate(feeds, 1):
        missing = [n for n in stage.inputs if n not in feed]
        if missing:
            raise PassError(f"calibrate: batch {batches} lacks {missing}; the prefill takes {stage.inputs}")
        out = stage.run({n: torch.as_tensor(feed[n]) for n in stage.inputs})
        order = (torch.as_tensor(feed["attention_mask"]) == 0).long().argsort(dim=1, stable=True)
        for row, entry in enumerate(program.kv):
            for which in "kv":
                _add(found, f"{which}.{entry.layer}", out[f"{which}.{entry.layer}"], out["kv_lengths"][row], order)
    if not batches:
        raise PassError("calibrate: the calibration set is empty; give at least one batch of prompts")
    return found


def _add(found: Ranges, name: str, x: Tensor, lengths: Tensor, order: Tensor) -> None:
    """x[B, G, T, D]; rows are valid first, except where nothing was gathered and padding stands in front (order[B, T] undoes that)."""
    if order.shape[1] == x.shape[2]:
        x = x.gather(2, order[:, None, :, None].expand(x.shape))
    held = (torch.arange(x.shape[2])[None] < lengths[:, None])[:, None, :, None]
    if not torch.isfinite(torch.where(held, x, 0)).all():
        kind, layer = "keys" if name[0] == "k" else "values", name[2:]
        raise PassError(f"calibrate: the {kind} of layer {layer} hold NaN or infinity; scales cannot come from them")
    low, high = (torch.where(held, x, end).float() for end in (torch.inf, -torch.inf))
    low, high = low.amin((0, 2)), high.amax((0, 2))
    found[f"{name}.min"] = torch.minimum(found.get(f"{name}.min", low), low)
    found[f"{name}.max"] = torch.maximum(found.get(f"{name}.max", high), high)


def save(ranges: Ranges, path: str | Path) -> None:
    save_file({n: t.contiguous() for n, t in ranges.items()}, str(path))


def read(path: str | Path) -> Ranges:
    if not Path(path).is_file():
        raise PassError(f"scales: no file {path}; make it with passes/kv_calibrate.py, or say scales=prompt")
    try:
        return load_file(str(path))
    except Exception as cause:
        raise PassError(f"scales: {path} is not a safetensors file: {cause}") from cause


def of_layer(ranges: Ranges, entry: KVLayer, which: str, path: str) -> tuple[Tensor, Tensor]:
    """The file's min and max [G, D] of a layer, if they are this model's."""
    names = [f"{which}.{entry.layer}.{end}" for end in ("min", "max")]
    if missing := [n for n in names if n not in ranges]:
        layers = sorted({int(n.split(".")[1]) for n in ranges if n.split(".")[1:2] and n.split(".")[1].isdigit()})
        raise PassError(f"scales: {path} lacks {missing} of layer {entry.layer}; it has layers {layers}")
    want = (entry.heads, entry.head_dim if which == "k" else entry.value_dim)
    for name in names:
        if tuple(ranges[name].shape) != want:
            have = tuple(ranges[name].shape)
            raise PassError(f"scales: {path} has {name} of (heads, channels) {have}, this model caches {want} in layer {entry.layer}; "
                            "they were calibrated on another model")
    low, high = (ranges[n].float() for n in names)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()) or bool((low > high).any()):
        raise PassError(f"scales: {path} has no ordered finite ranges for {names[0][:-4]}; calibrate again")
    return low, high
