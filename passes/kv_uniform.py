"""UniformKV: every row of a layer is stored alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor
from torch.fx import Node

from ..graph.errors import GraphError
from ..graph.kv_format import Partition
from ..graph.program import KVLayer, Program, Stage
from ..graph.retype import fake_mode
from ..graph.splice import splice
from . import kv_codecs
from .kv_calibrate import of_layer, read
from .kv_rows import give, output
from .kv_store import StoreKV


@dataclass(frozen=True)
class UniformKV(StoreKV):
    """One partition. centred: a centre beside every scale. k_per, v_per: what shares a scale: channel, token (of a head), group:<channels of a
    token>. margin: how much wider than the prompt's range a per-channel range is, room for tokens that are yet to come; what exceeds it saturates,
    and the generation's clip rate says how much did.
    A margin of 1.5 would put the prompt's extremes halfway between centred 4-bit codes. A scale per channel is the prompt's and stays; a new
    token brings its own otherwise.
    scales: "prompt", or a file of ranges that `passes/kv_calibrate.py` made from data, for scales per channel that no prompt can shift.
    """

    code: ClassVar[str] = ""

    centred: bool = False
    k_per: str = "channel"
    v_per: str = "channel"
    margin: Annotated[float, Ge(1)] = 1.0
    scales: str = "prompt"

    def partitions(self, entry: KVLayer) -> tuple[Partition, ...]:
        return (Partition("", self.code, self.k_per, self.v_per, self.centred),)

    def widen(self, part: Partition) -> float:
        return self.margin

    def chosen(self, program: Program) -> list[KVLayer]:
        try:
            Partition("", self.code, self.k_per, self.v_per)
        except GraphError as cause:
            raise self.fail(str(cause).removeprefix("kv: ")) from cause
        if self.scales != "prompt" and (self.k_per, self.v_per) != ("channel", "channel"):
            raise self.fail(f"scales={self.scales!r} are per channel, k_per={self.k_per} and v_per={self.v_per} are not both")
        found = super().chosen(program)
        for which, per, widths in (("keys", self.k_per, [e.head_dim for e in found]), ("values", self.v_per, [e.value_dim for e in found])):
            kind, _, size = per.partition(":")
            if kind == "block":
                raise self.fail(f"{which} cannot be stored per {per}: rows are appended one by one; possible are channel, token, group:<channels>")
            if kind == "group" and (bad := [w for w in widths if w % int(size)]):
                raise self.fail(f"{which} have {bad[0]} channels, which groups of {size} do not divide")
        return found

    def emit(self, stage: Stage, entry: KVLayer, which: str, node: Node, valid: Node, part: Partition, held: str, q: Node) -> None:
        if self.scales == "prompt":
            super().emit(stage, entry, which, node, valid, part, held, q)
            return
        low, high = of_layer(read(self.scales), entry, which, self.scales)
        dtype = node.meta["val"].dtype
        ends = torch.stack([low, high], 1)[None].to(dtype)  # [1, G, 2, D]: two rows that span the range
        state = kv_codecs.states(ends, torch.ones(1, 2, dtype=torch.bool), part, which, self.margin)
        constants = [_constant(stage, f"{which}_{entry.layer}_{name}", value) for name, value in zip(part.states(which), state, strict=True)]

        def store(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            return kv_codecs.encode(x, state, part, which), *(s.expand(x.shape[0], -1, -1, -1).clone() for s in state)

        made = splice(stage, output(stage), store, node, *constants)
        for suffix, value in zip(("", *(f".{s}" for s in part.states(which))), made, strict=True):
            give(stage, f"{which}.{entry.layer}{suffix}", value, held)


def _constant(stage: Stage, name: str, value: Tensor) -> Node:
    stage.module.register_buffer(name, value)
    with stage.graph.inserting_before(output(stage)):
        node = stage.graph.get_attr(name)
    node.meta["val"] = fake_mode(stage).from_tensor(value, static_shapes=True)
    return node
