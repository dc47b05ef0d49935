"""TensorRT-RTX and TensorRT: one engine per stage, strongly typed, built from the same ONNX that ONNX Runtime can check on a CPU.

    tensorrt-rtx    builds real engines with no GPU, for the compute capability that is asked for; the last compilation happens on the
    target
    tensorrt        the same API where classic TensorRT is installed; it builds for the GPU at hand

The files beside this one: `_trt_options` (options, shape ranges), `_trt_limits` (what to say before building), `_trt_spelling` (attention
and
cache as TensorRT fuses them), `_trt_build` (ONNX to plan), `_trt_engine` (running it).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import LowerError
from .base import Backend, Engine

if TYPE_CHECKING:
    from ...graph.program import Program, Stage
    from ..artifact import Artifact
    from ..engine_report import EngineReport
    from ._trt_options import TrtOptions

DEFAULTS = {  # as in TrtOptions; written out so that listing targets needs no torch
    "precision": "float16",
    "residual": "float32",
    "compute_capability": "8.9",
    "batch": 1,
    "images": None,
    "text": None,
    "visual": None,
    "context": None,
    "sequence": None,
    "past": None,
    "new_tokens": 512,
    "workspace_mb": 0,
    "optimization_level": None,
    "timing_cache": None,
    "unfused": "error",
}
REPORT = "reports/engines.json"
WEIGHTS = "weights.bin"


class _TensorRT(Backend):
    fuses = frozenset(
        "attention kv_store kv_append kv_mask kv_held quantize_kv dequantize_kv keep_tokens last_token splice_image_features".split()
    )
    options: ClassVar[Mapping[str, Any]] = DEFAULTS
    module: ClassVar[str]
    install: ClassVar[str]

    def available(self) -> str | None:
        if importlib.util.find_spec(self.module) is None:
            return f"the package {self.module} is not installed; {self.install}"
        try:
            self.trt()
        except (ImportError, OSError) as cause:
            return f"the package {self.module} does not load: {cause}"
        return None

    def trt(self) -> ModuleType:
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as cause:
            raise LowerError(f"{self.name}: the package {self.module} is not installed; {self.install}") from cause

    def check(self, program: Program, options: Mapping[str, Any]) -> list[str]:
        from ._trt_limits import limits

        parsed = self._options(options)
        return [*self._capability(parsed)[1], *limits(program, parsed)]

    def lower(self, program: Program, folder: Path, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        """Engines under `folder`/components and `reports/engines.json`. Components carry GPU, TensorRT version, precision and profile."""
        from ._trt_build import build

        trt, parsed = self.trt(), self._options(options)
        capability, wrong = self._capability(parsed)
        problems = [*wrong, *self.check(program, options)]
        if problems:
            raise LowerError(f"{self.name}: this program cannot be lowered: {'; '.join(dict.fromkeys(problems))}")
        narrow, told = prepare(program, parsed)
        components, reports = {}, []
        target = folder / "components"
        target.mkdir(parents=True, exist_ok=True)
        for request in self._requests(program, narrow, target, parsed):
            plan, report = build(trt, self.name, request, parsed, capability)
            told += self._fusion(report, parsed.unfused)
            (target / f"{request.stage}.engine").write_bytes(memoryview(plan))
            components[request.stage] = {
                "file": f"components/{request.stage}.engine",
                "inputs": report.inputs,
                "outputs": report.outputs,
                "profile": report.profile,
                "compute_capability": capability,
                "version": report.version,
                "precision": parsed.precision,
                "token_major": True,
            }
            reports.append(report)
        (folder / REPORT).parent.mkdir(parents=True, exist_ok=True)
        content = {"remarks": told, "options": asdict(parsed), "engines": [r.to_json() for r in reports]}
        (folder / REPORT).write_text(json.dumps(content, indent=1) + "\n")
        return components

    def _fusion(self, report: EngineReport, policy: str) -> list[str]:
        """What the built plan does with a quantized cache: it must be read inside attention, or `unfused` says that it need not."""
        if not report.unfused:
            return []
        said = f"{self.name}: {report.stage}: {'; '.join(report.unfused)}"
        if policy == "error":
            raise LowerError(f"{said}. Such a cache saves memory and costs time; --option unfused=warn builds it all the same")
        warnings.warn(said, stacklevel=3)
        return [said]

    def _requests(self, program: Program, narrow: Program, folder: Path, options: TrtOptions) -> Any:
        """One stage after the other: its ONNX file exists while its engine is built."""
        import onnx

        from ..onnx_weights import WeightFile
        from ..to_onnx import to_onnx
        from ._trt_build import Request
        from ._trt_options import axis_ranges
        from ._trt_spelling import BODIES

        axes = axis_ranges(program, options)
        for name, stage in narrow.stages.items():
            path = folder / f"{name}.onnx"
            with WeightFile(folder / WEIGHTS) as weights:
                onnx.save_model(to_onnx(stage, name, weights, emitters=BODIES), str(path))
            yield Request(name, path, profile_shapes(stage, axes), _attention_layers(program[name]))
            path.unlink()
            (folder / WEIGHTS).unlink()

    def open(self, artifact: Artifact) -> Engine:
        from ._trt_engine import TrtEngine

        return TrtEngine.of_plans(self.trt(), self.name, artifact)

    def _options(self, options: Mapping[str, Any]) -> TrtOptions:
        from ._trt_options import TrtOptions

        known = {f.name for f in fields(TrtOptions)}
        return TrtOptions(**{k: v for k, v in self.settings(options).items() if k in known})

    def _capability(self, options: TrtOptions) -> tuple[str, list[str]]:
        """("8.9", what is wrong with it)"""
        from ._trt_build import canonical, compute_capabilities

        want, known = canonical(options.compute_capability), compute_capabilities(self.trt())
        if want not in known:
            return want, [f"no compute capability {want}; {self.module} {self.trt().__version__} builds for {', '.join(known)}"]
        return want, []


def prepare(program: Program, options: TrtOptions) -> tuple[Program, list[str]]:
    """(the graphs that the engines compute: narrowed and respelt, eager runs them as they are; what will not be one kernel)"""
    from ..precision import to_precision
    from ._trt_limits import remarks
    from ._trt_spelling import respell

    narrow = to_precision(program, options.precision, options.residual)
    told = remarks(narrow)
    respell(narrow, options.batch_one)
    return narrow, told


def profile_shapes(stage: Stage, axes: Any) -> dict[str, Any]:
    """Input -> its min, opt and max shape."""
    from ._trt_options import shape_range, symbol_ranges

    ranges = symbol_ranges(stage, axes)
    return {n.meta.get("name", n.name): shape_range(n, ranges) for n in stage.graph.nodes if n.op == "placeholder"}


def _attention_layers(stage: Stage) -> int:
    from ._trt_spelling import ATTENTION, ATTENTION_VARLEN

    return sum(n.op == "call_function" and n.target in (ATTENTION, ATTENTION_VARLEN) for n in stage.graph.nodes)


class TensorRTRTX(_TensorRT):
    name = "tensorrt-rtx"
    module = "tensorrt_rtx"
    install = "pip install 'foveate[rtx]'"


class TensorRT(_TensorRT):
    name = "tensorrt"
    module = "tensorrt"
    install = "pip install 'foveate[tensorrt]'"

    def available(self) -> str | None:
        return super().available() or (
            None if _gpu() else "classic TensorRT builds on the GPU that will run the engine, and this machine has none"
        )

    def _capability(self, options: TrtOptions) -> tuple[str, list[str]]:
        """The GPU's own; asking for another one is refused."""
        from ._trt_build import canonical

        here = _gpu()
        want = canonical(options.compute_capability)
        if here is None:
            return want, [
                "classic TensorRT builds on the GPU that will run the engine, and this machine has none; tensorrt-rtx builds without"
            ]
        if want != here and options.compute_capability != DEFAULTS["compute_capability"]:
            return here, [f"classic TensorRT builds for the GPU at hand ({here}), not for {want}"]
        return here, []


def _gpu() -> str | None:
    """The compute capability of the current CUDA device, as torch sees it."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"
