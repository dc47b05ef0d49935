"""An ONNX graph in the making: nodes, constants and initializers, each made once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from onnx import GraphProto, NodeProto, TensorProto, helper
from torch import Tensor
from torch.fx import Node

from .errors import LowerError
from .onnx_weights import WeightFile, raw_bytes

DTYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int16: TensorProto.INT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.bool: TensorProto.BOOL,
}
INLINE = 1024  # bytes; a smaller initializer stays in the .onnx file
END = 2**63 - 1  # "to the end" of a Slice

Value = Any  # the name of an ONNX value, a list of them (several outputs), or None
Emitter = Callable[..., Value]  # (builder, fx node, *arguments in schema order) -> Value


class Builder:
    """Collects one graph. `op` adds a node and returns the name of its output; equal nodes (same op, inputs, attributes) are added once.

    Symbolic sizes are int64 tensors of shape [1], so that they concatenate into shapes without unsqueezing.
    """

    def __init__(self, weights: WeightFile | None) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self.env: dict[Node, Value] = {}
        self.tensors: dict[str, Tensor] = {}  # parameters by get_attr target
        self.weights = weights
        self.alias: dict[str, str] = {}  # get_attr target -> the first name of the same tensor
        self.read_raw: set[str] = set()  # parameters that something reads as they are: a transposed copy of them would be a second one
        self.extra_inputs: list[tuple[str, Tensor, list[Any]]] = []  # inputs beyond the stage's: name, type, dimensions
        self.replaced: dict[str, tuple[str, list[Any]]] = {}  # contract output -> the value that takes its place, its dimensions
        self.path = ""  # module path of the FX node being translated: prefix of ONNX node names
        self._memo: dict[Any, list[str]] = {}
        self._count = 0
        self._constants: dict[str, Tensor] = {}

    # nodes

    def op(self, kind: str, *inputs: str | None, domain: str = "", outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; None is an omitted input. One name, or a list when outputs > 1."""
        names = [i or "" for i in inputs]
        while names and not names[-1]:
            names.pop()
        attributes = {k: v for k, v in attributes.items() if v is not None}
        key = (kind, domain, outputs, tuple(names), tuple((k, _hashable(v)) for k, v in sorted(attributes.items())))
        if key not in self._memo:
            made = [self.fresh(kind) for _ in range(outputs)]
            self.nodes.append(helper.make_node(kind, names, made, name=f"{self.path}{kind}_{self._count}", domain=domain, **attributes))
            self._memo[key] = made
        made = self._memo[key]
        return made[0] if outputs == 1 else list(made)

    def loop(self, trips: int, states: list[tuple[str, torch.dtype]], scans: list[torch.dtype], body: Callable[..., Any]) -> list[str]:
        """A Loop of `trips` rounds: final states, then the scanned values stacked along a new first axis.

        body(round, *states) -> (states, scanned values), written with this builder; it may read any value made before.
        """
        outer, memo = self.nodes, self._memo
        self.nodes, self._memo = [], dict(memo)
        given = [self.fresh("state") for _ in range(len(states) + 2)]
        after, scanned = body(given[0], *given[2:])
        ends = [self.fresh("next") for _ in range(1 + len(after) + len(scanned))]
        for value, end in zip([given[1], *after, *scanned], ends, strict=True):  # an output of a body is a value of its own
            self.nodes.append(helper.make_node("Identity", [value], [end], name=f"{self.path}{end}"))
        inside, self.nodes, self._memo = self.nodes, outer, memo
        kinds = [dtype for _, dtype in states]
        inputs = zip(given, [torch.int64, torch.bool, *kinds], strict=True)
        outputs = zip(ends, [torch.bool, *kinds, *scans], strict=True)
        graph = helper.make_graph(
            inside,
            self.fresh("body"),
            [helper.make_tensor_value_info(name, onnx_type(kind), [] if i < 2 else None) for i, (name, kind) in enumerate(inputs)],
            [helper.make_tensor_value_info(name, onnx_type(kind), None if i else []) for i, (name, kind) in enumerate(outputs)],
        )
        made = [self.fresh("loop") for _ in ends[1:]]
        operands = [self.const(trips, torch.int64), self.const(True, torch.bool), *[name for name, _ in states]]
        self.nodes.append(helper.make_node("Loop", operands, made, name=f"{self.path}Loop_{self._count}", body=graph))
        return made

    def scalar(self, value: Any) -> TensorProto:
        """An attribute of one element: what ConstantOfShape fills with."""
        return helper.make_tensor("value", onnx_type(torch.tensor(value).dtype), [1], [value])

    def fresh(self, kind: str) -> str:
        self._count += 1
        return f"{self.path}{kind.lower()}_{self._count}"

    # constants and weights

    def const(self, value: Any, dtype: torch.dtype | None = None) -> str:
        """A constant from a python number, a list or a tensor, in the graph itself."""
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, dtype=dtype)
        key = ("const", tensor.dtype, tuple(tensor.shape), raw_bytes(tensor))
        if key not in self._memo:
            name = self.fresh("const")
            self.initializers[name] = self._inline(name, tensor)
            self._constants[name] = tensor
            self._memo[key] = [name]
        return self._memo[key][0]

    def constant_of(self, name: str) -> Tensor | None:
        """The value of a small constant made by `const`, or None."""
        return self._constants.get(name)

    def ints(self, *values: int) -> str:
        """A 1-D int64 constant."""
        return self.const(list(values), torch.int64)

    def weight(self, *targets: str, transpose: bool = False, dtype: torch.dtype | None = None) -> str:
        """Parameters (by get_attr target) joined along dim 0, then cast and transposed if asked, as one initializer."""
        targets = tuple(self.alias.get(t, t) for t in targets)
        parts = tuple(self.tensors[t] for t in targets)
        dtype = None if dtype == parts[0].dtype else dtype
        name = "|".join(targets) + (".T" if transpose else "") + (f":{str(dtype).removeprefix('torch.')}" if dtype else "")
        if name not in self.initializers:
            self.initializers[name] = self._initializer(name, parts, transpose, dtype or parts[0].dtype)
        return name

    def parameter(self, arg: Any) -> tuple[str, torch.dtype | None] | None:
        """(target, type to write it in) if the node is a parameter, or the cast of one (how a precision pass narrows it); else None."""
        if isinstance(arg, Node) and arg.op == "get_attr":
            return str(arg.target), None
        if (
            isinstance(arg, Node)
            and arg.target is torch.ops.aten.to.dtype
            and isinstance(arg.args[0], Node)
            and arg.args[0].op == "get_attr"
        ):
            return str(arg.args[0].target), arg.args[1]  # type: ignore[return-value]
        return None

    def _initializer(self, name: str, parts: tuple[Tensor, ...], transpose: bool, dtype: torch.dtype) -> TensorProto:
        shape = [sum(p.shape[0] for p in parts), *parts[0].shape[1:]] if parts[0].dim() else []
        shape = shape[::-1] if transpose else shape
        size = sum(p.numel() * p.element_size() for p in parts)
        if self.weights is None or (size < INLINE and all(p.device.type != "meta" for p in parts)):
            whole = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(dtype)
            return self._inline(name, whole.t() if transpose else whole)
        offset, length = self.weights.place(parts, transpose, dtype)
        proto = TensorProto(name=name, data_type=onnx_type(dtype), dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.weights.path.name), ("offset", offset), ("length", length)):
            proto.external_data.add(key=key, value=str(value))
        return proto

    def _inline(self, name: str, tensor: Tensor) -> TensorProto:
        return TensorProto(name=name, data_type=onnx_type(tensor.dtype), dims=list(tensor.shape), raw_data=raw_bytes(tensor))

    # arguments of FX nodes

    def __call__(self, arg: Any) -> Value:
        """The value of an FX node; a parameter becomes an initializer here, when it is first read as it is."""
        if not isinstance(arg, Node):
            raise LowerError(f"to_onnx: {arg!r} ({type(arg).__name__}) is no graph value")
        if arg not in self.env and (found := self.parameter(arg)):
            return self.weight(found[0], dtype=found[1])
        return self.env[arg]

    def tensor(self, arg: Any, dtype: torch.dtype) -> str:
        """An operand as a tensor of `dtype`: a node (cast when it differs), a symbolic size, or a python number."""
        if not isinstance(arg, Node):
            return self.const(arg, dtype)
        val = arg.meta["val"]
        if not isinstance(val, Tensor):
            return self.cast(self.op("Squeeze", self(arg), self.ints(0)), torch.int64, dtype)
        return self.cast(self(arg), val.dtype, dtype)

    def cast(self, name: str, have: torch.dtype, want: torch.dtype) -> str:
        return name if have == want else self.op("Cast", name, to=onnx_type(want))

    def size(self, arg: Any) -> str:
        """A size (int, symbolic, or already the name of a value) as an int64 tensor of shape [1]."""
        if isinstance(arg, str):
            return arg
        return self.ints(arg) if isinstance(arg, int) else self(arg)

    def sizes(self, args: Sequence[Any]) -> str:
        """Several sizes as one 1-D int64 tensor; [] is the shape of a scalar."""
        if all(isinstance(a, int) for a in args):
            return self.ints(*args)
        return self.op("Concat", *[self.size(a) for a in args], axis=0) if len(args) > 1 else self.size(args[0])

    def dim(self, arg: Node, axis: int) -> str:
        """One dimension of a tensor as an int64 tensor of shape [1]."""
        return self.dim_of(self(arg), arg.meta["val"], axis)

    def dim_of(self, name: str, val: Tensor, axis: int) -> str:
        axis %= val.dim()
        size = val.shape[axis]
        return self.ints(size) if isinstance(size, int) else self.op("Shape", name, start=axis, end=axis + 1)

    def shape(self, name: str, val: Tensor) -> str:
        """The whole shape of a value: a constant when it is static."""
        if all(isinstance(s, int) for s in val.shape):
            return self.ints(*val.shape)
        return self.op("Shape", name)

    def scalar_size(self, arg: Any) -> str:
        """A size as a 0-D int64 tensor (Range wants those)."""
        return self.const(arg, torch.int64) if isinstance(arg, int) else self.op("Squeeze", self(arg), self.ints(0))

    def prune(self, outputs: Sequence[str]) -> None:
        """Drop nodes and initializers that no output needs."""
        needed = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if needed.intersection(node.output):
                kept.append(node)
                needed.update(reads(node))
        self.nodes = kept[::-1]
        self.initializers = {k: v for k, v in self.initializers.items() if k in needed}

    def graph(self, name: str, inputs: list[Any], outputs: list[Any]) -> GraphProto:
        return helper.make_graph(self.nodes, name, inputs, outputs, list(self.initializers.values()))


def onnx_type(dtype: torch.dtype) -> int:
    try:
        return DTYPES[dtype]
    except KeyError:
        raise LowerError(f"to_onnx: {dtype} has no ONNX type; known are {[str(d).removeprefix('torch.') for d in DTYPES]}") from None


def nodes_within(node: NodeProto) -> Iterator[NodeProto]:
    """The node, and those of its bodies."""
    yield node
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from nodes_within(inner)


def reads(node: NodeProto) -> set[str]:
    """Every name that the node or its bodies read; names that a body makes itself do no harm, they are unique."""
    return {name for inner in nodes_within(node) for name in inner.input}


def _hashable(value: Any) -> Any:
    if isinstance(value, TensorProto):
        return value.SerializeToString()
    return tuple(value) if isinstance(value, list) else value
