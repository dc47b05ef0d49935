"""Running the engines of an artifact: device buffers are torch CUDA tensors, keys and values never leave the GPU and are never moved by a
step.

Batch 1: an engine reads exactly the valid rows of each partition and writes the new row right behind those that grow. Larger batches: it reads
whole buffers under a length mask, and the new rows are put in place by one indexed copy per buffer. A flush (KIVI, ZipCache) is an engine of its own,
run when enough rows wait, never inside a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...graph.kv_format import APPENDED, BITS, FLOAT, KVFormat, Partition
from ..errors import CacheFullError, LowerError
from ._cache import check_prefix
from ._kv_check import check_finite, clip_rate
from ._trt_cache import is_codes, unpack
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
AXES = {
    "context_ids": ("batch", "context"),
    "image_features": (None, "visual"),
    "input_ids": ("batch", "sequence"),
    "past_k.": ("batch", "past"),
    "pixel_values": ("images",),
}


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
    """Token-major buffers by name, as the stages lay them out: codes and rows [B, capacity, G, D] ("k.0", "k.0.lo"), scales and centres beside
    them ("k.0.lo.scale"), convolution states, the slots of windowed layers' rows, and the newest queries where a flush asks for them ("q.0").

    parts: "lengths" and "lengths.<partition>" [L, B]: rows that are valid. Codes of less than a byte are packed.
    """

    def __init__(self, formats: dict[int, KVFormat], parts: dict[str, np.ndarray], slot: Tensor, buffers: dict[str, Tensor]) -> None:
        self.formats, self.layers = formats, list(formats)
        self.parts, self.slot, self.buffers = parts, slot, buffers  # slot [B, 1]: the index of the next token
        self.lengths = parts["lengths"]
        self.start = self.lengths.copy()  # rows of the prompt

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for n, t in self.buffers.items() if not n.startswith("q."))

    def clip_rate(self) -> float | None:
        return clip_rate(self.formats, self.start, self.lengths, self._codes)

    def _codes(self, name: str) -> np.ndarray:
        """past_k.0 -> codes int8[B, G, C, D]"""
        layer, held = int(name.split(".")[1]), self.buffers[name.removeprefix("past_")]
        bits = BITS[self.formats[layer].partitions[0].code]
        codes = unpack(held, bits, torch.float32).to(torch.int8) if bits < 8 else held
        return codes.transpose(1, 2).cpu().numpy()

    def take(self, samples: np.ndarray) -> TrtCache:
        index = torch.as_tensor(samples, device=self.slot.device)
        buffers = {n: t.index_select(0, index) for n, t in self.buffers.items()}
        return TrtCache(self.formats, {n: a[:, samples].copy() for n, a in self.parts.items()}, self.slot.index_select(0, index), buffers)

    def tensors(self, layer: int) -> Iterator[tuple[str, Partition, int]]:
        """Every buffer of a layer's partitions that rows go into: (name, partition, tokens per row; 0 = one row for all tokens)."""
        for part in self.formats[layer].partitions:
            for which in "kv":
                name, per = f"{which}.{layer}{part.suffix()}", part.per(which)
                yield name, part, 1
                for state in part.states(which):
                    shared = state == "balance" or per == "channel"
                    yield f"{name}.{state}", part, 0 if shared else part.block(which) or 1

    def used(self, row: int, layer: int) -> dict[str, Tensor]:
        """Of the one sample: exactly the rows that are valid."""
        found = {}
        for name, part, tokens in self.tensors(layer):
            rows = int(self.parts[f"lengths{part.suffix()}"][row, 0])
            found[name] = self.buffers[name][:, : -(-rows // tokens)] if tokens else self.buffers[name]
        return found


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
            self.context.set_tensor_address(name, tensor.data_ptr() or held[0].data_ptr())  # a partition without rows has no memory
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

    def __init__(self, target: str, artifact: Artifact, stages: dict[str, Any], device: str = "cuda") -> None:
        self.target, self.artifact, self.stages, self.device = target, artifact, stages, device
        self.formats = {int(e["layer"]): KVFormat.read(e.get("format")) or FLOAT for e in artifact.manifest["kv"]}
        self.layers = list(self.formats)

    @property
    def limit(self) -> int | None:  # type: ignore[override]
        """Rows that the decode engine's profile has room for."""
        profile = self.artifact.manifest["components"]["decode"]["profile"]
        return min((high[1] for n, (_, _, high) in profile.items() if is_codes(n)), default=None)

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
        grown = {n for n in self.stages["decode"].outputs if n.startswith(("k.", "v."))}

        def place(name: str, shape: tuple[int, ...]) -> Tensor | None:
            """Rows of one sample are contiguous: they are written straight into the buffer."""
            if name not in grown:
                return None
            rows = shape[1] + self._spare(name, spare)
            if is_codes(name):
                self._fits_cache(rows)
            buffers[name] = torch.zeros((shape[0], rows, *shape[2:]), dtype=types[name], device=self.device)
            return buffers[name] if shape[0] == 1 else None

        results = self.stages["prefill"](given, place)
        for name, buffer in buffers.items():
            if results[name] is not buffer:
                buffer[:, : results[name].shape[1]] = results[name]
        for name, value in results.items():
            check_finite(name, value)
            if name.startswith(("k.", "v.", "conv.")) and name not in buffers:
                buffers[name] = value
            elif name.startswith("kv_pos."):
                buffers[name] = torch.nn.functional.pad(value, (0, spare))
        parts = {n.removeprefix("kv_"): results[n].cpu().numpy().astype(np.int64) for n in results if n.startswith("kv_lengths")}
        cache = TrtCache(self.formats, parts, given["attention_mask"].sum(1, keepdim=True), buffers)
        hidden = ("k.", "v.", "conv.", "kv_pos.")
        return _to_host({n: t for n, t in results.items() if not n.startswith(hidden)}), cache

    def _spare(self, name: str, spare: int) -> int:
        """Rows to come before the partition is full or flushed."""
        form = self.formats[int(name.split(".")[1])]
        return min(spare, form.residual + form.keep + 1) if form.residual else spare

    def decode(self, cache: TrtCache, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:  # type: ignore[override]
        if "flush" in self.stages:
            self._flush(cache)
        stage = self.stages["decode"]
        lengths = {n: torch.from_numpy(np.ascontiguousarray(a)).to(self.device) for n, a in cache.parts.items()}
        feeds = {"input_ids": self._device(input_ids), "position_ids": self._device(position_ids), "slot": cache.slot, **lengths}
        one = input_ids.shape[0] == 1
        places: dict[str, Tensor] = {}
        for row, layer in enumerate(cache.layers):
            used = int(cache.lengths[row].max())
            if used >= cache.buffers[f"k.{layer}"].shape[1]:
                raise CacheFullError(
                    f"{self.target}: decode: the cache of layer {layer} is full after {used} rows; ask prefill for more capacity"
                )
            held = cache.used(row, layer) if one else {n: cache.buffers[n] for n, _, _ in cache.tensors(layer)}
            feeds |= {f"past_{n}": t for n, t in held.items()}
            if one:
                places |= {n: cache.buffers[n][:, used : used + 1] for n in held if n in stage.outputs}
            if (slots := cache.buffers.get(f"kv_pos.{layer}")) is not None:
                feeds[f"past_pos.{layer}"] = slots[:, :used] if one else slots
        feeds |= {n: t for n, t in cache.buffers.items() if n.startswith("conv.")}
        outside(self.artifact, self.target, "decode", {n: tuple(feeds[n].shape) for n in stage.inputs})
        results = stage(feeds, lambda name, shape: places.get(name))
        self._advance(cache, results, lengths["lengths"], one)
        return results["logits"].float().cpu().numpy()

    def _advance(self, cache: TrtCache, results: dict[str, Tensor], lengths: Tensor, one: bool) -> None:
        """New rows into place (batch 1: they are), slots and states forward."""
        samples = torch.arange(lengths.shape[1], device=self.device)
        for row, layer in enumerate(cache.layers):
            if not one:
                for name in [n for n in results if n.startswith((f"k.{layer}", f"v.{layer}")) and int(n.split(".")[1]) == layer]:
                    cache.buffers[name][samples, lengths[row]] = results[name][:, 0]
            if f"kv_pos.{layer}" in cache.buffers:
                cache.buffers[f"kv_pos.{layer}"][samples, lengths[row]] = cache.slot[:, 0]
        for name in [n for n in results if n.startswith(("conv.", "q."))]:
            cache.buffers[name] = results[name]
        cache.slot = cache.slot + 1
        cache.lengths += 1

    def _flush(self, cache: TrtCache) -> None:
        """Where enough appended rows wait, store the oldest in their partitions: one run of the flush engine for all samples, outside the step."""
        due = {}
        for row, layer in enumerate(cache.layers):
            form = self.formats[layer]
            ready = np.flatnonzero(cache.lengths[row] >= form.residual + form.keep) if form.residual else np.zeros(0, np.int64)
            if ready.size:
                due[row, layer] = ready
        if not due:
            return
        feeds = {}
        for name in self.stages["flush"].inputs:
            value, rows = cache.buffers[name.removeprefix("past_")], self.formats[int(name.split(".")[1])].residual
            if is_codes(name):  # the oldest; a layer that is not due may have fewer
                value = torch.nn.functional.pad(value[:, :rows], (0, 0, 0, 0, 0, max(rows - value.shape[1], 0)))
            feeds[name] = value
        out = self.stages["flush"](feeds, _nowhere)
        for (row, layer), samples in due.items():
            self._settle(cache, row, layer, samples, out)

    def _settle(self, cache: TrtCache, row: int, layer: int, samples: np.ndarray, out: dict[str, Tensor]) -> None:
        """Flushed rows behind those that their partitions hold, the waiting ones to the front."""
        form = self.formats[layer]
        for partition, rows in form.flush:
            lengths = cache.parts[f"lengths.{partition}"]
            for name, part, tokens in cache.tensors(layer):
                if part.name != partition or name not in out:
                    continue
                value = out[name]
                more = int(lengths[row, samples].max()) // tokens + value.shape[1] - cache.buffers[name].shape[1]
                if more > 0:  # twice the room, so that growing stays rare
                    wider = max(more, cache.buffers[name].shape[1])
                    cache.buffers[name] = torch.nn.functional.pad(cache.buffers[name], (0, 0, 0, 0, 0, wider))
                for b in samples:
                    start = int(lengths[row, b]) // tokens
                    cache.buffers[name][b, start : start + value.shape[1]] = value[b]
            lengths[row, samples] += rows
        for name, part, tokens in cache.tensors(layer):
            if part.name == APPENDED and tokens:
                for b in samples:
                    waiting = cache.buffers[name][b]
                    waiting[: -form.residual] = waiting[form.residual :].clone()
        cache.lengths[row, samples] -= form.residual

    def _fits_cache(self, rows: int) -> None:
        most = self.limit
        if most is not None and rows > most:
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
        return {n: self._device(feeds[n]).to(self.stages[stage].types[n]) for n in wanted}

    def _device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)

    def close(self) -> None:
        self.stages.clear()


def _nowhere(name: str, shape: tuple[int, ...]) -> None:
    """No output has a place of its own."""


def _to_host(tensors: Mapping[str, Tensor]) -> Arrays:
    """numpy copies; bfloat16 has no numpy type and comes as float32."""
    return {n: (t.float() if t.dtype in (torch.bfloat16, torch.float16) else t).cpu().numpy() for n, t in tensors.items()}


def _gpu() -> str | None:
    from .trt import _gpu as of_torch

    return of_torch()
