"""The decode attention over quantized caches inside a TensorRT engine: two ahead-of-time plug-ins, PTX in the plan and no Python at run time.

    register(tensorrt.plugin)       foveate::kv_partial and foveate::kv_merge; once per process, before a network uses them
    compile_partial(spec, "9.0")    the first kernel as PTX; needs Triton, but no GPU (so does compile_merge)

A network says, for each partition of a layer, kv_partial(q, k, v, k scale, k centre, v scale, v centre, lengths) -> sums, peaks, totals, concatenates
those of several partitions along axis 2, and gives them to kv_merge with the new row. Caches are token-major [B, T, G, W], as `_trt_cache` lays them
out, with codes of a byte packed as `pack_kv` does. TensorRT-RTX has no plug-ins; it folds the same arithmetic into its own kernel.
Attributes are not stored in a plan: what the kernel is compiled for is in its PTX. Neither plug-in was ever run: no GPU was at hand.
"""
# no `from __future__ import annotations` here: TensorRT reads the annotations of the functions that it registers, as objects

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import LowerError

READ = ("q", "k", "v", "ks", "kz", "vs", "vz", "lengths")
VARYING = ("k_b", "v_b", "ks_b", "vs_b", "rows")  # numbers that hang on the rows of the past; all others are compiled in
WRITTEN = ("sums", "peaks", "totals")
PTX = 87  # version of the language, 8.7: drivers from CUDA 12.8 on read it, and it knows every GPU up to compute capability 12
TRITON = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Spec:
    """What one partition's kernel is compiled for: heads, their width, codes and how scales are spread (graph/kv_format.py)."""

    heads: int
    groups: int
    width: int
    bits: int
    k_per: str = "channel"
    v_per: str = "channel"
    centred: bool = False
    dtype: str = "float16"
    pieces: int = 16
    scale: float = 0.0  # 0: one over the root of the width
    softcap: float = 0.0

    def spread(self, per: str) -> tuple[int, int, int]:
        """As kv_attention.mode says it."""
        from .kv_attention import CHANNEL, GROUP, NONE, TOKEN

        kind, _, size = per.partition(":")
        if not self.bits:
            return NONE, 1, 1
        if kind not in ("channel", "token", "group"):
            raise LowerError(f"kv-plugin: scales per {per}; the plug-in reads channel, token and group:<channels>")
        return {"channel": (CHANNEL, 1, 1), "token": (TOKEN, self.width, 1), "group": (GROUP, int(size or 1), 1)}[kind]

    def states(self, per: str) -> int:
        """Scales beside one row of one head."""
        kind, _, size = per.partition(":")
        return {"channel": self.width, "token": 1, "group": self.width // int(size or 1)}[kind]


@dataclass(frozen=True)
class Compiled:
    """A kernel that TensorRT can launch."""

    name: str
    ptx: str
    threads: int
    shared: int  # bytes


def compile_partial(spec: Spec, capability: str) -> Compiled:
    import torch

    from . import _kv_triton
    from .kv_attention import constants, per_byte

    G, W = spec.groups, spec.width // per_byte(spec.bits)
    centred = spec.centred and spec.bits > 0
    spreads = spec.spread(spec.k_per), spec.spread(spec.v_per)
    settings = constants(spec.width, spec.heads // G, spec.bits, *spreads, centred, centred, getattr(torch, spec.dtype), bool(spec.softcap))
    fixed = {"q_b": spec.heads * spec.width, "q_h": spec.width, "first": 0, "pieces": spec.pieces, "G": G, "R": spec.heads // G}
    for which, per in (("k", spec.k_per), ("v", spec.v_per)):
        n, shared = spec.states(per), per == "channel"
        fixed |= {f"{which}_g": W, f"{which}_t": G * W, f"{which}s_g": n, f"{which}s_t": 0 if shared else G * n}
    fixed |= {"scale": spec.scale or spec.width**-0.5, "softcap": spec.softcap}
    float_type, codes = f"*{TRITON[spec.dtype]}", "*i8" if spec.bits else f"*{TRITON[spec.dtype]}"
    kinds = dict.fromkeys(READ, float_type) | {"k": codes, "v": codes, "lengths": "*i64"} | dict.fromkeys(VARYING, "i32") | dict.fromkeys(WRITTEN, "*fp32")
    return _compiled(_kv_triton.partial, kinds, fixed, settings, capability)


def compile_merge(spec: Spec, pieces: int, capability: str) -> Compiled:
    """pieces: of all partitions together."""
    from . import _kv_triton
    from .kv_attention import merge_constants

    D, G, pointer = spec.width, spec.groups, f"*{TRITON[spec.dtype]}"
    fixed = {"q_b": spec.heads * D, "q_h": D, "nk_b": G * D, "nk_g": D, "nv_b": G * D, "nv_g": D, "pieces": pieces, "H": spec.heads, "R": spec.heads // G}
    fixed |= {"scale": spec.scale or D**-0.5, "softcap": spec.softcap}
    kinds = dict.fromkeys(WRITTEN, "*fp32") | dict.fromkeys(("q", "new_k", "new_v", "out"), pointer)
    return _compiled(_kv_triton.merge, kinds, fixed, merge_constants(D, True, bool(spec.softcap)), capability)


def _compiled(kernel: Any, kinds: dict[str, str], fixed: dict[str, Any], settings: dict[str, Any], capability: str) -> Compiled:
    """Ahead of time for a GPU that need not be here. Everything in `fixed` and `settings` is compiled in."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(kernel, "cache_key"):
        raise LowerError("kv-plugin: Triton was imported with TRITON_INTERPRET=1, which cannot compile; start without it")
    options = {k: v for k, v in settings.items() if k in ("num_warps", "num_stages", "enable_fp_fusion")} | {"ptx_version": PTX}
    constexprs = fixed | {k: v for k, v in settings.items() if k not in options}
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*") or n == "rows"}
    made = triton.compile(ASTSource(kernel, signature, constexprs, aligned), GPUTarget("cuda", int(capability.replace(".", "")), 32), options)
    threads, shared = made.metadata.num_warps * 32, made.metadata.shared
    return Compiled(made.metadata.name, without_hidden(made.asm["ptx"], made.metadata.name, len(kinds)), threads, shared)


def without_hidden(ptx: str, name: str, count: int) -> str:
    """Without the parameters that Triton adds behind a kernel's own (scratch memory): TensorRT passes the kernel's own alone."""
    head = re.search(rf"\.entry {re.escape(name)}\((.*?)\)", ptx, re.S)
    if head is None:
        raise LowerError(f"kv-plugin: this PTX has no entry {name}")
    parameters = [p.strip() for p in head[1].split(",")]
    for parameter in parameters[count:]:
        if len(re.findall(rf"\b{parameter.split()[-1]}\b", ptx)) > 1:
            raise LowerError(f"kv-plugin: {name} uses {parameter.split()[-1]}, memory that Triton's launcher gives and TensorRT does not")
    if len(parameters) < count:
        raise LowerError(f"kv-plugin: {name} has {len(parameters)} parameters, {count} were declared")
    return ptx[: head.start(1)] + "\n\t" + ",\n\t".join(parameters[:count]) + "\n" + ptx[head.end(1) :]


def register(trtp: Any, capability: str, compilers: tuple[Callable[..., Compiled], Callable[..., Compiled]] = (compile_partial, compile_merge)) -> None:
    """Both plug-ins in TensorRT's registry (`trtp` is the module tensorrt.plugin), compiled for the GPU of this capability."""
    Desc, partial, merge = trtp.TensorDesc, *compilers
    from .kv_attention import BLOCK_T

    @trtp.register("foveate::kv_partial")
    def partial_shapes(
        q: Desc, k: Desc, v: Desc, ks: Desc, kz: Desc, vs: Desc, vz: Desc, lengths: Desc,
        heads: int, groups: int, width: int, bits: int, k_per: str, v_per: str, centred: bool, dtype: str, pieces: int, scale: float, softcap: float,
    ) -> tuple[Desc, Desc, Desc]:  # fmt: skip
        B, wide = q.shape_expr[0], trtp.float32
        shape = (B, heads, pieces)
        return trtp.from_shape_expr((*shape, width), wide), trtp.from_shape_expr(shape, wide), trtp.from_shape_expr(shape, wide)

    @trtp.aot_impl("foveate::kv_partial")
    def partial_kernel(
        q: Desc, k: Desc, v: Desc, ks: Desc, kz: Desc, vs: Desc, vz: Desc, lengths: Desc,
        heads: int, groups: int, width: int, bits: int, k_per: str, v_per: str, centred: bool, dtype: str, pieces: int, scale: float, softcap: float,
        outputs, tactic,
    ):  # fmt: skip
        spec = Spec(heads, groups, width, bits, k_per, v_per, centred, dtype, pieces, scale, softcap)
        made = partial(spec, capability)
        T, W = k.shape_expr[1], width * (bits or 8) // 8
        numbers = {"k_b": T * (groups * W), "v_b": T * (groups * W), "rows": trtp.cdiv(T, pieces * BLOCK_T) * BLOCK_T}
        for which, per in (("k", k_per), ("v", v_per)):
            numbers[f"{which}s_b"] = (1 if per == "channel" else T) * (groups * spec.states(per))
        return made.name, made.ptx, _launch(trtp, made, q.shape_expr[0] * groups, pieces), _numbers(trtp, [numbers[n] for n in VARYING])

    @trtp.register("foveate::kv_merge")
    def merge_shapes(
        sums: Desc, peaks: Desc, totals: Desc, q: Desc, new_k: Desc, new_v: Desc, heads: int, groups: int, width: int, dtype: str, pieces: int, scale: float,
        softcap: float,
    ) -> tuple[Desc]:  # fmt: skip
        return (q.like(),)

    @trtp.aot_impl("foveate::kv_merge")
    def merge_kernel(
        sums: Desc, peaks: Desc, totals: Desc, q: Desc, new_k: Desc, new_v: Desc, heads: int, groups: int, width: int, dtype: str, pieces: int, scale: float,
        softcap: float, outputs, tactic,
    ):  # fmt: skip
        made = merge(Spec(heads, groups, width, 0, dtype=dtype, scale=scale, softcap=softcap), pieces, capability)
        return made.name, made.ptx, _launch(trtp, made, q.shape_expr[0] * heads, 1), _numbers(trtp, [])


def _launch(trtp: Any, made: Compiled, x: Any, y: int) -> Any:
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y, launch.block_x, launch.shared_mem = x, y, made.threads, made.shared
    return launch


def _numbers(trtp: Any, values: list[Any]) -> Any:
    numbers = trtp.SymIntExprs(len(values))
    for i, value in enumerate(values):
        numbers[i] = trtp.SymInt32(value)
    return numbers
