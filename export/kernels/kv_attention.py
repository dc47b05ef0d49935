"""One decode step of attention over a quantized cache, without ever writing the cache back in floating point.

    attend(q, partitions, lengths, new)     through the torch op `foveate_kernels::kv_attention`: Triton on CUDA (split-KV, two passes), the
                                            reference elsewhere; with TRITON_INTERPRET=1 Triton's interpreter on a CPU
    reference(...)                          the same in plain torch

A cache is any number of partitions; their order is nothing to attention, keys being stored behind RoPE. A partition is codes of keys and values
[B, G, T, D] with any strides but a dense last axis: head-major and token-major are alike. Codes are int8, float8 or plain floats; of 4 and 2 bits
they share bytes, [B, G, T, D bits / 8], as `pack_kv` of the dialect packs them. Scales and centres are those of graph/kv_format.py: per channel
[B, G, 1, D], per token [B, G, T, 1], per group of n channels [B, G, T, D / n], per block of n tokens [B, G, ceil(T / n), D].
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...graph.ops.quantize_kv import spread
from ..errors import LowerError

NONE, CHANNEL, TOKEN, GROUP = range(4)  # as in _kv_triton, which needs Triton to be read
BLOCK_T = 64  # rows that a program reads at a time
PIECES_PER_CORE = 4  # programs that a multiprocessor should get at least, to hide latencies


@dataclass(frozen=True)
class Partition:
    """Rows of one format. bits: 0 for floats, else 2, 4 or 8. k_block, v_block: tokens that share a scale, 0 where it is one or all."""

    k: Tensor
    v: Tensor
    k_scale: Tensor | None = None
    k_center: Tensor | None = None
    v_scale: Tensor | None = None
    v_center: Tensor | None = None
    bits: int = 8
    k_block: int = 0
    v_block: int = 0

    @property
    def nbytes(self) -> int:
        """What a step reads of it: codes, scales and centres."""
        held = (self.k, self.v, self.k_scale, self.k_center, self.v_scale, self.v_center)
        return sum(t.numel() * t.element_size() for t in held if t is not None)


def attend(q: Tensor, parts: Sequence[Partition], lengths: Tensor, new: tuple[Tensor, Tensor] | None = None, scale: float | None = None,
           softcap: float = 0.0) -> Tensor:
    """q[B, H, D], lengths[partitions, B] of valid rows, new rows [B, G, 1, D] as they will be read later  ->  out[B, H, D] in q's type"""
    return torch.ops.foveate_kernels.kv_attention(*flat(q, parts, lengths, new, scale, softcap))


def flat(q: Tensor, parts: Sequence[Partition], lengths: Tensor, new: tuple[Tensor, Tensor] | None, scale: float | None, softcap: float) -> tuple[Any, ...]:
    """The op's arguments: [k, v], [k scale, k centre, v scale, v centre] (empty where there is none) and [k block, v block] per partition."""
    none = torch.empty(0, device=q.device)
    codes = [t for p in parts for t in (p.k, p.v)]
    scales = [none if t is None else t for p in parts for t in (p.k_scale, p.k_center, p.v_scale, p.v_center)]
    blocks = [n for p in parts for n in (p.k_block, p.v_block)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return q, codes, scales, lengths, list(new or ()), [p.bits for p in parts], blocks, scale, softcap


def per_byte(bits: int) -> int:
    """Codes that share a byte; floats (bits 0) and 8-bit codes have one element each."""
    if bits not in (0, 2, 4, 8):
        raise LowerError(f"kv-attention: {bits} bits; the kernel reads 2, 4 and 8, and floats as 0")
    return 8 // bits if bits else 1


# ** the op **


def reference(q: Tensor, codes: list[Tensor], scales: list[Tensor], lengths: Tensor, new: list[Tensor], bits: list[int], blocks: list[int], scale: float,
              softcap: float) -> Tensor:
    """Dequantize, concatenate, softmax: float32 throughout."""
    keys, values, seen = [], [], []
    for i, b in enumerate(bits):
        ks, kz, vs, vz = scales[4 * i : 4 * i + 4]
        keys.append(_dequantized(codes[2 * i], ks, kz, b, blocks[2 * i], q.shape[2]))
        values.append(_dequantized(codes[2 * i + 1], vs, vz, b, blocks[2 * i + 1], q.shape[2]))
        seen.append(torch.arange(keys[-1].shape[2], device=q.device) < lengths[i][:, None])
    if new:
        keys.append(new[0].float())
        values.append(new[1].float())
        seen.append(torch.ones(q.shape[0], 1, dtype=torch.bool, device=q.device))
    k, v, mask = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(seen, 1)[:, None]
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    logits = torch.einsum("bhd,bhtd->bht", q.float(), k) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    p = logits.masked_fill(~mask, float("-inf")).softmax(-1)
    p = torch.where(mask.any(-1, keepdim=True), p, 0.0)  # a sample that sees nothing
    v = v.masked_fill(~mask[..., None], 0.0)  # rows beyond the length may hold anything
    return torch.einsum("bht,bhtd->bhd", p, v).to(q.dtype)


def _dequantized(codes: Tensor, scale: Tensor, center: Tensor, bits: int, block: int, width: int) -> Tensor:
    x = (torch.ops.foveate.unpack_kv(codes, bits, width) if per_byte(bits) > 1 else codes).float()
    if scale.numel():
        x = x * spread(scale, x, block).float()
    return x + spread(center, x, block).float() if center.numel() else x


def _fake(q: Tensor, codes: list[Tensor], scales: list[Tensor], lengths: Tensor, new: list[Tensor], bits: list[int], blocks: list[int], scale: float,
          softcap: float) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@torch.library.custom_op("foveate_kernels::kv_attention", mutates_args=())
def kv_attention(q: Tensor, codes: list[Tensor], scales: list[Tensor], lengths: Tensor, new: list[Tensor], bits: list[int], blocks: list[int],
                 scale: float, softcap: float) -> Tensor:
    """`attend` over flat lists"""
    check(q, codes, scales, lengths, new, bits, blocks)
    run = launch if q.device.type == "cuda" or interpreted() else reference
    return run(q, codes, scales, lengths, new, bits, blocks, scale, softcap)


kv_attention.register_fake(_fake)


def available() -> str | None:
    """Why the kernels cannot run here; None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed; pip install 'foveate[triton]'"
    if not torch.cuda.is_available() and not interpreted():
        return "torch sees no CUDA device (TRITON_INTERPRET=1, set before Python starts, runs the kernels on a CPU, slowly)"
    return None


def interpreted() -> bool:
    """Was Triton's interpreter asked for, and is Triton there?"""
    return os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None


def check(q: Tensor, codes: list[Tensor], scales: list[Tensor], lengths: Tensor, new: list[Tensor], bits: list[int], blocks: list[int]) -> None:
    """Shapes that the kernels would read beyond: one sentence each."""
    B, H, D = q.shape
    count = len(bits)
    if len(codes) != 2 * count or len(scales) != 4 * count or len(blocks) != 2 * count or tuple(lengths.shape) != (count, B):
        raise LowerError(
            f"kv-attention: {count} partitions of {B} samples need {2 * count} codes, {4 * count} scales and centres, {2 * count} blocks and lengths "
            f"[{count}, {B}]; given are {len(codes)}, {len(scales)}, {len(blocks)} and {list(lengths.shape)}"
        )
    for i, b in enumerate(bits):
        for j, which in enumerate("kv"):
            x, scale, center, block = codes[2 * i + j], scales[4 * i + 2 * j], scales[4 * i + 2 * j + 1], blocks[2 * i + j]
            where = f"kv-attention: {which} of partition {i}"
            if x.dim() != 4 or x.shape[0] != B or H % x.shape[1] or x.shape[3] * per_byte(b) != D:
                raise LowerError(f"{where} is {list(x.shape)}; {H} query heads of {D} channels at {b} bits want [{B}, a divisor of {H}, T, {D // per_byte(b)}]")
            if b and x.dtype not in (torch.int8, torch.float8_e4m3fn):
                raise LowerError(f"{where} is {str(x.dtype).removeprefix('torch.')}; codes are int8 or float8_e4m3fn")
            if x.stride(3) != 1:
                raise LowerError(f"{where} has stride {x.stride(3)} along channels; the kernel reads whole vectors")
            rows = -(-x.shape[2] // block) if block else x.shape[2]
            if scale.numel() and (scale.dim() != 4 or D % scale.shape[3] or scale.shape[2] not in (1, rows) or scale.shape[1] != x.shape[1]):
                raise LowerError(
                    f"{where} has a scale {list(scale.shape)}; it is [B, {x.shape[1]}, 1, {D}] or [B, {x.shape[1]}, {rows}, a divisor of {D}]"
                )
            if center.numel() and center.shape != scale.shape:
                raise LowerError(f"{where} has a centre {list(center.shape)} beside a scale {list(scale.shape)}")
    if len(new) not in (0, 2) or any(tuple(t.shape) != (B, codes[0].shape[1], 1, D) for t in new):
        raise LowerError(f"kv-attention: new rows are {[list(t.shape) for t in new]}, not two of [{B}, {codes[0].shape[1]}, 1, {D}]")


# ** the launch **


def launch(q: Tensor, codes: list[Tensor], scales: list[Tensor], lengths: Tensor, new: list[Tensor], bits: list[int], blocks: list[int], scale: float,
           softcap: float) -> Tensor:
    """Both kernels on torch's current stream: one pass per partition, one merge."""
    from ._kv_triton import merge

    B, H, D = q.shape
    G = codes[0].shape[1]
    q = q if q.stride(2) == 1 else q.contiguous()
    counts = [pieces_of(x.shape[2], B * G, cores(q.device)) for x in codes[::2]]
    pieces = sum(counts)
    sums = torch.empty(B, H, pieces, D, dtype=torch.float32, device=q.device)
    peaks, totals = (torch.empty(B, H, pieces, dtype=torch.float32, device=q.device) for _ in range(2))
    first = 0
    for i, count in enumerate(counts):
        if count:
            part = (codes[2 * i], codes[2 * i + 1], *scales[4 * i : 4 * i + 4])
            _partial(q, part, lengths[i], bits[i], blocks[2 * i : 2 * i + 2], first, count, scale, softcap, sums, peaks, totals)
        first += count
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    new_k, new_v = (t if t.stride(3) == 1 else t.contiguous() for t in new) if new else (q, q)
    merge[(B * H,)](
        sums, peaks, totals, q, new_k, new_v, q.stride(0), q.stride(1), new_k.stride(0), new_k.stride(1), new_v.stride(0), new_v.stride(1),
        pieces, H, H // G, scale, softcap, out, **merge_constants(D, bool(new), bool(softcap)),
    )  # fmt: skip
    return out


def cores(device: torch.device) -> int:
    """Multiprocessors of a GPU; the interpreter has one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def pieces_of(rows: int, pairs: int, cores: int) -> int:
    """Into how many pieces a partition of `rows` is cut for each of `pairs` (sample, key/value head): enough programs for every multiprocessor,
    none shorter than one block of rows; none at all for an empty partition."""
    return min(max(-(-PIECES_PER_CORE * cores // pairs), 1), -(-rows // BLOCK_T))


def rows_of(T: int, count: int) -> int:
    """Rows of one piece: whole blocks, so that no block is read by two programs."""
    return -(-T // (count * BLOCK_T)) * BLOCK_T


def _partial(q: Tensor, part: tuple[Tensor, ...], lengths: Tensor, bits: int, blocks: list[int], first: int, count: int, scale: float, softcap: float,
             sums: Tensor, peaks: Tensor, totals: Tensor) -> None:
    from ._kv_triton import partial

    k, v, ks, kz, vs, vz = part
    (B, H, D), G, T = q.shape, k.shape[1], k.shape[2]
    spreads = mode(ks, D, blocks[0]), mode(vs, D, blocks[1])
    settings = constants(D, H // G, bits, *spreads, bool(kz.numel()), bool(vz.numel()), q.dtype, bool(softcap))
    partial[(B * G, count)](
        q, k, v, _dense(ks, q), _dense(kz, q), _dense(vs, q), _dense(vz, q), lengths, q.stride(0), q.stride(1), *k.stride()[:3], *v.stride()[:3],
        *_strides(ks), *_strides(vs), rows_of(T, count), first, peaks.shape[2], G, H // G, scale, softcap, sums, peaks, totals, **settings,
    )  # fmt: skip


Spread = tuple[int, int, int]  # how a scale is spread, channels that share one, tokens that share one


def constants(D: int, R: int, bits: int, k: Spread, v: Spread, k_centred: bool, v_centred: bool, dtype: torch.dtype, softcap: bool) -> dict[str, Any]:
    """What the first kernel is compiled for: D channels, R query heads per key/value head."""
    import triton.language as tl

    compute = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]
    many = per_byte(bits)
    return {
        "D": D, "F": many, "K_PER": k[0], "K_WIDTH": k[1], "V_PER": v[0], "V_WIDTH": v[1], "K_BLOCK": k[2], "V_BLOCK": v[2],
        "K_CENTRED": k_centred, "V_CENTRED": v_centred, "SOFTCAP": softcap, "COMPUTE": compute, "IEEE": "ieee",
        "BLOCK_R": max(16, _power(R)), "BLOCK_T": BLOCK_T, "BLOCK_D": max(16, _power(D // many)), **COMPILE, "num_stages": 3,
    }  # fmt: skip


COMPILE = {"num_warps": 4, "enable_fp_fusion": True}


def merge_constants(D: int, new: bool, softcap: bool) -> dict[str, Any]:
    """What the second kernel is compiled for."""
    return {"D": D, "NEW": new, "SOFTCAP": softcap, "BLOCK_P": 16, "BLOCK_D": _power(D), **COMPILE}


def mode(scale: Tensor, D: int, block: int) -> Spread:
    """How a scale of this shape is spread over codes of D channels."""
    if not scale.numel():
        return NONE, 1, 1
    if scale.shape[3] == D and scale.shape[2] == 1:
        return CHANNEL, 1, 1
    if scale.shape[3] == 1 and not block:
        return TOKEN, D, 1
    return GROUP, D // scale.shape[3], block or 1


def _dense(scale: Tensor, like: Tensor) -> Tensor:
    """A dense last axis; a missing scale is any pointer, never read."""
    return like if not scale.numel() else scale if scale.stride(3) == 1 or scale.shape[3] == 1 else scale.contiguous()


def _strides(scale: Tensor) -> tuple[int, ...]:
    """Of a scale (and its centre) along samples, heads and tokens; a size of one is spread by a stride of zero."""
    if not scale.numel():
        return 0, 0, 0
    dense = _dense(scale, scale)
    return tuple(0 if n == 1 else s for n, s in zip(dense.shape[:3], dense.stride()[:3], strict=True))


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
