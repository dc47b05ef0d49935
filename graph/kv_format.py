"""How a layer keeps its keys and values: a list of partitions, and what they weigh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from .errors import GraphError

BITS = {"float": 0, "int8": 8, "int4": 4, "int2": 2, "fp8": 8, "sign": 1, "fsq4": 4}  # of one stored element; float: as the model computes
APPENDED = ""  # the name of the partition that decode writes its rows to


@dataclass(frozen=True)
class Partition:
    """Rows of one layer that are stored alike.

    name: "" for the partition that decode appends to (names `k.l`, `past_k.l`), else the suffix of its names (`k.l.lo`, `past_k.l.lo`).
    code: one of BITS. k_per, v_per: what shares one scale: "channel" [B, G, 1, D]; "token" [B, G, T, 1]; "group:n" [B, G, T, D / n], n
    channels of one token; "block:n" [B, G, ceil(T / n), D], n tokens of one channel. centred: a centre beside every scale. balanced: "k", "v" or "kv": codes
    are of x / balance[B, G, 1, D].
    rows: how many the prefill returns, in its symbols.
    """

    name: str = APPENDED
    code: str = "int8"
    k_per: str = "channel"
    v_per: str = "channel"
    centred: bool = False
    balanced: str = ""
    rows: str = "S"

    def __post_init__(self) -> None:
        if self.code not in BITS:
            raise GraphError(f"kv: no code {self.code!r}; codes are {', '.join(BITS)}")
        for per in (self.k_per, self.v_per):
            kind, _, size = per.partition(":")
            if not (per in ("channel", "token") or (kind in ("group", "block") and size.isdigit() and int(size) > 0)):
                raise GraphError(f"kv: no granularity {per!r}; possible are channel, token, group:<channels>, block:<tokens>")

    def per(self, which: str) -> str:
        return self.k_per if which == "k" else self.v_per

    def block(self, which: str) -> int:
        """Tokens that share a scale, where that is neither one nor all: the `block` of the quantize_kv ops."""
        kind, _, size = self.per(which).partition(":")
        return int(size) if kind == "block" else 0

    def suffix(self) -> str:
        return f".{self.name}" if self.name else ""

    def states(self, which: str) -> tuple[str, ...]:
        """What is stored beside the codes: names of the tensors that follow `k.l<suffix>.`"""
        if self.code == "float":
            return ()
        return ("scale", *(["center"] if self.centred else []), *(["balance"] if which in self.balanced else []))

    def scales(self, which: str, rows: Any, width: int) -> Any:
        """How many scales `rows` tokens of `width` channels of one head have."""
        kind, _, size = self.per(which).partition(":")
        return {"channel": width, "token": rows, "group": rows * -(-width // int(size or 1)), "block": -(-rows // int(size or 1)) * width}[kind]

    def bytes(self, rows: Any, heads: int, head_dim: int, value_dim: int, element: int) -> Any:
        """Of `rows` tokens (a number or an expression) of one sample: codes packed to whole bytes per row, scales, centres."""
        total: Any = 0
        for which, width in (("k", head_dim), ("v", value_dim)):
            row = width * element if self.code == "float" else -(-width * BITS[self.code] // 8)
            states = sum((width if s == "balance" else self.scales(which, rows, width) for s in self.states(which)), 0)
            total = total + heads * (rows * row + states * element)
        return total


@dataclass(frozen=True)
class KVFormat:
    """The partitions of one layer: the one that decode appends to first. Attention reads them all; their order does not matter.

    flush: what becomes of the oldest appended rows once there are enough: (partition, rows) each; the stage `flush` stores them there.
    keep: how many appended rows a flush leaves at least.
    """

    partitions: tuple[Partition, ...]
    flush: tuple[tuple[str, int], ...] = ()
    keep: int = 0

    def __post_init__(self) -> None:
        names = [p.name for p in self.partitions]
        if not names or names[0] != APPENDED or len(set(names)) != len(names):
            raise GraphError(f"kv: a format has one partition named '' first and others by distinct names, not {names}")
        if unknown := [n for n, _ in self.flush if n not in names[1:]]:
            raise GraphError(f"kv: a flush moves rows to {unknown}; partitions that are not appended to are {names[1:]}")

    @property
    def residual(self) -> int:
        """Rows that one flush moves, 0 = there is none."""
        return sum(rows for _, rows in self.flush)

    @classmethod
    def read(cls, stored: Mapping[str, Any] | KVFormat | None) -> KVFormat | None:
        """Back from the manifest's JSON; None is plain float."""
        if stored is None or isinstance(stored, KVFormat):
            return stored
        if not isinstance(stored, Mapping) or {"partitions", "flush", "keep"} - set(stored):
            raise GraphError(f"kv: {stored!r} is no format; a format is an object with 'partitions', 'flush' and 'keep'")
        known = {f.name for f in fields(Partition)}
        if unknown := sorted({k for p in stored["partitions"] for k in p} - known):
            raise GraphError(f"kv: a partition has no {unknown}; it has {sorted(known)}")
        return cls(tuple(Partition(**p) for p in stored["partitions"]), tuple((str(n), int(r)) for n, r in stored["flush"]), int(stored["keep"]))

    def bytes(self, rows: Mapping[str, Any], heads: int, head_dim: int, value_dim: int, element: int) -> Any:
        """Of one sample. rows: partition name -> rows held (numbers or expressions); element: bytes of a float of the model.

        The one place where bytes of a cache are counted: `cost`, reports and the engines' `nbytes` agree with it.
        """
        return sum((p.bytes(rows[p.name], heads, head_dim, value_dim, element) for p in self.partitions), 0)


FLOAT = KVFormat((Partition(code="float"),))
