"""Torch-TensorRT: the rewritten stages compiled by its dynamo frontend; what TensorRT cannot take stays in torch.

It needs CUDA torch and a GPU both to build and to run. The graphs are those of the `trt` target (narrowed, attention and cache respelt),
so that
decode attention folds the same way; dialect ops become their reference bodies first. Components are exported programs (`.pt2`) with
engines inside.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import LowerError
from .base import Backend, Engine
from .trt import DEFAULTS as TRT_DEFAULTS

if TYPE_CHECKING:
    from ...graph.program import Program, Stage
    from ..artifact import Artifact

SHARED = (
    "precision",
    "residual",
    "batch",
    "images",
    "text",
    "visual",
    "sequence",
    "past",
    "new_tokens",
    "workspace_mb",
    "optimization_level",
)
DEFAULTS = {name: TRT_DEFAULTS[name] for name in SHARED} | {"min_block_size": 5}


class TorchTensorRT(Backend):
    """target "torch-tensorrt". min_block_size: shorter runs of supported operators stay in torch."""

    name = "torch-tensorrt"
    fuses = frozenset()
    options: ClassVar[Mapping[str, Any]] = DEFAULTS

    def available(self) -> str | None:
        import torch

        if importlib.util.find_spec("torch_tensorrt") is None:
            return "the package torch_tensorrt is not installed; pip install 'foveate[torch-tensorrt]' (it needs a CUDA build of torch)"
        if not torch.cuda.is_available():
            return "Torch-TensorRT builds on the GPU that will run the engine, and torch sees none here"
        return None

    def check(self, program: Program, options: Mapping[str, Any]) -> list[str]:
        from ._trt_limits import limits

        missing = self.available()
        return [*([missing] if missing else []), *limits(program, self._parsed(options))]

    def lower(self, program: Program, folder: Path, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        settings, parsed = self.settings(options), self._parsed(options)
        if problems := self.check(program, options):
            raise LowerError(f"{self.name}: this program cannot be lowered: {'; '.join(problems)}")
        import torch_tensorrt

        from ._trt_options import axis_ranges
        from .trt import prepare, profile_shapes

        narrow, _ = prepare(program, parsed)
        axes, components = axis_ranges(program, parsed), {}
        (folder / "components").mkdir(parents=True, exist_ok=True)
        for name, stage in narrow.stages.items():
            shapes = profile_shapes(stage, axes)
            exported = export_stage(stage, shapes)
            inputs = [_input(torch_tensorrt, stage, n, shapes[n]) for n in stage.inputs]
            compiled = torch_tensorrt.dynamo.compile(exported, arg_inputs=inputs, **compile_settings(parsed, settings))
            file = f"components/{name}.pt2"
            torch_tensorrt.save(
                compiled,
                str(folder / file),
                output_format="exported_program",
                arg_inputs=[_example(stage, n, shapes[n]) for n in stage.inputs],
            )
            components[name] = describe(stage, shapes, file, parsed.precision, torch_tensorrt.__version__)
        return components

    def open(self, artifact: Artifact) -> Engine:
        missing = self.available()
        if missing:
            raise LowerError(f"{self.name}: {missing}")
        import torch_tensorrt

        from ._trt_engine import TrtEngine

        return TrtEngine.of_programs(torch_tensorrt.__version__, self.name, artifact)

    def _parsed(self, options: Mapping[str, Any]) -> Any:
        from ._trt_options import TrtOptions
        from .trt import _gpu

        settings = self.settings(options)
        return TrtOptions(**{n: settings[n] for n in SHARED}, compute_capability=_gpu() or TRT_DEFAULTS["compute_capability"])


def compile_settings(parsed: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What Torch-TensorRT is told. Types are in the graph already."""
    told: dict[str, Any] = {
        "use_explicit_typing": True,
        "min_block_size": settings["min_block_size"],
        "truncate_double": True,
        "require_full_compilation": False,
        "offload_module_to_cpu": False,
        "immutable_weights": True,
    }
    if parsed.workspace_mb:
        told["workspace_size"] = parsed.workspace_mb << 20
    if parsed.optimization_level is not None:
        told["optimization_level"] = parsed.optimization_level
    return told


def export_stage(stage: Stage, shapes: Mapping[str, Any]) -> Any:
    """The stage without dialect ops, as an ExportedProgram whose dynamic dimensions are those that the profile leaves open."""
    import torch

    from ..expand import expand

    plain = expand(with_sdpa(stage), _AllButDialect())
    examples = tuple(_example(plain, n, shapes[n]) for n in plain.inputs)
    dynamic = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, (a, b) in enumerate(zip(shapes[n][0], shapes[n][2], strict=True)) if a != b}
        for n in plain.inputs
    )
    return torch.export.export(plain.module, examples, dynamic_shapes=dynamic, strict=False)


def with_sdpa(stage: Stage) -> Stage:
    """The attention nodes that respelling kept (causal or an additive mask, nothing else) as torch's own, which has a TensorRT
    converter."""
    import torch

    from ...graph.retype import retype
    from ._trt_spelling import ATTENTION

    stage, aten = stage.clone(), torch.ops.aten
    for node in [n for n in stage.graph.nodes if n.op == "call_function" and n.target is ATTENTION]:
        q, k, v, mask, _q_pos, _k_pos, scale, causal, _window, _softcap, _layer = node.args
        grouped = q.meta["val"].shape[1] != k.meta["val"].shape[1]
        with stage.graph.inserting_before(node):
            y = stage.graph.call_function(
                aten.scaled_dot_product_attention.default, (q, k, v, mask, 0.0, causal), {"scale": scale, "enable_gqa": grouped}
            )
            y = stage.graph.call_function(aten.transpose.int, (y, 1, 2))
        node.replace_all_uses_with(y)
        stage.graph.erase_node(node)
    retype(stage)
    stage.module.recompile()
    return stage


class _AllButDialect:
    """What Torch-TensorRT sees: it decomposes aten operators itself and has never heard of ours."""

    def __contains__(self, target: Any) -> bool:
        from ...graph.ops import REFERENCE

        return target not in REFERENCE


def _example(stage: Stage, name: str, shapes: Any) -> Any:
    """A tensor of the profile's best shape; where sizes vary, of 2 at least: torch.export takes a size of 1 for a constant."""
    import torch

    val = stage.placeholder(name).meta["val"]
    make = torch.zeros if not val.is_floating_point() else torch.randn
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = [best if low == high else max(best, 2) for low, best, high in zip(*shapes, strict=True)]
    return make(shape, device=device).to(val.dtype)


def _input(torch_tensorrt: Any, stage: Stage, name: str, shapes: Any) -> Any:
    dtype = stage.placeholder(name).meta["val"].dtype
    low, opt, high = shapes
    return (
        torch_tensorrt.Input(shape=opt, dtype=dtype)
        if low == high
        else torch_tensorrt.Input(min_shape=low, opt_shape=opt, max_shape=high, dtype=dtype)
    )


def describe(stage: Stage, shapes: Mapping[str, Any], file: str, precision: str, version: str) -> dict[str, Any]:
    """One component of the manifest."""
    from .trt import _gpu

    def row(name: str, val: Any) -> dict[str, Any]:
        return {"name": name, "dtype": str(val.dtype).removeprefix("torch."), "shape": [s if isinstance(s, int) else -1 for s in val.shape]}

    return {
        "file": file,
        "precision": precision,
        "version": version,
        "compute_capability": _gpu(),
        "token_major": True,
        "inputs": [row(n, stage.placeholder(n).meta["val"]) for n in stage.inputs],
        "outputs": [row(n, node.meta["val"]) for n, node in stage.output_nodes.items()],
        "profile": {n: [list(s) for s in shapes[n]] for n in stage.inputs},
    }
