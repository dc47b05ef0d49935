"""UniformKV: every row of a prompt is stored alike, and every row that comes later."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor
from torch.fx import Node

from ..graph.errors import GraphError
from ..graph.kv_format import APPENDED, Partition
from ..graph.program import KVLayer, Program, Stage
from ..graph.retype import fake_mode
from ..graph.splice import splice
from . import kv_codecs
from .kv_calibrate import of_layer, read
from .kv_codecs import Code
from .kv_rows import gathered, give, newest, output, rows_of, set_lengths
from .kv_store import StoreKV

PROMPT = "lo"  # the partition of the prompt, where what is appended has another code


@dataclass(frozen=True)
class UniformKV(StoreKV):
    """centred: a centre beside every scale. k_per, v_per: what shares a scale: channel, token (of a head), group:<channels of a token>.

    appended: the code of what comes behind the prompt (and of its last token), with a scale per channel; where it is the prompt's own code, both
    are stored together. Later tokens do not keep to the prompt's ranges: in few bits either they are clipped or the steps are too wide, and eight
    bits have room for both. "float": as the model computes them.
    margin: how much wider than the prompt's a range per channel is made for them (none given: 5 in 8 bits, 1.4 in 4); what exceeds it
    saturates, and the generation's clip rate says how much did.
    scales: "prompt", or a file of ranges that `passes/kv_calibrate.py` made from data, for scales per channel that no prompt can shift.
    """

    code: ClassVar[str] = ""

    centred: bool = False
    k_per: str = "channel"
    v_per: str = "channel"
    appended: Code = "int8"
    margin: Annotated[float, Ge(1)] | None = None
    scales: str = "prompt"

    def partitions(self, entry: KVLayer) -> tuple[Partition, ...]:
        if self.appended == self.code or entry.window:  # a sliding window knows its rows by their places, all in one partition
            return (Partition(APPENDED, self.code, self.k_per, self.v_per, self.centred),)
        return Partition(APPENDED, self.appended), Partition(PROMPT, self.code, self.k_per, self.v_per, self.centred)

    def widen(self, part: Partition) -> float:
        return kv_codecs.widen(part.code, not part.name, self.margin)

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

    def prefill(self, program: Program, entry: KVLayer, parts: tuple[Partition, ...]) -> None:
        if len(parts) == 1:
            super().prefill(program, entry, parts)
            return
        stage, rows = program["prefill"], rows_of(program, entry)
        for part, split in zip(parts, (_last, _before), strict=True):
            k, v, held, count = splice(stage, output(stage), split, rows.k, rows.v, rows.valid)
            for which, node, every in (("k", k, rows.k), ("v", v, rows.v)):
                of = () if part.name else (every, rows.valid)
                self.emit(stage, entry, which, node, held, part, f"{self.name}.{entry.segment}", rows.attention.args[0], *of)
            set_lengths(program, entry, part, count)

    def emit(self, stage: Stage, entry: KVLayer, which: str, node: Node, valid: Node, part: Partition, held: str, q: Node, *of: Node) -> None:
        if self.scales == "prompt" or part.code == "float":
            super().emit(stage, entry, which, node, valid, part, held, q, *of)
            return
        low, high = of_layer(read(self.scales), entry, which, self.scales)
        dtype = node.meta["val"].dtype
        ends = torch.stack([low, high], 1)[None].to(dtype)  # [1, G, 2, D]: two rows that span the range
        state = kv_codecs.states(ends, torch.ones(1, 2, dtype=torch.bool), part, which, self.widen(part))
        label = f"{which}_{entry.layer}{part.suffix()}".replace(".", "_")
        constants = [_constant(stage, f"{label}_{name}", value) for name, value in zip(part.states(which), state, strict=True)]

        def store(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            return kv_codecs.encode(x, state, part, which), *(s.expand(x.shape[0], -1, -1, -1).clone() for s in state)

        made = splice(stage, output(stage), store, node, *constants)
        for suffix, value in zip(("", *(f".{s}" for s in part.states(which))), made, strict=True):
            give(stage, f"{which}.{entry.layer}{part.suffix()}{suffix}", value, held)


def _last(k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    """The prompt's last row: an appended partition that held none would have to be read with a mask."""
    return gathered(k, v, newest(valid, 1), 1)


def _before(k: Tensor, v: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    return gathered(k, v, valid & ~newest(valid, 1), valid.shape[1])


def _constant(stage: Stage, name: str, value: Tensor) -> Node:
    stage.module.register_buffer(name, value)
    with stage.graph.inserting_before(output(stage)):
        node = stage.graph.get_attr(name)
    node.meta["val"] = fake_mode(stage).from_tensor(value, static_shapes=True)
    return node
