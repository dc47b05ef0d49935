"""A loaded Hugging Face VLM -> Program: one torch.export per stage, over our attention, mask and cache (families/_hooks.py)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import Dim
from torch.fx import Node

from .errors import GraphError
from .families import family_of
from .families._hooks import DecodeCache, PrefillCache, attention_of, patched, split_known
from .families.base import Family, VisionInputs
from .kv_table import derive_kv
from .program import Facts, KVLayer, Program, Stage
from .stage import from_exported

LONGEST = 1 << 20  # bound of every token dimension


def capture(model: Any, processor: Any = None, *, images: Sequence[Any] | None = None, vision: dict[str, Tensor] | None = None) -> Program:
    """A loaded VLM (any device, or meta for shapes only) as a Program with stages vision, prefill and decode.

    Families whose vision stage has a fixed geometry take it from `images` (PIL images, through `processor`), else from `vision`
    (the processor's own tensors), else from the configuration's image size. Nothing of the model is changed.
    Raises GraphError: a text-only model, a model type without family, a configuration that cannot be captured faithfully.
    """
    family = family_of(model)
    example = _vision_example(family, model, processor, images, vision)
    with attention_of(model), patched([(torch, "split", split_known(torch.split)), *family.patches(model)]), torch.no_grad(), _experts(family, model):
        text = _Text(family, model)
        prefill, decode = text.prefill(), text.decode()
        given = family.vision_inputs(model, family.picture(example, 0) if family.one_picture else example)
        seen = _vision(family, model, given)
    program = Program({"vision": seen, "prefill": prefill, "decode": decode}, _facts(family, model, text, seen, given, example), text.table(prefill),
                      example={"vision": dict(given.tensors), **text.example})
    program.kv = derive_kv(program)
    _check_windows(family, model, program)
    return program


@contextlib.contextmanager
def _experts(family: Family, model: Any) -> Iterator[None]:
    """Mixture-of-experts layers as batched matmuls while this is open: the default has no portable form."""
    if not family.experts(model):
        yield
        return
    before = model.config._experts_implementation
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


# ---- the language model


class _Root(torch.nn.Module):
    """Holds the model's children under their own names, so that parameters and module paths are named as in the checkpoint."""

    def __init__(self, model: torch.nn.Module, names: list[str], body: Callable[[dict[str, Tensor]], dict[str, Tensor]]):
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        self.names, self.body = names, body

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.body(dict(zip(self.names, values, strict=True))).values())


class _Text:
    """Prefill and decode of one model; what prefill's trace finds (cached layers, windows) shapes decode."""

    def __init__(self, family: Family, model: Any):
        self.family, self.model = family, model
        self.config = family.text_config(model)
        self.language = family.language_model(model)
        self.device = next(model.parameters()).device
        self.dtype = family.embedding_dtype(model)
        self.features = family.features_of(model)
        self.example: dict[str, dict[str, Tensor]] = {}
        self.windows: dict[int, int] = {}
        self.cached: dict[int, tuple[int, int, int]] = {}  # layer -> heads, key width, value width
        self.conv: dict[int, tuple[int, int]] = {}  # layer -> channels, width
        self.axes = 3 if family.positions(model)["kind"] == "mrope" else 0

    def _cache_shape(self) -> tuple[int, int]:
        return self.config.num_hidden_layers, int(getattr(self.config, "conv_L_cache", 0) or 0)

    def prefill(self) -> Stage:
        # Comparisons of sizes are decided by the sample while tracing: it is longer than any `keep`, and no dimension of a model is one of these primes.
        B, S, N = 2, 8209, 8101
        batch, seq, visual = Dim("batch", min=1, max=4096), Dim("seq", min=2, max=LONGEST), Dim("visual", min=1, max=LONGEST)
        inputs = {"input_ids": self._integers(B, S)}
        inputs["input_ids"][:, 4: 4 + N] = self.family.image_token_id(self.model)
        shapes: dict[str, dict[int, Any]] = {"input_ids": {0: batch, 1: seq}}
        for name in self.features:
            inputs[name] = torch.zeros(B, N, self.config.hidden_size, dtype=self.dtype, device=self.device)
            shapes[name] = {0: batch, 1: visual}
        inputs["position_ids"], shapes["position_ids"] = self._positions(B, S, batch, seq)
        inputs["attention_mask"] = torch.ones(B, S, dtype=torch.int64, device=self.device)
        shapes["attention_mask"] = {0: batch, 1: seq}
        self.example["prefill"] = self._short(inputs)
        return _export(self.model, inputs, shapes, self._prefill)

    def _short(self, inputs: dict[str, Tensor], S: int = 23, N: int = 11) -> dict[str, Tensor]:
        """A prompt that is cheap to run, from the one that was traced."""
        short = {n: (t[:, :N] if n in self.features else t[..., :S]).clone() for n, t in inputs.items()}
        short["input_ids"][:, 4 + N:] = 1
        return short

    def _prefill(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        valid = feeds["attention_mask"].to(torch.bool)
        ids = feeds["input_ids"]
        windowed = bool(getattr(self.config, "sliding_window", None))
        cache = PrefillCache(*self._cache_shape(), valid, windowed, self.family.bidirectional_prompt)
        with cache.running():
            kwargs = self.family.language_inputs(self.model, ids, {n: feeds[n] for n in self.features}, valid,
                                                 ids == self.family.image_token_id(self.model), feeds["position_ids"], cache)
            hidden = self.language(**kwargs, past_key_values=cache, use_cache=True, return_dict=True).last_hidden_state
        logits = self.family.head(self.model, torch.ops.foveate.last_token(hidden, valid))
        self.windows = dict(cache.windows)
        layers = sorted(cache.k)
        self.cached = {l: (cache.k[l].shape[1], cache.k[l].shape[3], cache.v[l].shape[3]) for l in layers}
        self.conv = {l: (x.shape[1], x.shape[2]) for l, x in sorted(cache.conv.items())}
        out = {"logits": logits, "kv_lengths": torch.stack([cache.lengths[l] for l in layers])}
        for l in layers:
            out[f"k.{l}"], out[f"v.{l}"] = cache.k[l], cache.v[l]
        out |= {f"conv.{l}": cache.conv[l] for l in self.conv}
        return out | {f"kv_pos.{l}": cache.positions[l] for l in sorted(cache.positions)}

    def decode(self) -> Stage:
        B = 2
        batch = Dim("batch", min=1, max=4096)
        inputs = {"input_ids": self._integers(B, 1)}
        shapes: dict[str, dict[int, Any]] = {"input_ids": {0: batch}}
        inputs["position_ids"], shapes["position_ids"] = self._positions(B, 1, batch, None)
        windowed = [l for l in self.cached if self.windows.get(l)]
        inputs["lengths"], shapes["lengths"] = self._integers(len(self.cached), B), {1: batch}
        for i, (l, (heads, width, value)) in enumerate(self.cached.items()):
            P, past = 7 + 2 * i, Dim(f"past{l}", min=1, max=LONGEST)  # unlike each other, so that they stay independent
            for name, size in ((f"past_k.{l}", width), (f"past_v.{l}", value)):
                inputs[name] = torch.zeros(B, heads, P, size, dtype=self.dtype, device=self.device)
                shapes[name] = {0: batch, 2: past}
            if l in windowed:
                inputs[f"past_pos.{l}"], shapes[f"past_pos.{l}"] = self._integers(B, P), {0: batch, 1: past}
        for l, (channels, width) in self.conv.items():
            inputs[f"conv.{l}"], shapes[f"conv.{l}"] = torch.zeros(B, channels, width, dtype=self.dtype, device=self.device), {0: batch}
        if windowed:
            inputs["slot"], shapes["slot"] = self._integers(B, 1), {0: batch}
        self.example["decode"] = inputs
        return _export(self.model, inputs, shapes, self._decode)

    def _decode(self, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        past = {l: (feeds[f"past_k.{l}"], feeds[f"past_v.{l}"]) for l in self.cached}
        past_pos = {l: feeds[f"past_pos.{l}"] for l in self.cached if f"past_pos.{l}" in feeds}
        cache = DecodeCache(*self._cache_shape(), past, feeds["lengths"], {l: feeds[f"conv.{l}"] for l in self.conv}, past_pos, feeds.get("slot"))
        with cache.running():
            kwargs = self.family.decode_inputs(self.model, feeds["input_ids"], feeds["position_ids"])
            hidden = self.language(**kwargs, past_key_values=cache, use_cache=True, return_dict=True).last_hidden_state
        out = {"logits": self.family.head(self.model, hidden[:, -1])}
        for l in self.cached:
            out[f"k.{l}"], out[f"v.{l}"] = cache.k[l], cache.v[l]
        return out | {f"conv.{l}": cache.conv[l] for l in self.conv}

    def table(self, prefill: Stage) -> list[KVLayer]:
        """One row per cached layer, in the order of `lengths`."""
        nodes = prefill.output_nodes
        return [KVLayer(layer=l, heads=heads, head_dim=width, value_dim=value, length=str(nodes[f"k.{l}"].meta["val"].shape[2]),
                        window=self.windows.get(l, 0)) for l, (heads, width, value) in self.cached.items()]

    def _integers(self, *shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.int64, device=self.device)

    def _positions(self, B: int, S: int, batch: Any, seq: Any) -> tuple[Tensor, dict[int, Any]]:
        if self.axes:
            return self._integers(self.axes, B, S), {1: batch} | ({2: seq} if seq is not None else {})
        return self._integers(B, S), {0: batch} | ({1: seq} if seq is not None else {})


# ---- vision


def _vision_example(family: Family, model: Any, processor: Any, images: Sequence[Any] | None, vision: dict[str, Tensor] | None) -> dict[str, Tensor]:
    if vision is not None:
        return vision
    if images is None:
        return family.vision_example(model, images=2)
    if processor is None or not hasattr(processor, "image_processor"):
        raise GraphError("capture: images were given but no processor with an image_processor to prepare them")
    parameter = next(model.parameters())
    made = processor.image_processor(images=list(images), return_tensors="pt")
    return {name: (t.to(parameter.dtype) if t.is_floating_point() else t).to(parameter.device) for name, t in made.items() if isinstance(t, Tensor)}


def _vision(family: Family, model: Any, given: VisionInputs) -> Stage:
    count = Dim("images", min=1, max=65536)
    inputs, shapes = {}, {}
    for name, tensor in given.tensors.items():
        dynamic = name in given.dynamic
        inputs[name] = torch.cat([tensor, tensor]) if dynamic and tensor.shape[0] == 1 else tensor  # a sample of one would fix the dimension
        shapes[name] = {0: count} if dynamic else {}
    names = family.features_of(model)

    def body(feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(zip(names, family.vision(model, feeds, given.baked), strict=True))

    return _export(model, inputs, shapes, body)


# ---- torch.export -> Stage


def _export(model: Any, inputs: dict[str, Tensor], shapes: dict[str, dict[int, Any]], body: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Stage:
    outputs: list[str] = []

    def named(feeds: dict[str, Tensor]) -> dict[str, Tensor]:
        out = body(feeds)
        outputs[:] = out
        return out

    root = _Root(model, list(inputs), named).eval()
    exported = torch.export.export(root, tuple(inputs.values()), dynamic_shapes={"values": tuple(shapes.values())}, strict=False)
    if any(isinstance(n.target, OpOverload) and n.target._schema.is_mutable and "detach_" not in str(n.target) for n in exported.graph.nodes):
        exported = exported.run_decompositions({})  # in-place writes (qwen3's mrope, pixtral's block mask) become functional
    return from_exported(exported, list(inputs), outputs)


# ---- facts


def _facts(family: Family, model: Any, text: _Text, vision: Stage, given: VisionInputs, example: dict[str, Tensor]) -> Facts:
    table = model.get_input_embeddings().weight
    fixed = family.vision_facts(model)
    return Facts(
        model_type=model.config.model_type, image_token_id=family.image_token_id(model), eos_token_ids=_eos(model),
        vocab_size=int(model.get_output_embeddings().weight.shape[0]), hidden_size=int(text.config.hidden_size),
        layers=int(text.config.num_hidden_layers), layer_path=_layer_path(model, text.language), vision_layer_path=_vision_layer_path(vision),
        dtype=str(table.dtype).removeprefix("torch."), positions=family.positions(model), features=text.features,
        vision_grid=fixed.get("vision_grid"), has_cls=fixed.get("has_cls", False), tokens_per_image=family.tokens_per_image(model),
        min_visual=1, geometry=_geometry(given, example), notes=(given.note,) if given.note else ())


def _geometry(given: VisionInputs, example: dict[str, Tensor]) -> dict[str, Any]:
    """What the processor says of one picture and the vision stage has as constants: sizes and grids. Large masks are left out."""
    kept = {n: t[0] for n, t in example.items() if n not in given.tensors and given.baked and not t.is_floating_point() and t.device.type != "meta"}
    return {n: t.tolist() for n, t in kept.items() if t.numel() <= 16}


def _eos(model: Any) -> tuple[int, ...]:
    """generation_config decides, as in `generate`."""
    for config in (getattr(model, "generation_config", None), model.config, model.config.get_text_config()):
        found = getattr(config, "eos_token_id", None)
        if found is not None:
            return tuple(int(i) for i in (found if isinstance(found, (list, tuple)) else [found]))
    return ()


def _layer_path(model: Any, language: Any) -> str:
    """Regex over module paths; group 1 is the layer index."""
    name = next((n for n, m in model.named_modules() if m is language), None)
    if name is None:
        raise GraphError(f"capture: {type(language).__name__} is not a submodule of {type(model).__name__}")
    return rf"{re.escape(name)}\.layers\.(\d+)(?:\.|$)"


def _vision_layer_path(vision: Stage) -> str:
    """The path that the tower's attention nodes share, with the block index as group 1; empty when the tower has no such blocks."""
    found: dict[str, set[str]] = {}
    for node in vision.graph.nodes:
        if node.target in ATTENTIONS:
            for path in module_paths(node):
                for at in re.finditer(r"\.(\d+)(?=\.|$)", path):
                    found.setdefault(path[: at.start()], set()).add(at.group(1))
    if not found:
        return ""
    longest = max(found, key=lambda p: len(found[p]))
    return rf"{re.escape(longest)}\.(\d+)(?:\.|$)"


ATTENTIONS = (torch.ops.foveate.attention.default, torch.ops.foveate.attention_varlen.default)


def module_paths(node: Node) -> list[str]:
    """Paths of the modules that a node was traced in, outermost first."""
    return [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]


def _check_windows(family: Family, model: Any, program: Program) -> None:
    """Every windowed layer of the configuration must be windowed in the graph: a window that got lost changes nothing on short prompts."""
    config = family.text_config(model)
    kinds = getattr(config, "layer_types", None) or []
    for row in program.kv:
        expected = row.layer < len(kinds) and kinds[row.layer] == "sliding_attention"
        if kinds and expected != bool(row.window):
            raise GraphError(f"capture: layer {row.layer} of {model.config.model_type} is {kinds[row.layer]!r} but its attention node has window {row.window}")
