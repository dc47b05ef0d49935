"""torch itself: the oracle that every other target is compared with. Graphs as JSON, weights as safetensors, CPU or CUDA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...graph.kv_format import APPENDED, BITS, FLOAT, KVFormat, Partition
from ..errors import LowerError
from ._cache import check_prefix
from ._kv_check import check_finite, clip_rate
from .base import Arrays, Backend, Cache, Engine

if TYPE_CHECKING:
    import torch

    from ...graph.program import Program
    from ..artifact import Artifact

WEIGHTS = "components/weights.safetensors"
ATTENTIONS = ("reference", "sdpa", "triton")


class Eager(Backend):
    """target "eager". options: device ("cpu", "cuda"), precision (float32, float16, bfloat16), attention ("reference" bodies, or
    torch's "sdpa", or "triton": sdpa, and decode by the fused kernel over quantized caches)."""

    name = "eager"
    fuses = frozenset()
    options: ClassVar[Mapping[str, Any]] = {"device": "cpu", "precision": "float32", "attention": "reference"}

    def available(self) -> str | None:
        try:
            import torch  # noqa: F401
        except ImportError as cause:
            return f"torch cannot be imported: {cause}"
        return None

    def check(self, program: Program, options: Mapping[str, Any]) -> list[str]:
        import torch

        settings = self.settings(options)
        found = []
        if settings["attention"] not in ATTENTIONS:
            found.append(f"eager: attention={settings['attention']!r} is none of {list(ATTENTIONS)}")
        if settings["attention"] == "triton":
            from ..kernels.kv_attention import available

            found += [f"eager: attention='triton': {why}" for why in [available()] if why]
        if str(settings["device"]).startswith("cuda") and not torch.cuda.is_available():
            found.append(
                "eager: device 'cuda' was asked for and torch sees no CUDA device here; the artifact can be built with device 'cpu'"
            )
        return found

    def lower(self, program: Program, folder: Path, options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        from safetensors.torch import save_file

        from ..fx_json import to_json
        from ..precision import to_precision
        from ..to_onnx import dim_names

        settings = self.settings(options)
        if limits := self.check(program, settings):
            raise LowerError("; ".join(limits))
        if settings["precision"] != program.facts.dtype:
            program = to_precision(program, settings["precision"])
        tensors, keys = _tensors(program)
        (folder / "components").mkdir(parents=True, exist_ok=True)
        save_file(tensors, str(folder / WEIGHTS))
        components = {}
        for name, stage in program.stages.items():
            file = f"components/{name}.json"
            (folder / file).write_text(json.dumps(to_json(stage, keys[name])))
            names = dim_names(stage)
            components[name] = {
                "file": file,
                "weights": WEIGHTS,
                "device": settings["device"],
                "attention": settings["attention"],
                "inputs": [_describe(n.meta.get("name", n.name), n.meta["val"], names) for n in stage.graph.nodes if n.op == "placeholder"],
                "outputs": [_describe(o, n.meta["val"], names) for o, n in stage.output_nodes.items()],
            }
        return components

    def open(self, artifact: Artifact) -> EagerEngine:
        return EagerEngine(artifact)


def _tensors(program: Program) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, str]]]:
    """Every distinct tensor once, by the first name it has; per stage: get_attr target -> that name."""
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    keys: dict[str, dict[str, str]] = {}
    for name, stage in program.stages.items():
        keys[name] = {}
        for node in stage.graph.nodes:
            if node.op != "get_attr":
                continue
            value: Any = stage.module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            if value.device.type == "meta":
                raise LowerError(f"eager: {node.target} has no data (device meta); load the model's weights first")
            if id(value) not in first:
                key = str(node.target)
                while key in tensors:  # a constant of the same name in another stage
                    key += "_"
                first[id(value)] = key
                tensors[key] = value.detach().contiguous()
            keys[name][str(node.target)] = first[id(value)]
    return _unshared(tensors), keys


def _unshared(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """safetensors refuses tensors that share memory: all but the first of a storage are copied."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        pointer = tensor.untyped_storage().data_ptr()
        if pointer in seen or tensor.numel() * tensor.element_size() != tensor.untyped_storage().nbytes():
            tensors[name] = tensor.clone()
        seen.add(pointer)
    return tensors


def _describe(name: str, val: torch.Tensor, names: Mapping[str, str]) -> dict[str, Any]:
    from ..to_onnx import dim_name

    return {"name": name, "dtype": str(val.dtype).removeprefix("torch."), "shape": [dim_name(s, names) for s in val.shape]}


class EagerCache(Cache):
    """past_*, conv.* by the decode stage's names, on the device, zero where nothing was written; sub-byte codes are packed."""

    def __init__(self, engine: EagerEngine, values: dict[str, torch.Tensor], parts: dict[str, np.ndarray], slot: torch.Tensor) -> None:
        self.engine, self.layers = engine, engine.layers
        self.values, self.parts, self.slot = values, parts, slot
        self.lengths = parts["lengths"]
        self.start = self.lengths.copy()  # rows of the prompt

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for n, t in self.values.items() if not n.startswith("q."))

    def clip_rate(self) -> float | None:
        return clip_rate(self.engine.formats, self.start, self.lengths, lambda n: self.engine.read(n, self.values[n]).cpu().numpy())

    def take(self, samples: np.ndarray) -> EagerCache:
        index = self.engine.torch.as_tensor(samples).to(self.slot.device)
        values = {n: t.index_select(0, index) for n, t in self.values.items()}
        return EagerCache(self.engine, values, {n: a[:, samples].copy() for n, a in self.parts.items()}, self.slot.index_select(0, index))


class EagerEngine(Engine):
    """The stored graphs as torch modules; `modules[stage]` may be replaced (torch.compile)."""

    def __init__(self, artifact: Artifact, device: str | None = None, attention: str | None = None) -> None:
        import torch
        from safetensors.torch import load_file

        from ..fx_json import from_json

        self.torch = torch
        self.parts = artifact.manifest["components"]
        any_part = next(iter(self.parts.values()))
        self.device = torch.device(device or any_part["device"])
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise LowerError(f"eager: {artifact.path.name} was made for device {any_part['device']!r} and torch sees no CUDA device here")
        attention = attention or any_part["attention"]
        tensors = load_file(str(artifact.file(WEIGHTS)), device=str(self.device))
        self._know(artifact.manifest["kv"])
        self.modules: dict[str, Any] = {}
        self.names: dict[str, tuple[list[str], list[str]]] = {}
        for stage, part in self.parts.items():
            fused = attention == "triton" and stage == "decode"
            replace = {torch.ops.foveate.attention.default: sdpa} if attention != "reference" and not fused else {}
            module, inputs, outputs = from_json(json.loads(artifact.file(part["file"]).read_text()), tensors, self.device, replace)
            if fused:
                from ..kernels.fuse import fuse

                fuse(module)
            self.modules[stage], self.names[stage] = module, (inputs, outputs)

    def _know(self, table: list[dict[str, Any]]) -> None:
        """table: the KV table as the manifest has it."""
        self.layers = [int(entry["layer"]) for entry in table]
        self.formats = {int(e["layer"]): KVFormat.read(e.get("format")) or FLOAT for e in table}
        self.packed = _packed(self.formats)

    @classmethod
    def of(cls, program: Program) -> EagerEngine:
        """The stages of a program where they are, over its own parameters, nothing written: what bisection and golden files run."""
        import torch

        from ..to_onnx import dim_names

        engine = cls.__new__(cls)
        engine.torch, engine.parts = torch, {}
        for name, stage in program.stages.items():
            names = dim_names(stage)
            sides = {"inputs": [(n.meta.get("name", n.name), n) for n in stage.graph.nodes if n.op == "placeholder"], "outputs": stage.output_nodes.items()}
            engine.parts[name] = {side: [_describe(n, node.meta["val"], names) for n, node in nodes] for side, nodes in sides.items()}
        engine.device = next((t.device for _, t in program.parameters()), torch.device("cpu"))
        if engine.device.type == "meta":
            raise LowerError("eager: the weights have no data (device meta); load the model's weights first")
        engine._know([asdict(entry) for entry in program.kv])
        engine.modules = {name: stage.module for name, stage in program.stages.items()}
        engine.names = {name: (stage.inputs, stage.outputs) for name, stage in program.stages.items()}
        return engine

    def run(self, stage: str, feeds: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """One stage on tensors or arrays, everything by name."""
        inputs, outputs = self.names[stage]
        if missing := [n for n in inputs if n not in feeds]:
            raise LowerError(f"eager: {stage} lacks the inputs {missing}; given are {sorted(feeds)}")
        types = {i["name"]: getattr(self.torch, i["dtype"]) for i in self.parts[stage]["inputs"]}
        values = [self.torch.as_tensor(feeds[n]).to(self.device, types[n]) for n in inputs]
        with self.torch.no_grad():
            return dict(zip(outputs, self.modules[stage](*values), strict=True))

    def vision(self, feeds: Arrays) -> Arrays:
        return {n: _array(t) for n, t in self.run("vision", feeds).items()}

    def prefill(self, feeds: Arrays, capacity: int) -> tuple[Arrays, EagerCache]:
        check_prefix(feeds["attention_mask"])
        out = self.run("prefill", feeds)
        spare = max(capacity - feeds["input_ids"].shape[1], 1)
        inputs = self.names["decode"][0]
        values, lengths = {}, {"lengths": out["kv_lengths"].cpu().numpy().astype(np.int64)}
        for name in inputs:
            made = f"kv_{name}" if name.startswith("lengths") else name.removeprefix("past_")
            made = f"kv_{made}" if made.startswith("pos.") else made
            if made not in out:
                continue
            if name.startswith("lengths"):
                lengths[name] = out[made].cpu().numpy().astype(np.int64)
            elif name.startswith("conv."):
                values[name] = out[made]
            else:
                check_finite(made, out[made])
                values[name] = self._stored(name, out[made])
        slot = self.torch.as_tensor(feeds["attention_mask"]).sum(1, keepdim=True).to(self.device)
        cache = EagerCache(self, values, lengths, slot)
        self._make_room(cache, spare)
        return {n: _array(t) for n, t in out.items() if n.partition(".")[0] not in ("k", "v", "conv", "kv_pos")}, cache

    def _stored(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What the cache holds of a past."""
        return self.torch.ops.foveate.pack_kv(value, self.packed[name]) if name in self.packed else value

    def _make_room(self, cache: EagerCache, spare: int) -> None:
        """Buffers for `spare` more tokens: the appended partition grows, those a flush fills too; the others are cut to what they hold."""
        for row, layer in enumerate(self.layers):
            form = self.formats[layer]
            for part in form.partitions:
                held = int(cache.parts[f"lengths{part.suffix()}"][row].max(initial=0))
                if part.name == APPENDED:
                    rows = cache.values[f"past_k.{layer}"].shape[2] + (min(spare, form.residual + 1) if form.residual else spare)
                else:
                    rows = max(held + dict(form.flush).get(part.name, 0) * -(-spare // max(form.residual, 1)), 1)
                self._resize(cache, layer, part, rows)
            if f"past_pos.{layer}" in cache.values:
                cache.values[f"past_pos.{layer}"] = _resized(cache.values[f"past_pos.{layer}"], 1, cache.values[f"past_k.{layer}"].shape[2])

    def _resize(self, cache: EagerCache, layer: int, part: Partition, rows: int) -> None:
        """Codes, and the states that rows bring with them, with room for `rows` rows."""
        for which in "kv":
            name, per, block = f"past_{which}.{layer}{part.suffix()}", part.per(which), part.block(which) or 1
            cache.values[name] = _resized(cache.values[name], 2, rows)
            for state in (s for s in part.states(which) if s != "balance" and per != "channel"):
                cache.values[f"{name}.{state}"] = _resized(cache.values[f"{name}.{state}"], 2, -(-rows // block))

    def read(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """What decode reads of what the cache holds."""
        if name not in self.packed:
            return value
        width = next(i["shape"][3] for i in self.parts["decode"]["inputs"] if i["name"] == name)
        return self.torch.ops.foveate.unpack_kv(value, self.packed[name], width)

    def decode(self, cache: EagerCache, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:  # type: ignore[override]
        if "flush" in self.modules:
            self._flush(cache)
        self._grow(cache)
        past = {n: self.read(n, t) for n, t in cache.values.items()}
        feeds = {"input_ids": input_ids, "position_ids": position_ids, "slot": cache.slot, **cache.parts, **past}
        out = self.run("decode", feeds)
        samples = self.torch.arange(cache.lengths.shape[1], device=self.device)
        at = {layer: self.torch.from_numpy(cache.lengths[row]).to(self.device) for row, layer in enumerate(cache.layers)}
        for name, value in out.items():
            which, _, rest = name.partition(".")
            if which in ("k", "v"):
                cache.values[f"past_{name}"][samples, :, at[int(rest.split(".")[0])]] = self._stored(f"past_{name}", value)[:, :, 0]
            elif which in ("conv", "q"):
                cache.values[name] = value
        for layer in cache.layers:
            if f"past_pos.{layer}" in cache.values:
                cache.values[f"past_pos.{layer}"][samples, at[layer]] = cache.slot[:, 0]
        cache.lengths += 1
        cache.slot = cache.slot + 1
        return _array(out["logits"])

    def _flush(self, cache: EagerCache) -> None:
        """Where enough appended rows wait, move the oldest to their partitions; one run for all samples, each takes what is its own."""
        due = {}
        for row, layer in enumerate(cache.layers):
            form = self.formats[layer]
            ready = cache.lengths[row] >= form.residual + form.keep if form.residual else np.zeros(0, bool)
            if ready.any():
                due[row, layer] = ready
        if not due:
            return
        oldest = {n: t[:, :, : self.formats[int(n.split(".")[1])].residual] if n.count(".") == 1 else t
                  for n, t in cache.values.items() if n.startswith("past_") and n in self.names["flush"][0]}
        out = self.run("flush", {**oldest, **{n: t for n, t in cache.values.items() if n.startswith("q.")}})
        for (row, layer), ready in due.items():
            self._settle(cache, row, layer, np.flatnonzero(ready), out)

    def _settle(self, cache: EagerCache, row: int, layer: int, samples: np.ndarray, out: dict[str, torch.Tensor]) -> None:
        form = self.formats[layer]
        for name, rows in form.flush:
            lengths = cache.parts[f"lengths.{name}"]
            part = next(p for p in form.partitions if p.name == name)
            self._resize(cache, layer, part, max(int(lengths[row][samples].max()) + rows, cache.values[f"past_k.{layer}.{name}"].shape[2]))
            for made in (n for n in out if n.startswith((f"k.{layer}.{name}", f"v.{layer}.{name}"))):
                value = self._stored(f"past_{made}", out[made])
                block = rows // value.shape[2]
                for b in samples:
                    start = int(lengths[row, b]) // block
                    cache.values[f"past_{made}"][b, :, start : start + value.shape[2]] = value[b]
            lengths[row, samples] += rows
        for which in "kv":
            for b in samples:
                waiting = cache.values[f"past_{which}.{layer}"][b]
                waiting[:, : -form.residual] = waiting[:, form.residual :].clone()
        cache.lengths[row, samples] -= form.residual

    def _grow(self, cache: EagerCache) -> None:
        """Room for one more row in every layer (twice the rows)."""
        for row, layer in enumerate(cache.layers):
            have = cache.values[f"past_k.{layer}"].shape[2]
            if int(cache.lengths[row].max(initial=0)) >= have:
                self._resize(cache, layer, self.formats[layer].partitions[0], 2 * have)
                if f"past_pos.{layer}" in cache.values:
                    cache.values[f"past_pos.{layer}"] = _resized(cache.values[f"past_pos.{layer}"], 1, 2 * have)

    def close(self) -> None:
        self.modules.clear()


def _packed(formats: Mapping[int, KVFormat]) -> dict[str, int]:
    """name of a past -> bits, of those that hold several codes to a byte"""
    small = [(layer, part) for layer, form in formats.items() for part in form.partitions if 0 < BITS[part.code] < 8]
    return {f"past_{which}.{layer}{part.suffix()}": BITS[part.code] for layer, part in small for which in "kv"}


def _resized(value: torch.Tensor, axis: int, rows: int) -> torch.Tensor:
    """The tensor with `rows` along `axis`: cut, or with zeros behind."""
    shape = list(value.shape)
    shape[axis] = rows
    room = value.new_zeros(shape)
    kept = min(rows, value.shape[axis])
    room.narrow(axis, 0, kept).copy_(value.narrow(axis, 0, kept))
    return room


def _array(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def sdpa(
    q: Any, k: Any, v: Any, mask: Any, q_pos: Any, k_pos: Any, scale: float, causal: bool, window: int, softcap: float, layer: int
) -> Any:
    """`foveate.attention` by torch's fused kernels where they can say it, by its body elsewhere. Valid rows are a prefix (padding on
    the right)."""
    import torch

    from ...graph.ops import REFERENCE

    square = q.shape[2] == k.shape[2]
    key_mask = mask is not None and mask.dim() == 2
    if softcap or (causal and (window or q_pos is not None or not square or (mask is not None and not key_mask))):
        return REFERENCE[torch.ops.foveate.attention.default](q, k, v, mask, q_pos, k_pos, scale, causal, window, softcap, layer)
    if causal:
        mask = None  # the causal order hides the padding behind every valid row already
    elif key_mask:
        mask = mask[:, None, None, :]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    y = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(causal), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return y.transpose(1, 2).contiguous()
