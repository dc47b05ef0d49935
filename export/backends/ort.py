"""ONNX Runtime on the CPU: its fused operators, keys and values written in place, weights shared by the stages and mapped from one file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...graph.kv_format import FLOAT, KVFormat
from ..errors import LowerError
from ..sizes import evaluate
from ._cache import HostCache, check_prefix
from ._kv_check import check_finite
from .base import Arrays, Backend, Engine

if TYPE_CHECKING:
    from ...graph.program import Program
    from ..artifact import Artifact

WEIGHTS = "weights.bin"
BEHIND = 1  # empty rows behind a partition that is only read: GroupQueryAttention always appends one
FULL = 0.95  # a buffer that is less full is cut
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

    def scratch(self, program: Program, options: Mapping[str, Any], sizes: Mapping[str, int]) -> int:
        from ..kv_packing import packed_width

        if not self.settings(options)["fuse"] or program.facts.dtype != "float32":
            return 0
        pasts = {}
        for e in program.kv:
            for part in e.format.partitions if e.format and e.head_dim == e.value_dim and e.head_dim % 8 == 0 else ():
                if (part.code, part.k_per, part.v_per) == ("int2", "channel", "channel"):
                    shape = (1, e.heads, evaluate(part.rows, sizes) + BEHIND, packed_width(e.head_dim, 2))
                    pasts |= {f"past_{w}.{e.layer}{part.suffix()}": np.broadcast_to(np.zeros(1, np.uint8), shape) for w in "kv"}
        return scratch_bytes({name.replace("past_", "wide."): name for name in pasts}, pasts)

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
    from ..kv_packing import pack_codes
    from ..onnx_dialect import PORTABLE
    from ..onnx_kv import KVContrib
    from ..onnx_kv_ops import KV_OPS
    from ..onnx_registry import EMITTERS
    from ..to_onnx import dim_name, dim_names, save, to_onnx

    stage = expand(pack_codes(program[name], program.kv), {**EMITTERS, **PORTABLE, **KV_OPS}).clone()
    contrib = KVContrib(stage, name, program.kv) if settings["fuse"] else None
    model = to_onnx(stage, name, weights, KV_OPS, at=contrib.emitters if contrib else None)
    file = f"components/{name}.onnx"
    save(model, folder / file)
    made = {
        "file": file,
        "weights": f"components/{WEIGHTS}",
        "inputs": _describe(model.graph.input),
        "outputs": _describe(model.graph.output),
        "in_place": contrib.in_place if contrib else [],
        "threads": settings["threads"],
    }
    if name == "prefill":
        names = dim_names(stage)
        made["padded"] = contrib.padded if contrib else []
        made["rows"] = {
            o: dim_name(n.meta["val"].shape[2], names) for o, n in stage.output_nodes.items() if o.partition(".")[0] in ("k", "v")
        }
    if name == "decode":
        made["notes"] = contrib.notes if contrib else []
        made["scratch"] = contrib.scratch if contrib else {}
    return made


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
        self.formats = {int(e["layer"]): KVFormat.read(e.get("format")) or FLOAT for e in artifact.manifest["kv"]}
        self.layers = list(self.formats)
        self.sessions = {
            stage: _session(artifact, stage, part["threads"] if threads is None else threads) for stage, part in self.manifest.items()
        }
        self.pasts = {i["name"]: i for i in self.manifest.get("decode", {"inputs": []})["inputs"] if i["name"].startswith("past_")}

    def vision(self, feeds: Arrays) -> Arrays:
        session = self._stage("vision")
        names = [o.name for o in session.get_outputs()]
        return dict(zip(names, session.run(names, _wanted(session, feeds)), strict=True))

    def prefill(self, feeds: Arrays, capacity: int) -> tuple[Arrays, HostCache]:
        session, part = self._stage("prefill"), self.manifest["prefill"]
        check_prefix(feeds["attention_mask"])
        spare = max(capacity - feeds["input_ids"].shape[1], 1)
        cache = self._new_cache(feeds, spare)
        rows = np.array([cache.buffers[f"past_{name}"].shape[2] for name in part["padded"]], np.int64)
        binding = _Binding(session)
        for name, array in _wanted(session, {**feeds, **cache.buffers, "capacity": rows}).items():
            binding.input(name, array)
        whole = {*part["in_place"], *part["padded"], *(n.removeprefix("past_") for n, spec in self.pasts.items() if _single(spec))}
        plain = []
        for output in session.get_outputs():
            if output.name in whole:
                binding.output(output.name, cache.buffers[f"past_{output.name}"])
            else:
                binding.io.bind_output(output.name, "cpu")
                plain.append(output.name)
        outputs = binding.run(plain)
        self._keep(cache, outputs)
        self._fit(cache, spare)
        for name in (n for n in cache.buffers if n.endswith((".scale", ".center"))):
            check_finite(name.removeprefix("past_"), cache.buffers[name])
        cache.slot = feeds["attention_mask"].sum(1, dtype=np.int64)[:, None]
        return {n: a for n, a in outputs.items() if n.partition(".")[0] not in ("k", "v", "conv", "kv_pos")}, cache

    def _new_cache(self, feeds: Arrays, spare: int) -> HostCache:
        """Room for the rows that the prefill returns, and `spare` more in the partition that grows."""
        B, S = feeds["input_ids"].shape
        symbols = {"B": B, "S": S, "N": feeds["image_features"].shape[1]}
        cache = HostCache(self.formats)
        for name, spec in self.pasts.items():
            cache.buffers[name] = np.zeros([B, *(1 if isinstance(s, str) else s for s in spec["shape"][1:])], spec["dtype"])
        for layer, form in self.formats.items():
            for part in form.partitions:
                more = BEHIND if part.name else min(spare, form.residual + 1) if form.residual else spare
                cache.resize(layer, part, evaluate(self.manifest["prefill"]["rows"][f"k.{layer}{part.suffix()}"], symbols) + more)
        return cache

    def _fit(self, cache: HostCache, spare: int) -> None:
        """A partition that is only read was given a bound; now its rows are known, and those that flushes will bring."""
        for row, layer in enumerate(cache.layers):
            form = self.formats[layer]
            for part in form.partitions[1:]:
                held = int(cache.parts[f"lengths{part.suffix()}"][row].max(initial=0))
                rows = held + dict(form.flush).get(part.name, 0) * -(-spare // max(form.residual, 1)) + BEHIND
                if not FULL * cache.rows(layer, part) <= rows <= cache.rows(layer, part):
                    cache.resize(layer, part, rows)

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
            elif which == "kv_lengths":
                cache.parts[name.removeprefix("kv_")] = value.astype(np.int64)
        cache.start = cache.lengths

    def decode(self, cache: HostCache, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:  # type: ignore[override]
        if "flush" in self.sessions:
            self._flush(cache)
        cache.grow()
        if cache.bound is None:
            cache.bound = _Step(self._stage("decode"), cache, self.manifest["decode"], input_ids, position_ids)
        return cache.bound.run(input_ids, position_ids)

    def _flush(self, cache: HostCache) -> None:
        """Where enough appended rows wait, move the oldest to their partitions; one run for all samples, each takes what is its own."""
        due = cache.due()
        if not due:
            return
        session, feeds = self.sessions["flush"], dict(cache.queries)
        for spec in session.get_inputs():
            if spec.name in cache.buffers:
                waiting = spec.name.count(".") == 1
                feeds[spec.name] = cache.buffers[spec.name][:, :, : self.formats[int(spec.name.split(".")[1])].residual if waiting else None]
        names = [o.name for o in session.get_outputs()]
        flushed = dict(zip(names, session.run(names, _wanted(session, feeds)), strict=True))
        for layer, samples in due.items():
            cache.settle(layer, samples, flushed, BEHIND)

    def _stage(self, name: str) -> Any:
        if name not in self.sessions:
            raise LowerError(f"ort: the artifact has no stage {name!r}; it has {sorted(self.sessions)}")
        return self.sessions[name]

    def close(self) -> None:
        self.sessions.clear()


def _single(spec: Mapping[str, Any]) -> bool:
    """Is the past one row whatever was stored: a scale, centre or balance per channel?"""
    return spec["name"].count(".") > 1 and isinstance(spec["shape"][2], int)


class _Step:
    """The decode session bound once to the buffers of a cache: a step copies the new ids in and runs."""

    def __init__(self, session: Any, cache: HostCache, part: Mapping[str, Any], input_ids: np.ndarray, position_ids: np.ndarray) -> None:
        """part: the manifest's entry of the stage."""
        self.cache, in_place = cache, part["in_place"]
        self.binding = _Binding(session)
        self.ids, self.positions, self.slot = np.array(input_ids, np.int64), np.array(position_ids, np.int64), cache.slot.copy()
        self.lengths = {name: rows.copy() for name, rows in cache.parts.items()}
        feeds = {"input_ids": self.ids, "position_ids": self.positions, "slot": self.slot, **self.lengths, **cache.buffers}
        for name, array in _wanted(session, feeds).items():
            self.binding.input(name, array)
        self.outputs: Arrays = {}
        scratch = share_scratch(part.get("scratch", {}), cache.buffers)  # an older artifact has none
        for output in session.get_outputs():
            if output.name in scratch:
                self.binding.output(output.name, scratch[output.name])
            elif output.name in in_place:
                self.binding.output(output.name, cache.buffers[f"past_{output.name}"])
            else:
                shape = [
                    cache.batch if isinstance(s, str) else s for s in output.shape
                ]  # logits, new rows and states: B is the only symbol
                self.outputs[output.name] = np.empty(shape, TYPES[output.type])
                self.binding.output(output.name, self.outputs[output.name])
        self.rest = [l for l in cache.layers if f"k.{l}" not in in_place or f"past_pos.{l}" in cache.buffers]

    def run(self, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        cache = self.cache
        self.ids[...], self.positions[...], self.slot[...] = input_ids, position_ids, cache.slot
        for name, rows in cache.parts.items():
            self.lengths[name][...] = rows
        self.binding.session.run_with_iobinding(self.binding.io)
        for layer in self.rest:
            cache.write(layer, self.outputs)
        for name, value in self.outputs.items():
            if name.startswith("conv."):
                cache.buffers[name.removesuffix(".out")][...] = value
        cache.queries = {name: value for name, value in self.outputs.items() if name.startswith("q.")}
        cache.advance()
        return self.outputs["logits"].copy()


def share_scratch(outputs: Mapping[str, str], pasts: Arrays) -> Arrays:
    """Arrays for outputs that are as their past but twice as wide: all of keys over one memory, all of values over another.

    Layers use it in turn: a layer is unpacked when its queries are there, and those come from the attention of the layer before.
    """
    memory = {which: np.empty(scratch_bytes(outputs, pasts, which), np.uint8) for which in "kv"}
    made = {}
    for name, past in outputs.items():
        shape = [*pasts[past].shape[:3], 2 * pasts[past].shape[3]]
        made[name] = memory[name.split(".")[1]][: int(np.prod(shape))].reshape(shape)
    return made


def scratch_bytes(outputs: Mapping[str, str], pasts: Arrays, which: str = "kv") -> int:
    """Bytes that a step of decode needs beside the cache, for what it unpacks: twice the keys and twice the values of the largest layer."""
    return sum(max((2 * pasts[past].nbytes for name, past in outputs.items() if name.split(".")[1] == w), default=0) for w in which)


class _Binding:
    """Host arrays bound to a session by address; they are kept alive here."""

    def __init__(self, session: Any) -> None:
        from onnxruntime import OrtValue

        self.session, self.io, self.value_of = session, session.io_binding(), OrtValue.ortvalue_from_numpy
        self.arrays: list[np.ndarray] = []

    def input(self, name: str, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self.arrays.append(array)
        self.io.bind_cpu_input(name, array)  # no copy; a tenth of the time of binding by device and address

    def output(self, name: str, array: np.ndarray) -> None:
        self.arrays.append(array)
        self.io.bind_ortvalue_output(name, self.value_of(array))

    def run(self, names: Collection[str]) -> Arrays:
        """Run, and copy these outputs out."""
        self.session.run_with_iobinding(self.io)
        values, wanted = self.io.get_outputs_as_ortvaluevector(), set(names)
        return {o.name: values[i].numpy() for i, o in enumerate(self.session.get_outputs()) if o.name in wanted}


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
