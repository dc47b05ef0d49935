"""Codes: how rows become codes and codes rows. One entry per code of graph/kv_format.py."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..graph.kv_format import BITS, Partition

F = torch.ops.foveate
Code = Literal["float", "int8", "int4", "int2", "fp8", "sign", "fsq4"]
MARGIN = {"int8": 5.0, "fp8": 5.0, "int4": 1.4}  # of a prompt's range, where later rows are stored in it too; `val` of the testbed (docs/kv.md)
SPAN = {"int2": 0.8}  # of a prompt's range, where nothing else is: four levels do better without the extremes
TINY = 1e-3  # in float16 too, its inverse is a number
LEVELS = 15  # of fsq4
WIDE = 2.0  # fsq4: scale over mean |x - center|; atanh(14 / 15) of it, 3.4 mean deviations, is the last level


def states(x: Tensor, valid: Tensor, part: Partition, which: str, margin: float, balance: Tensor | None = None) -> tuple[Tensor, ...]:
    """x[B, G, T, D], valid[B, T]  ->  (scale[, center][, balance]), as the partition stores them"""
    if which in part.balanced:
        x = x / balance
    bits = 1 if part.code == "fsq4" else BITS[part.code]  # one bit: scale = mean |x - center|
    scale, center = F.kv_scale(x, valid, bits, part.per(which), part.centred, margin)
    scale = scale * (127 / 448) if part.code == "fp8" else scale * WIDE if part.code == "fsq4" else scale
    return scale, *([center] if part.centred else []), *([balance] if which in part.balanced else [])


def widen(code: str, grows: bool, margin: float | None) -> float:
    """How much wider than the prompt's range a range per channel is made. grows: later rows come to be stored in it; margin: given instead."""
    if not grows:
        return SPAN.get(code, 1.0)
    return MARGIN.get(code, 1.0) if margin is None else margin


def balance(x: Tensor, valid: Tensor, q: Tensor | None) -> Tensor:
    """x[B, G, T, D], valid[B, T], q[B, H, S, D] or None  ->  w[B, G, 1, D] = sqrt(max_t |x| / max_t |q|); without queries sqrt(max_t |x|)"""
    most = torch.where(valid[:, None, :, None], x.float().abs(), 0).amax(2, keepdim=True).clamp(min=TINY)
    if q is not None:  # heads that share a key head are its group
        most = most / q.float().abs().amax(2, keepdim=True).unflatten(1, (x.shape[1], -1)).amax(2).clamp(min=TINY)
    return most.sqrt().clamp(min=TINY).to(x.dtype)


def encode(x: Tensor, state: tuple[Tensor, ...], part: Partition, which: str) -> Tensor:
    """x[B, G, T, D]  ->  codes int8[B, G, T, D]"""
    x = x / state[-1] if which in part.balanced else x
    scale, center, block = state[0], state[1] if part.centred else None, part.block(which)
    if part.code == "fp8":
        return F.quantize_fp8(x, scale, block)
    if part.code == "fsq4":
        return F.quantize_fsq(x, scale, center, LEVELS, block)
    return F.quantize_kv(x, scale, center, BITS[part.code], block)


def decode(codes: Tensor, state: tuple[Tensor, ...], part: Partition, which: str, dtype: torch.dtype) -> Tensor:
    """codes[B, G, T, D]  ->  x[B, G, T, D]"""
    if part.code == "float":
        return codes
    scale, center, block = state[0], state[1] if part.centred else None, part.block(which)
    if part.code == "fp8":
        x = F.dequantize_fp8(codes, scale, block)
    elif part.code == "fsq4":
        x = F.dequantize_fsq(codes, scale, center, LEVELS, block)
    else:
        x = F.dequantize_kv(codes, scale, center, block)
    return (x * state[-1] if which in part.balanced else x).to(dtype)
