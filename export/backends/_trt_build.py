"""From a stage's ONNX file to a serialized engine, for TensorRT and TensorRT-RTX alike (one API under two module names)."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil

from ..engine_report import EngineReport, kernels
from ..errors import LowerError
from ._trt_options import TrtOptions

SAMPLE = 0.02  # seconds between looks at the memory
Shapes = list[tuple[int, ...]]  # min, opt, max


@dataclass(frozen=True)
class Request:
    """One engine to build: the stage's ONNX file, and the shape range of each input."""

    stage: str
    onnx: Path
    shapes: Mapping[str, Shapes]
    attention_layers: int


def compute_capabilities(trt: ModuleType) -> dict[str, Any]:
    """What this TensorRT builds for without a GPU: "8.9" -> its enum member; empty for classic TensorRT, which builds for the GPU at
    hand."""
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    return {f"{n[2:-1]}.{n[-1]}": m for n, m in members.items() if n.startswith("SM")}


def canonical(capability: Any) -> str:
    """ "SM89", "89", 8.9, "8.9" -> "8.9" """
    text = str(capability).upper().removeprefix("SM").removeprefix("_")
    return text if "." in text else f"{text[:-1]}.{text[-1:]}"


def build(trt: ModuleType, target: str, request: Request, options: TrtOptions, capability: str) -> tuple[Any, EngineReport]:
    """(the plan, its report). What the parser or the builder says when it fails is the LowerError's text, with the node that it is
    about."""
    log = _log(trt)
    builder = trt.Builder(log)
    if builder is None:
        raise LowerError(f"{target}: {request.stage}: no builder: {log.text()}")
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    _parse(trt, target, network, request, log)
    config = builder.create_builder_config()
    _configure(trt, config, options, capability)
    profile = _profile(builder, config, network, request)
    cache = _load_timing_cache(config, options)
    started = time.perf_counter()
    with _Memory() as memory:
        plan = builder.build_serialized_network(network, config)
    seconds = time.perf_counter() - started
    if plan is None:
        raise LowerError(f"{target}: {request.stage}: no engine for compute capability {capability}: {log.text()}")
    _save_timing_cache(config, options, cache)
    report = EngineReport(
        stage=request.stage,
        target=target,
        version=trt.__version__,
        compute_capability=capability,
        precision=options.precision,
        layers=network.num_layers,
        bytes=plan.nbytes,
        seconds=round(seconds, 3),
        peak_rss_bytes=memory.peak,
        inputs=[_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        outputs=[_tensor(network.get_output(i)) for i in range(network.num_outputs)],
        profile=profile,
        attention_layers=request.attention_layers,
        kernels=kernels(memoryview(plan)),
        warnings=log.warnings[:20],
    )
    return plan, report


def _parse(trt: ModuleType, target: str, network: Any, request: Request, log: Any) -> None:
    parser = trt.OnnxParser(network, log)
    if parser.parse_from_file(str(request.onnx)):
        return
    said = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"{e.node_operator() or 'model'} at {e.node_name() or 'no node'}: {_one_line(e.desc())}" for e in said]
    raise LowerError(f"{target}: {request.stage}: the parser refuses {'; '.join(lines) or log.text()}")


def _configure(trt: ModuleType, config: Any, options: TrtOptions, capability: str) -> None:
    known = compute_capabilities(trt)
    if known:
        config.num_compute_capabilities = 1
        config.set_compute_capability(known[capability], 0)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level


def _profile(builder: Any, config: Any, network: Any, request: Request) -> dict[str, list[list[int]]]:
    """One profile over all inputs; an input of one size becomes static, since fixed sizes fuse where ranges do not."""
    profile, needed, said = builder.create_optimization_profile(), False, {}
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        low, opt, high = request.shapes[tensor.name]
        said[tensor.name] = [list(low), list(opt), list(high)]
        if low == high:
            tensor.shape = low
            continue
        fixed = [a if a == b else -1 for a, b in zip(low, high, strict=True)]
        tensor.shape = fixed
        profile.set_shape(tensor.name, low, opt, high)
        needed = True
    if needed:
        config.add_optimization_profile(profile)
    return said


def _load_timing_cache(config: Any, options: TrtOptions) -> Any:
    """Classic TensorRT times kernels while it builds and can keep what it learned; TensorRT-RTX does so on the target instead."""
    if options.timing_cache is None:
        return None
    path = Path(options.timing_cache)
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(config: Any, options: TrtOptions, cache: Any) -> None:
    if cache is not None and options.timing_cache is not None:
        Path(options.timing_cache).write_bytes(bytes(config.get_timing_cache().serialize()))


def _tensor(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": str(tensor.dtype).rsplit(".", 1)[-1].lower(), "shape": list(tensor.shape)}


def _one_line(text: str) -> str:
    return " ".join(text.split())[:400]


def _log(trt: ModuleType) -> Any:
    """A logger that keeps what was said. It has to subclass a class of the module that is in use."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(_one_line(message))
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(_one_line(message))

        def text(self) -> str:
            return " | ".join(dict.fromkeys(self.errors)) or "no message"

    return Log()


class _Memory:
    """The largest resident size of this process while the block runs."""

    def __enter__(self) -> _Memory:
        self._process, self._stop = psutil.Process(), threading.Event()
        self.peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE):
            self.peak = max(self.peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, self._process.memory_info().rss)
