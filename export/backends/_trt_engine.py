"""Running the engines of an artifact: device buffers are torch CUDA tensors, keys and values never leave the GPU and are never moved by a
step.

Batch 1: an engine reads exactly the valid rows of each layer and writes the new row right behind them. Larger batches: it reads the whole
buffer
under a length mask, and the new rows are put in place by one indexed copy per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import LowerError
from ._cache import check_prefix
from .base import Arrays, Cache, Engine

if TYPE_CHECKING:
    from ..artifact import Artifact

DTYPES = {
    "float": torch.float32,
    "half": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "int8": torch.int8,
    "bool": torch.bool,
    "uint8": torch.uint8,
}
AXES = {"image_features": (None, "visual"), "input_ids": ("batch", "sequence"), "past_k.": ("batch", "past"), "pixel_values": ("images",)}


def rebuild(artifact: Artifact, target: str, **settings: Any) -> str:
    """The command that makes a fitting artifact."""
    model = artifact.manifest.get("model") or "MODEL"
    changes = " ".join(f"--option {k}={v}" for k, v in settings.items())
    return f"foveate optimize {model} --recipe {artifact.path / 'recipe.yaml'} --target {target} {changes} --output NEW_FOLDER"


def refuse(artifact: Artifact, target: str, version: str, gpu: str | None) -> None:
    """One sentence when this machine cannot run the engines: no GPU, another TensorRT, another GPU."""
    for stage, component in artifact.manifest["components"].items():
        if gpu is None:
            raise LowerError(
                f"{target}: running {stage}.engine needs an NVIDIA GPU of compute capability {component['compute_capability']}, and "
                f"torch sees none "
                "here (engines build without one); --target ort runs on this machine"
            )
        if component["version"] != version:
            raise LowerError(
                f"{target}: {stage}.engine was built by version {component['version']}, installed is {version}; install that one, or "
                f"rebuild: "
                f"{rebuild(artifact, target, compute_capability=gpu)}"
            )
        if component["compute_capability"] != gpu:
            raise LowerError(
                f"{target}: {stage}.engine was built for compute capability {component['compute_capability']}, this GPU has {gpu}; "
                f"rebuild: "
                f"{rebuild(artifact, target, compute_capability=gpu)}"
            )


def outside(artifact: Artifact, target: str, stage: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """One sentence when an input does not fit the shapes that the engine was built for."""
    profile = artifact.manifest["components"][stage]["profile"]
    for name, shape in shapes.items():
        if name not in profile:
            continue
        low, opt, high = profile[name]
        if len(shape) != len(low):
            raise LowerError(f"{target}: {stage}: {name} has shape {list(shape)}, expected {len(low)} dimensions")
        for axis, (size, least, best, most) in enumerate(zip(shape, low, opt, high, strict=True)):
            if not least <= size <= most:
                option = _option(name, axis)
                wider = f"{min(least, size)}:{best}:{max(most, size)}"
                hint = f"; rebuild: {rebuild(artifact, target, **{option: wider})}" if option else ""
                raise LowerError(
                    f"{target}: {stage}: {name} has size {size} in dimension {axis}, this engine takes {least} to {most}{hint}"
                )


def _option(name: str, axis: int) -> str | None:
    """The build option that widens this dimension."""
    for prefix, options in AXES.items():
        if (
            name == prefix
            or (prefix.endswith(".") and name.startswith(prefix))
            or (name in ("attention_mask", "position_ids") and prefix == "input_ids")
        ):
            axis = axis - 1 if name == "position_ids" and axis == 2 else axis
            return options[axis] if axis < len(options) else None
    return None


Place = Callable[[str, tuple[int, ...]], Tensor | None]


class TrtCache(Cache):
    """Token-major buffers [B, capacity, G, D] by name ("k.0"), convolution states, and the slots of windowed layers' rows."""

    def __init__(self, lengths: np.ndarray, layers: list[int], slot: Tensor) -> None:
        self.lengths, self.layers = lengths, layers
        self.slot = slot  # [B, 1]: the index of the next token
        self.buffers: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.buffers.values())


class _Stage:
    """One engine with its context. Inputs and outputs are bound by address; the stream is torch's own."""

    def __init__(self, trt: Any, runtime: Any, target: str, name: str, plan: bytes) -> None:
        self.target, self.name = target, name
        self.engine = runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise LowerError(f"{target}: {name}.engine cannot be loaded by this TensorRT on this GPU")
        self.context = self.engine.create_execution_context()
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        self.inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if n not in self.inputs]
        self.types = {n: DTYPES[str(self.engine.get_tensor_dtype(n)).rsplit(".", 1)[-1].lower()] for n in names}

    def __call__(self, feeds: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
        """Run once, asynchronously on torch's current stream. `place(name, shape)`: memory that the caller has for an output, or None."""
        held = []  # an input must live until the stream has read it
        for name in self.inputs:
            tensor = feeds[name].to(self.types[name]).contiguous()
            held.append(tensor)
            if not self.context.set_input_shape(name, tuple(tensor.shape)):
                raise LowerError(f"{self.target}: {self.name}: {name} of shape {tuple(tensor.shape)} is not what the engine was built for")
            self.context.set_tensor_address(name, tensor.data_ptr())
        results = {}
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            results[name] = spot = place(name, shape)
            if spot is None:
                results[name] = spot = torch.empty(shape, dtype=self.types[name], device="cuda")
            self.context.set_tensor_address(name, spot.data_ptr())
        if not self.context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
            raise LowerError(f"{self.target}: {self.name}: the engine did not run; see the TensorRT log above")
        del held  # torch's allocator reuses memory in stream order
        return results


class _TorchStage:
    """The same for an exported program with engines inside (Torch-TensorRT): it allocates its results, which then go where they belong."""

    def __init__(self, module: Any, component: Mapping[str, Any]) -> None:
        self.module = module
        self.inputs, self.outputs = ([t["name"] for t in component[k]] for k in ("inputs", "outputs"))
        self.types = {t["name"]: getattr(torch, t["dtype"]) for k in ("inputs", "outputs") for t in component[k]}

    def __call__(self, feeds: Mapping[str, Tensor], place: Place) -> dict[str, Tensor]:
        with torch.no_grad():
            values = self.module(*[feeds[n].to(self.types[n]).contiguous() for n in self.inputs])
        results = {}
        for name, value in zip(self.outputs, values, strict=True):
            spot = place(name, tuple(value.shape))
            if spot is not None:  # a row, or the front of a buffer, of one sample: contiguous
                spot.view(-1)[: value.numel()].copy_(value.reshape(-1))
            results[name] = value if spot is None else spot
        return results


class TrtEngine(Engine):
    """Stages that take and give CUDA tensors, and the cache between them."""

    def __init__(self, target: str, artifact: Artifact, stages: dict[str, Any]) -> None:
        self.target, self.artifact, self.stages = target, artifact, stages
        self.layers = [int(entry["layer"]) for entry in artifact.manifest["kv"]]

    @classmethod
    def of_plans(cls, trt: Any, target: str, artifact: Artifact) -> TrtEngine:
        """From serialized engines; a machine that cannot run them is refused."""
        refuse(artifact, target, trt.__version__, _gpu())
        runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        parts = artifact.manifest["components"]
        return cls(target, artifact, {n: _Stage(trt, runtime, target, n, artifact.file(c["file"]).read_bytes()) for n, c in parts.items()})

    @classmethod
    def of_programs(cls, version: str, target: str, artifact: Artifact) -> TrtEngine:
        """From exported programs with engines inside."""
        refuse(artifact, target, version, _gpu())
        parts = artifact.manifest["components"]
        return cls(
            target, artifact, {n: _TorchStage(torch.export.load(str(artifact.file(c["file"]))).module(), c) for n, c in parts.items()}
        )

    def vision(self, feeds: Arrays) -> Arrays:
        return _to_host(self.stages["vision"](self._given("vision", feeds), _nowhere))

    def prefill(self, feeds: Arrays, capacity: int) -> tuple[Arrays, TrtCache]:
        check_prefix(feeds["attention_mask"])
        given = self._given("prefill", feeds)
        spare = max(capacity - feeds["input_ids"].shape[1], 1)
        buffers: dict[str, Tensor] = {}
        types = self.stages["prefill"].types

        def place(name: str, shape: tuple[int, ...]) -> Tensor | None:
            """Rows of one sample are contiguous: they are written straight into the buffer."""
            if not name.startswith(("k.", "v.")):
                return None
            self._fits_cache(shape[1] + spare)
            buffers[name] = torch.zeros((shape[0], shape[1] + spare, *shape[2:]), dtype=types[name], device="cuda")
            return buffers[name] if shape[0] == 1 else None

        results = self.stages["prefill"](given, place)
        cache = TrtCache(results["kv_lengths"].cpu().numpy(), self.layers, given["attention_mask"].sum(1, keepdim=True))
        for name, buffer in buffers.items():
            if results[name] is not buffer:
                buffer[:, : results[name].shape[1]] = results[name]
        cache.buffers |= buffers
        self._states(cache, results, spare)
        hidden = ("k.", "v.", "conv.", "kv_pos.")
        return _to_host({n: t for n, t in results.items() if not n.startswith(hidden)}), cache

    def decode(self, cache: TrtCache, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:  # type: ignore[override]
        stage = self.stages["decode"]
        lengths = torch.from_numpy(np.ascontiguousarray(cache.lengths)).cuda()
        feeds = {"input_ids": _device(input_ids), "position_ids": _device(position_ids), "lengths": lengths, "slot": cache.slot}
        one = input_ids.shape[0] == 1
        places: dict[str, Tensor] = {}
        for row, layer in enumerate(cache.layers):
            used = int(cache.lengths[row].max())
            if used >= cache.buffers[f"k.{layer}"].shape[1]:
                raise LowerError(
                    f"{self.target}: decode: the cache of layer {layer} is full after {used} rows; ask prefill for more capacity"
                )
            for which in "kv":
                buffer = cache.buffers[f"{which}.{layer}"]
                feeds[f"past_{which}.{layer}"] = buffer[:, :used] if one else buffer
                if one:
                    places[f"{which}.{layer}"] = buffer[:, used : used + 1]
            if (slots := cache.buffers.get(f"kv_pos.{layer}")) is not None:
                feeds[f"past_pos.{layer}"] = slots[:, :used] if one else slots
        feeds |= {n: t for n, t in cache.buffers.items() if n.startswith("conv.")}
        outside(self.artifact, self.target, "decode", {n: tuple(feeds[n].shape) for n in stage.inputs})
        results = stage(feeds, lambda name, shape: places.get(name))
        self._advance(cache, results, lengths, one)
        return results["logits"].cpu().numpy()

    def _advance(self, cache: TrtCache, results: dict[str, Tensor], lengths: Tensor, one: bool) -> None:
        """New rows into place (batch 1: they are), slots and states forward."""
        samples = torch.arange(lengths.shape[1], device="cuda")
        for row, layer in enumerate(cache.layers):
            if not one:
                for which in "kv":
                    cache.buffers[f"{which}.{layer}"][samples, lengths[row]] = results[f"{which}.{layer}"][:, 0]
            if f"kv_pos.{layer}" in cache.buffers:
                cache.buffers[f"kv_pos.{layer}"][samples, lengths[row]] = cache.slot[:, 0]
        for name in [n for n in cache.buffers if n.startswith("conv.")]:
            cache.buffers[name] = results[name]
        cache.slot = cache.slot + 1
        cache.lengths = cache.lengths + 1

    def _states(self, cache: TrtCache, results: dict[str, Tensor], spare: int) -> None:
        """What is kept beside keys and values: states of short convolutions, slots of windowed layers' rows."""
        for name, value in results.items():
            if name.startswith("conv."):
                cache.buffers[name] = value
            elif name.startswith("kv_pos."):
                cache.buffers[name] = torch.nn.functional.pad(value, (0, spare))

    def _fits_cache(self, rows: int) -> None:
        profile = self.artifact.manifest["components"]["decode"]["profile"]
        most = min((high[1] for n, (_, _, high) in profile.items() if n.startswith("past_k.")), default=rows)
        if rows > most:
            wider = rebuild(self.artifact, self.target, past=f"1:{most}:{rows}")
            raise LowerError(
                f"{self.target}: prompt and new tokens need {rows} cache rows, the decode engine takes {most}; rebuild: {wider}"
            )

    def _given(self, stage: str, feeds: Arrays) -> dict[str, Tensor]:
        outside(self.artifact, self.target, stage, {n: tuple(a.shape) for n, a in feeds.items()})
        wanted = self.stages[stage].inputs
        missing = [n for n in wanted if n not in feeds]
        if missing:
            raise LowerError(f"{self.target}: {stage}: inputs {missing} are missing; given are {sorted(feeds)}")
        return {n: _device(feeds[n]).to(self.stages[stage].types[n]) for n in wanted}

    def close(self) -> None:
        self.stages.clear()


def _nowhere(name: str, shape: tuple[int, ...]) -> None:
    """No output has a place of its own."""


def _device(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).cuda(non_blocking=True)


def _to_host(tensors: Mapping[str, Tensor]) -> Arrays:
    """numpy copies; bfloat16 has no numpy type and comes as float32."""
    return {n: (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).cpu().numpy() for n, t in tensors.items()}


def _gpu() -> str | None:
    from .trt import _gpu as of_torch

    return of_torch()
