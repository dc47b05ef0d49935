"""What tests of the lowering share: small stages, programs lowered to open engines, and random prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from foveate.export.artifact import Artifact
from foveate.export.backends import find
from foveate.export.onnx_weights import WeightFile
from foveate.export.to_onnx import output_value, save, to_onnx
from foveate.graph import ops  # noqa: F401  (registers the dialect)
from foveate.graph.program import Program, Stage
from foveate.graph.stage import from_exported


class Call(torch.nn.Module):
    """A function as a module with one output per tensor that it returns."""

    def __init__(self, function: Callable[..., Any], **parameters: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, tensor in parameters.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.function(*inputs, **dict(self.named_parameters()))
        return out if isinstance(out, tuple) else (out,)


def stage_of(function: Callable[..., Any], inputs: tuple[torch.Tensor, ...], dynamic: Any = None, **parameters: torch.Tensor) -> Stage:
    """A stage of one function; dynamic: per input {axis: Dim} or None."""
    module = Call(function, **parameters)
    shapes = None if dynamic is None else {"inputs": tuple(dynamic)}
    exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
    count = len(module(*inputs))
    return from_exported(exported, [f"in{i}" for i in range(len(inputs))], [f"out{i}" for i in range(count)])


def run_onnx(stage: Stage, feeds: dict[str, torch.Tensor], folder: Path, **options: Any) -> dict[str, np.ndarray]:
    """The stage through to_onnx with its weights in a file, on onnxruntime without graph optimisation (what is written is what runs)."""
    with WeightFile(folder / "weights.bin") as weights:
        save(to_onnx(stage, "stage", weights, **options), folder / "stage.onnx")
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(folder / "stage.onnx"), settings, providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    values = session.run([output_value(n, stage.inputs) for n in stage.outputs], {n: t.numpy() for n, t in feeds.items() if n in wanted})
    return dict(zip(stage.outputs, values, strict=True))


def engine(program: Program, folder: Path, target: str, **options: Any) -> Any:
    """The program as an open engine, through an artifact on disk."""
    backend = find(target)
    with Artifact.create(folder / target) as draft:
        components = backend.lower(program, draft.folder, options)
        draft.manifest.update(
            target=target, facts=dataclasses.asdict(program.facts), kv=[dataclasses.asdict(e) for e in program.kv], components=components
        )
    return backend.open(Artifact.load(folder / target))


def prompt(program: Program, batch: int, visual: int, text: int, padding: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    """Random feeds of a prefill: a token, the image, text; the last row is `padding` tokens shorter."""
    generator = torch.Generator().manual_seed(seed)
    facts, length = program.facts, visual + text
    ids = torch.randint(1, facts.vocab_size, (batch, length), generator=generator)
    ids[ids == facts.image_token_id] = 1
    ids[:, 1 : 1 + visual] = facts.image_token_id
    mask = torch.ones_like(ids)
    if padding:
        mask[-1, -padding:] = 0
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions(program, "prefill", torch.arange(length).repeat(batch, 1))}
    feeds |= {name: torch.randn(batch, visual, facts.hidden_size, generator=generator) for name in facts.features}
    return {n: t.numpy() for n, t in feeds.items()}


def positions(program: Program, stage: str, linear: torch.Tensor) -> torch.Tensor:
    """[B, S] as the stage wants it: with three equal axes for multimodal RoPE."""
    rank = program[stage].placeholder("position_ids").meta["val"].dim()
    return linear if rank == 2 else linear[None].repeat(3, 1, 1)


def rollout(program: Program, run: Any, feeds: dict[str, np.ndarray], steps: int, capacity: int = 0) -> tuple[list[np.ndarray], Any]:
    """Logits of the prefill and of `steps` fixed tokens after it, and the cache."""
    batch, length = feeds["input_ids"].shape
    outputs, cache = run.prefill(feeds, capacity or length + steps)
    found = [outputs["logits"]]
    valid = torch.from_numpy(feeds["attention_mask"].sum(1, keepdims=True))
    for i in range(steps):
        ids = np.full((batch, 1), 1 + i % 3)
        found.append(run.decode(cache, ids, positions(program, "decode", valid + i).numpy()))
    return found, cache


def distance(have: list[np.ndarray], want: list[np.ndarray]) -> float:
    """The largest difference, relative to the scale of what is wanted."""
    scale = np.concatenate([w.ravel() for w in want]).std()
    return max(float(np.abs(h - w).max()) for h, w in zip(have, want, strict=True)) / float(scale)
