"""Program: the stages of a captured VLM, the facts about it, and its KV table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from . import ops  # noqa: F401  (whoever holds a program needs the dialect registered)
from .errors import GraphError
from .kv_format import KVFormat

STAGES = ("vision", "prefill", "decode")


@dataclass
class Stage:
    """One graph with named inputs and outputs. Parameters are `get_attr` nodes; every node carries `meta["val"]` (a fake tensor or SymInt).

    `module(*inputs)` runs it eagerly and is differentiable. Inputs are the placeholders in order; the output is a flat tuple.
    """

    module: GraphModule
    outputs: list[str]

    @property
    def graph(self) -> torch.fx.Graph:
        return self.module.graph

    @property
    def inputs(self) -> list[str]:
        return [n.meta.get("name", n.name) for n in self.graph.nodes if n.op == "placeholder"]

    def placeholder(self, name: str) -> Node:
        for n in self.graph.nodes:
            if n.op == "placeholder" and n.meta.get("name", n.name) == name:
                return n
        raise GraphError(f"stage: no input {name!r}; it has {self.inputs}")

    @property
    def output_nodes(self) -> dict[str, Node]:
        """name -> the node that is returned under it"""
        values = next(n for n in reversed(self.graph.nodes) if n.op == "output").args[0]
        return dict(zip(self.outputs, values, strict=True))

    def add_output(self, name: str, node: Node) -> None:
        out = next(n for n in reversed(self.graph.nodes) if n.op == "output")
        out.args = ((*out.args[0], node),)
        self.outputs.append(name)

    def add_input(self, name: str, value: torch.Tensor) -> Node:
        """A new last input of this type (`value` is fake, of the stage's own mode); the one of that name if it is there already."""
        if name in self.inputs:
            known = self.placeholder(name)
            if str(tuple(known.meta["val"].shape)) != str(tuple(value.shape)):
                raise GraphError(f"stage: input {name!r} is {tuple(known.meta['val'].shape)} already, not {tuple(value.shape)}")
            return known
        last = [n for n in self.graph.nodes if n.op == "placeholder"][-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name.replace(".", "_"))
        node.meta |= {"name": name, "val": value}
        return node

    def run(self, feeds: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """feeds by input name -> outputs by name; a missing or unknown name is an error."""
        names = self.inputs
        if set(names) != set(feeds):
            raise GraphError(f"stage: inputs missing {sorted(set(names) - set(feeds))}, unknown {sorted(set(feeds) - set(names))}")
        return dict(zip(self.outputs, self.module(*[feeds[n] for n in names]), strict=True))

    def clone(self) -> Stage:
        """A copy of the graph over the same parameters."""
        graph = torch.fx.Graph()
        graph.output(graph.graph_copy(self.graph, {}))
        return Stage(GraphModule(self.module, graph), list(self.outputs))


@dataclass(frozen=True)
class KVLayer:
    """One cached attention layer. `length` is the number of rows after prefill, as an expression in the prefill's symbols (S, N); of a
    format with several partitions, those of the one that decode appends to."""

    layer: int
    heads: int
    head_dim: int
    value_dim: int
    length: str = "S"
    format: KVFormat | None = None  # None: as the model computes
    window: int = 0
    segment: int = 0  # layers of one segment hold the same tokens


@dataclass(frozen=True)
class Facts:
    """What is true of the model and is needed at run time, where there is no modelling code. All JSON-able."""

    model_type: str
    image_token_id: int
    eos_token_ids: tuple[int, ...]
    vocab_size: int
    hidden_size: int
    layers: int
    layer_path: str  # regex over nn_module_stack paths; group 1 is the layer index
    vision_layer_path: str = ""
    dtype: str = "float32"
    positions: dict[str, Any] = field(default_factory=lambda: {"kind": "linear"})  # how the runtime makes position_ids
    features: tuple[str, ...] = ("image_features",)  # per-image outputs of vision that prefill takes, each [B, N, D]
    vision_grid: tuple[int, int] | None = None  # patches (rows, columns) per image, when fixed
    has_cls: bool = False  # vision tokens start with a CLS token
    tokens_per_image: int | None = None  # what the processor writes into the prompt, when fixed
    features_per_image: int | None = None  # what the vision stage returns now (a pass may lower it); None = as the processor says
    min_visual: int = 0  # the prefill needs at least this many visual rows (the runtime pads with empty ones)
    prefill_extra: tuple[str, ...] = ()  # family inputs of prefill beyond the contract
    vision_extra: tuple[str, ...] = ()  # inputs of vision that a pass asked for and no processor makes: a text vector, a saliency map
    context: dict[str, Any] = field(default_factory=dict)  # which text the prefill reads compressed (passes/methods/context_registers.py); {}: none
    geometry: dict[str, Any] = field(default_factory=dict)  # of a picture, baked into vision: what the processor must say of every picture
    notes: tuple[str, ...] = ()

    @property
    def visual_per_image(self) -> int | None:
        """Rows that one image brings to the prefill now, when fixed."""
        return self.tokens_per_image if self.features_per_image is None else self.features_per_image


@dataclass(frozen=True)
class PassRecord:
    """One line of a program's history."""

    name: str
    parameters: dict[str, Any]
    changed: bool
    nodes: tuple[int, int]
    tokens: dict[str, str]  # layer -> expression of its sequence length after the pass
    ms: float


@dataclass
class Program:
    """Stages + facts + KV table + history. Passes edit the graphs in place and replace the facts."""

    stages: dict[str, Stage]
    facts: Facts
    kv: list[KVLayer]
    history: list[PassRecord] = field(default_factory=list)
    example: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # stage -> real inputs it was captured with

    def __getitem__(self, stage: str) -> Stage:
        try:
            return self.stages[stage]
        except KeyError:
            raise GraphError(f"program: no stage {stage!r}; it has {list(self.stages)}") from None

    def clone(self) -> Program:
        """Independent graphs over shared parameters."""
        return replace(self, stages={n: s.clone() for n, s in self.stages.items()}, kv=list(self.kv), history=list(self.history), example=dict(self.example))

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every distinct parameter or buffer once, by its first name."""
        seen: set[int] = set()
        for stage in self.stages.values():
            for name, tensor in [*stage.module.named_parameters(), *stage.module.named_buffers()]:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield name, tensor
