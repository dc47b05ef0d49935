"""torch itself: the oracle that every other target is compared with. Graphs as JSON, weights as safetensors, CPU or CUDA."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ...graph.kv_format import BITS, KVFormat
from ..errors import LowerError
from ._cache import check_prefix
from ._kv_check import check_finite
from .base import Arrays, Backend, Cache, Engine

if TYPE_CHECKING:
    import torch

    from ...graph.program import Program
    from ..artifact import Artifact

WEIGHTS = "components/weights.safetensors"


class Eager(Backend):
    """target "eager". options: device ("cpu", "cuda"), precision (float32, float16, bfloat16), attention ("reference" bodies, or
    torch's "sdpa")."""

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
        if settings["attention"] not in ("reference", "sdpa"):
            found.append(f"eager: attention={settings['attention']!r} is none of ['reference', 'sdpa']")
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

    def __init__(self, layers: list[int], values: dict[str, torch.Tensor], lengths: dict[str, np.ndarray], slot: torch.Tensor) -> None:
        self.layers, self.values, self.parts, self.slot = layers, values, lengths, slot
        self.lengths = lengths["lengths"]
        self.start = self.lengths.copy()  # rows of the prompt

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.values.values())


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
        replace = {torch.ops.foveate.attention.default: sdpa} if (attention or any_part["attention"]) == "sdpa" else {}
        tensors = load_file(str(artifact.file(WEIGHTS)), device=str(self.device))
        self.layers = [int(entry["layer"]) for entry in artifact.manifest["kv"]]
        self.packed = _packed(artifact.manifest["kv"])
        self.modules: dict[str, Any] = {}
        self.names: dict[str, tuple[list[str], list[str]]] = {}
        for stage, part in self.parts.items():
            module, inputs, outputs = from_json(json.loads(artifact.file(part["file"]).read_text()), tensors, self.device, replace)
            self.modules[stage], self.names[stage] = module, (inputs, outputs)

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
        engine.layers = [entry.layer for entry in program.kv]
        engine.packed = _packed([asdict(entry) for entry in program.kv])
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
        inputs, outputs = self.names["decode"]
        values, lengths = {}, {}
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
                values[name] = self._stored(name, out[made], spare if made in outputs or made.startswith("kv_pos.") else 0)
        slot = self.torch.as_tensor(feeds["attention_mask"]).sum(1, keepdim=True).to(self.device)
        cache = EagerCache(self.layers, values, lengths or {"lengths": out["kv_lengths"].cpu().numpy().astype(np.int64)}, slot)
        return {n: _array(t) for n, t in out.items() if n.partition(".")[0] not in ("k", "v", "conv", "kv_pos")}, cache

    def _stored(self, name: str, value: torch.Tensor, spare: int) -> torch.Tensor:
        """What the cache holds of a past: packed, with `spare` empty rows behind."""
        if name in self.packed:
            value = self.torch.ops.foveate.pack_kv(value, self.packed[name])
        axis = 1 if name.startswith("past_pos.") else 2
        return _padded(value, axis, value.shape[axis] + spare) if spare else value

    def _read(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name not in self.packed:
            return value
        width = next(i["shape"][3] for i in self.parts["decode"]["inputs"] if i["name"] == name)
        return self.torch.ops.foveate.unpack_kv(value, self.packed[name], width)

    def decode(self, cache: EagerCache, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:  # type: ignore[override]
        self._grow(cache)
        past = {n: self._read(n, t) for n, t in cache.values.items()}
        feeds = {"input_ids": input_ids, "position_ids": position_ids, "slot": cache.slot, **cache.parts, **past}
        out = self.run("decode", feeds)
        samples = self.torch.arange(cache.lengths.shape[1], device=self.device)
        at = {layer: self.torch.from_numpy(cache.lengths[row]).to(self.device) for row, layer in enumerate(cache.layers)}
        for name, value in out.items():
            which, _, rest = name.partition(".")
            if which in ("k", "v"):
                cache.values[f"past_{name}"][samples, :, at[int(rest.split(".")[0])]] = self._stored(f"past_{name}", value, 0)[:, :, 0]
            elif which == "conv":
                cache.values[name] = value
        for layer in cache.layers:
            if f"past_pos.{layer}" in cache.values:
                cache.values[f"past_pos.{layer}"][samples, at[layer]] = cache.slot[:, 0]
        cache.lengths += 1
        cache.slot = cache.slot + 1
        return _array(out["logits"])

    def _grow(self, cache: EagerCache) -> None:
        grown = [f"past_{n}" for n in self.names["decode"][1] if n.partition(".")[0] in ("k", "v")]
        for row, layer in enumerate(cache.layers):
            have = cache.values[f"past_k.{layer}"].shape[2]
            if int(cache.lengths[row].max(initial=0)) >= have:
                for name in (*grown, f"past_pos.{layer}"):
                    if name in cache.values and int(name.split(".")[1]) == layer:
                        cache.values[name] = _padded(cache.values[name], 1 if name.startswith("past_pos") else 2, 2 * have)

    def close(self) -> None:
        self.modules.clear()


def _packed(table: list[dict[str, Any]]) -> dict[str, int]:
    """name of a past -> bits, of those that hold several codes to a byte"""
    found = {}
    for entry in table:
        form = KVFormat.read(entry.get("format"))
        for part in form.partitions if form else ():
            if 0 < BITS[part.code] < 8:
                found |= {f"past_{which}.{entry['layer']}{part.suffix()}": BITS[part.code] for which in "kv"}
    return found


def _padded(value: torch.Tensor, axis: int, rows: int) -> torch.Tensor:
    """The tensor at the front of a zero one with `rows` along `axis`."""
    shape = list(value.shape)
    shape[axis] = rows
    room = value.new_zeros(shape)
    room.narrow(axis, 0, value.shape[axis]).copy_(value)
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
