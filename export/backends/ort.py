"""ONNX Runtime on the CPU: its fused operators, keys and values written in place, weights shared by the stages and mapped from one file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import LowerError
from ..sizes import evaluate
from ._cache import HostCache, check_prefix
from .base import Arrays, Backend, Engine

if TYPE_CHECKING:
    from ...graph.program import Program
    from ..artifact import Artifact

WEIGHTS = "weights.bin"
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class Ort(Backend):
    """target "ort". options: threads (0 = ONNX Runtime's choice), fuse (False keeps the portable spelling, for comparison)."""

    name = "ort"
    fuses = frozenset(
        {"attention", "attention_varlen", "kv_store", "kv_append", "kv_mask", "keep_tokens", "last_token", "splice_image_features"}
    )
    options: ClassVar[Mapping[str, Any]] = {"threads": 0, "fuse": True}

    def available(self) -> str | None:
        try:
            import onnxruntime
        except ImportError as cause:
            return f"onnxruntime cannot be imported: {cause}"
        if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
            return f"onnxruntime has no CPU provider, only {onnxruntime.get_available_providers()}"
        return None

    def check(self, program: Program, options: Mapping[str, Any]) -> list[str]:
        found = []
        if program.facts.dtype == "bfloat16":
            found.append("ort: the weights are bfloat16, for which the CPU provider has no kernels; load the model in float32")
        return found

    def lower(self, program: Program, folder: Path, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        from ..onnx_weights import WeightFile

        settings = self.settings(options)
        if limits := self.check(program, settings):
            raise LowerError("; ".join(limits))
        (folder / "components").mkdir(parents=True, exist_ok=True)
        with WeightFile(folder / "components" / WEIGHTS) as weights:
            return {name: _lower_stage(program, name, folder, weights, settings) for name in program.stages}

    def open(self, artifact: Artifact) -> OrtEngine:
        return OrtEngine(artifact)


def _lower_stage(program: Program, name: str, folder: Path, weights: Any, settings: dict[str, Any]) -> dict[str, Any]:
    from ..expand import expand
    from ..onnx_contrib import Contrib
    from ..onnx_dialect import PORTABLE
    from ..onnx_registry import EMITTERS
    from ..to_onnx import dim_name, dim_names, save, to_onnx

    stage = expand(program[name], {**EMITTERS, **PORTABLE})
    contrib = Contrib(stage, decode=name == "decode", segments=[entry.segment for entry in program.kv])
    model = to_onnx(stage, name, weights, at=contrib.emitters if settings["fuse"] else None)
    file = f"components/{name}.onnx"
    save(model, folder / file)
    names = dim_names(stage)
    rows = (
        {str(e.layer): dim_name(stage.output_nodes[f"k.{e.layer}"].meta["val"].shape[2], names) for e in program.kv}
        if name == "prefill"
        else {}
    )
    return {
        "file": file,
        "weights": f"components/{WEIGHTS}",
        "inputs": _describe(model.graph.input),
        "outputs": _describe(model.graph.output),
        "in_place": sorted(contrib.in_place),
        "rows": rows,
        "threads": settings["threads"],
    }


def _describe(values: Any) -> list[dict[str, Any]]:
    import onnx

    return [
        {
            "name": v.name,
            "dtype": np.dtype(onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type)).name,
            "shape": [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim],
        }
        for v in values
    ]


class OrtEngine(Engine):
    """Sessions of the three stages."""

    def __init__(self, artifact: Artifact, threads: int | None = None) -> None:
        self.manifest = artifact.manifest["components"]
        self.layers = [int(entry["layer"]) for entry in artifact.manifest["kv"]]
        self.sessions = {
            stage: _session(artifact, stage, part["threads"] if threads is None else threads) for stage, part in self.manifest.items()
        }
        self.in_place = {stage: set(part["in_place"]) for stage, part in self.manifest.items()}

    def vision(self, feeds: Arrays) -> Arrays:
        session = self._stage("vision")
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, _wanted(session, feeds)), strict=True))

    def prefill(self, feeds: Arrays, capacity: int) -> tuple[Arrays, HostCache]:
        session = self._stage("prefill")
        check_prefix(feeds["attention_mask"])
        cache = self._new_cache(feeds, capacity)
        binding = _Binding(session)
        for name, array in _wanted(session, {**feeds, **cache.buffers}).items():
            binding.input(name, array)
        plain = []
        for output in session.get_outputs():
            which, _, layer = output.name.partition(".")
            if which in ("k", "v") and int(layer) in self.in_place["prefill"]:
                binding.output(output.name, cache.buffers[f"past_{output.name}"])
            else:
                binding.io.bind_output(output.name, "cpu")
                plain.append(output.name)
        outputs = binding.run(plain)
        self._keep(cache, outputs)
        cache.lengths = outputs["kv_lengths"].astype(np.int64)
        cache.slot = feeds["attention_mask"].sum(1, dtype=np.int64)[:, None]
        return {n: a for n, a in outputs.items() if n.partition(".")[0] not in ("k", "v", "conv", "kv_pos")}, cache

    def _new_cache(self, feeds: Arrays, capacity: int) -> HostCache:
        B, S = feeds["input_ids"].shape
        symbols = {"B": B, "S": S, "N": feeds["image_features"].shape[1]}
        spare = max(capacity - S, 1)
        cache = HostCache(self.layers)
        decode = {i["name"]: i for i in self.manifest["decode"]["inputs"]}
        for layer in self.layers:
            rows = evaluate(self.manifest["prefill"]["rows"][str(layer)], symbols) + spare
            for which in "kv":
                spec = decode[f"past_{which}.{layer}"]
                _, heads, _, width = spec["shape"]
                cache.buffers[spec["name"]] = np.zeros((B, heads, rows, width), spec["dtype"])
            if f"past_pos.{layer}" in decode:
                cache.buffers[f"past_pos.{layer}"] = np.zeros((B, rows), np.int64)
        return cache

    def _keep(self, cache: HostCache, outputs: Arrays) -> None:
        """Move what the prefill returned beside the cache into it."""
        for name, value in outputs.items():
            which, _, layer = name.partition(".")
            if which in ("k", "v"):
                cache.buffers[f"past_{name}"][:, :, : value.shape[2]] = value
            elif which == "kv_pos":
                cache.buffers[f"past_pos.{layer}"][:, : value.shape[1]] = value
            elif which == "conv":
                cache.buffers[name] = np.ascontiguousarray(value)

    def decode(self, cache: HostCache, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:  # type: ignore[override]
        if cache.grow() or cache.bound is None:
            cache.bound = _Step(self._stage("decode"), cache, self.in_place["decode"], input_ids, position_ids)
        return cache.bound.run(input_ids, position_ids)

    def _stage(self, name: str) -> Any:
        if name not in self.sessions:
            raise LowerError(f"ort: the artifact has no stage {name!r}; it has {sorted(self.sessions)}")
        return self.sessions[name]

    def close(self) -> None:
        self.sessions.clear()


class _Step:
    """The decode session bound once to the buffers of a cache: a step copies the new ids in and runs."""

    def __init__(self, session: Any, cache: HostCache, in_place: set[int], input_ids: np.ndarray, position_ids: np.ndarray) -> None:
        self.cache, self.in_place = cache, in_place
        self.binding = _Binding(session)
        self.ids, self.positions = np.array(input_ids, np.int64), np.array(position_ids, np.int64)
        self.lengths, self.slot = cache.lengths.copy(), cache.slot.copy()
        feeds = {"input_ids": self.ids, "position_ids": self.positions, "lengths": self.lengths, "slot": self.slot, **cache.buffers}
        for name, array in _wanted(session, feeds).items():
            self.binding.input(name, array)
        self.outputs: Arrays = {}
        for output in session.get_outputs():
            which, _, layer = output.name.partition(".")
            if which in ("k", "v") and int(layer) in in_place:
                self.binding.output(output.name, cache.buffers[f"past_{output.name}"])
            else:
                shape = [
                    cache.batch if isinstance(s, str) else s for s in output.shape
                ]  # logits, new rows and states: B is the only symbol
                self.outputs[output.name] = np.empty(shape, TYPES[output.type])
                self.binding.output(output.name, self.outputs[output.name])
        self.rest = [layer for layer in cache.layers if layer not in in_place or f"past_pos.{layer}" in cache.buffers]

    def run(self, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        cache = self.cache
        self.ids[...], self.positions[...] = input_ids, position_ids
        self.lengths[...], self.slot[...] = cache.lengths, cache.slot
        self.binding.session.run_with_iobinding(self.binding.io)
        for layer in self.rest:
            cache.write(layer, self.outputs)
        for name, value in self.outputs.items():
            if name.startswith("conv."):
                cache.buffers[name.removesuffix(".out")][...] = value
        cache.advance()
        return self.outputs["logits"].copy()


class _Binding:
    """Host arrays bound to a session by address; they are kept alive here."""

    def __init__(self, session: Any) -> None:
        self.session, self.io = session, session.io_binding()
        self.arrays: list[np.ndarray] = []

    def input(self, name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self.arrays.append(array)
        self.io.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def output(self, name: str, array: np.ndarray) -> None:
        self.arrays.append(array)
        self.io.bind_output(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self, names: Collection[str]) -> Arrays:
        """Run, and copy these outputs out."""
        self.session.run_with_iobinding(self.io)
        return {
            o.name: value.numpy() for o, value in zip(self.session.get_outputs(), self.io.get_outputs(), strict=True) if o.name in names
        }


def _wanted(session: Any, feeds: Arrays) -> Arrays:
    """The feeds that the graph reads, in its types; a missing one is an error."""
    wanted = {}
    for spec in session.get_inputs():
        if spec.name not in feeds:
            raise LowerError(f"ort: input {spec.name!r} is missing; given are {sorted(feeds)}")
        wanted[spec.name] = np.ascontiguousarray(feeds[spec.name], TYPES[spec.type])
    return wanted


def _session(artifact: Artifact, stage: str, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(
            str(artifact.path / artifact.component(stage)["file"]), options, providers=["CPUExecutionProvider"]
        )
    except Exception as cause:
        raise LowerError(
            f"ort: the stage {stage} of {artifact.path.name} cannot be loaded by onnxruntime {onnxruntime.__version__}: {cause}"
        ) from cause
