"""Half precision written into the graph: float16 or bfloat16 products, float32 islands around everything that sums or exponentiates.

    to_precision(program, "float16")   a program whose graphs compute in float16; float32 where it matters; eager can run it

TensorRT networks are strongly typed: what the graph says is what the engine computes. Three classes of operators, as in autocast:

    products     linear, matmul, convolution, attention and the KV ops: their inputs are narrowed; engines accumulate in float32
    islands      norms and their statistics, softmax, exponentials, activations, sums, and all that a cosine or sine is made of (RoPE
    tables)
    the rest     follows its inputs: one float32 input makes the result float32; a parameter or constant never does

The residual stream is float32 by default: real LLMs carry hidden values of 1e4 and more, and float16 ends at 65504. It costs a wider read
and write
between layers, which engines fuse into their pointwise kernels, and keeps a sum of 64 narrow terms exact.
Stage inputs and outputs: features, K/V and convolution states narrow, pixels and logits float32.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from ..graph.program import Program, Stage
from ..graph.retype import fake_mode
from .errors import LowerError

PRECISIONS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
RESIDUALS = ("float32", "half")
LARGEST = {torch.float16: 65504.0}  # what a narrowing cast may meet; bfloat16 reaches as far as float32

PRODUCTS = frozenset(
    "linear matmul mm bmm addmm baddbmm conv1d conv2d conv3d convolution einsum scaled_dot_product_attention _grouped_mm "
    "attention attention_varlen attention_rows attention_columns kv_store kv_append".split()
)
ISLANDS = frozenset(
    "layer_norm native_layer_norm group_norm rms_norm batch_norm norm linalg_vector_norm var std mean sum prod cumsum logsumexp "
    "softmax _softmax "
    "log_softmax _log_softmax pow square rsqrt sqrt reciprocal exp exp2 log log2 softplus sigmoid tanh erf gelu silu silu_ mish cos sin "
    "cosine_similarity cdist div".split()
)
STREAM = frozenset("embedding conv1d conv2d conv3d convolution".split())  # where a residual stream starts
NARROW_INPUTS = ("image_features", "past_k.", "past_v.", "conv.", "deepstack.")
TO = torch.ops.aten.to.dtype


def to_precision(program: Program, precision: str, residual: str = "float32") -> Program:
    """A copy of the program that computes in `precision`. Parameters stay as they are, narrowed by a cast node each that export folds
    while it writes."""
    if precision not in PRECISIONS:
        raise LowerError(f"precision: {precision!r} is none of {list(PRECISIONS)}")
    if residual not in RESIDUALS:
        raise LowerError(f"precision: residual={residual!r} is none of {list(RESIDUALS)}")
    result = program.clone()
    narrow = PRECISIONS[precision]
    if narrow == torch.float32:
        return result
    for stage in result.stages.values():
        narrow_inputs = {n for n in stage.inputs if n in program.facts.features or n.startswith(NARROW_INPUTS)}
        _Narrowing(stage, narrow, residual == "float32", narrow_inputs).run()
    result.facts = replace(result.facts, dtype=precision)
    return result


def kind(node: Node) -> str:
    """The operator's bare name: aten.linear.default -> linear."""
    return (
        node.target._schema.name.split("::")[1]
        if isinstance(node.target, OpOverload)
        else getattr(node.target, "__name__", str(node.target))
    )


def is_float(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), Tensor) and node.meta["val"].is_floating_point()


class _Narrowing:
    """One stage, node by node in order: wanted input types, casts where they differ, then the node's own type again."""

    def __init__(self, stage: Stage, narrow: torch.dtype, wide_stream: bool, narrow_inputs: set[str]) -> None:
        self.stage, self.graph, self.narrow, self.wide_stream = stage, stage.graph, narrow, wide_stream
        self.narrow_inputs = narrow_inputs
        self.mode: FakeTensorMode = fake_mode(stage)
        self.tables = _ancestors_of_angles(stage.graph)
        self.weak: set[Node] = set()  # parameters, constants and what is made of them alone: they take the type of their company
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}
        self.captured = _captured_type(stage)

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "placeholder":
                if is_float(node) and node.meta.get("name", node.name) in self.narrow_inputs:
                    node.meta["val"] = self._fake(node.meta["val"], self.narrow)
            elif node.op == "get_attr":
                if is_float(node):
                    self.weak.add(node)
            elif node.op == "call_function":
                self._visit(node)
            elif node.op == "output":
                self._outputs(node)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        self.stage.module.recompile()

    def _visit(self, node: Node) -> None:
        self._explicit_types(node)
        inputs = [n for n in node.all_input_nodes if is_float(n)]
        if not inputs:
            if is_float(node) and node not in self.tables and not _is_conversion(node):
                self.weak.add(node)
            self._retype(node)
            return
        want = self._wanted(node, inputs)
        if want is None:
            self.weak.add(node)
        else:
            self._feed(node, want)
        self._retype(node)
        if kind(node) in STREAM and self.wide_stream and want == self.narrow:
            self._widen(node)

    def _wanted(self, node: Node, inputs: list[Node]) -> torch.dtype | None:
        """The type this node computes in; None: leave it (all inputs are weak, or it converts)."""
        if _is_conversion(node):
            return inputs[0].meta["val"].dtype
        name = kind(node)
        if node in self.tables:
            return torch.float32
        if name in PRODUCTS or name == "embedding":
            return self.narrow
        strong = [n for n in inputs if n not in self.weak]
        if not strong:
            return None
        if name in ISLANDS:
            return torch.float32
        types = {n.meta["val"].dtype for n in strong}
        return torch.float32 if torch.float32 in types else self.narrow

    def _feed(self, node: Node, want: torch.dtype) -> None:
        masks = _float_masks(node)
        node.args = torch.fx.node.map_arg(node.args, lambda n: self._as(n, want) if is_float(n) and n not in masks else n)
        node.kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: self._as(n, want) if is_float(n) and n not in masks else n)

    def _as(self, node: Node, want: torch.dtype) -> Node:
        """The node in another type: one cast per node and type, right behind it."""
        have = node.meta["val"].dtype
        if have == want:
            return node
        source = node
        if node.target is TO and node.args[0].meta["val"].dtype == want and node in self.casts.values():
            return node.args[0]  # narrowed before, and the wide value still exists
        if (node, want) not in self.casts:
            with self.graph.inserting_after(node):
                if want in LARGEST and have == torch.float32 and node not in self.weak:
                    source = self._made(torch.ops.aten.clamp.default, (node, -LARGEST[want], LARGEST[want]), node)
            with self.graph.inserting_after(source):
                self.casts[node, want] = self._made(TO, (source, want), node)
        return self.casts[node, want]

    def _made(self, target: OpOverload, args: tuple[Any, ...], like: Node) -> Node:
        made = self.graph.call_function(target, args)
        made.meta.update({k: v for k, v in like.meta.items() if k in ("nn_module_stack", "layer")})
        self._retype(made)
        return made

    def _widen(self, node: Node) -> None:
        """A residual stream starts here: everyone reads the wide copy."""
        readers = list(node.users)
        wide = self._as(node, torch.float32)
        for reader in readers:
            reader.replace_input_with(node, wide)

    def _explicit_types(self, node: Node) -> None:
        """Casts to the type that the model was captured in become casts to the narrow one; float32 that was asked for stays."""
        if self.captured == torch.float32 or not isinstance(node.target, OpOverload):
            return
        swap = lambda a: self.narrow if a == self.captured else a  # noqa: E731
        node.args = tuple(swap(a) if isinstance(a, torch.dtype) else a for a in node.args)
        node.kwargs = {k: swap(a) if isinstance(a, torch.dtype) else a for k, a in node.kwargs.items()}

    def _outputs(self, node: Node) -> None:
        values = []
        for name, value in zip(self.stage.outputs, node.args[0], strict=True):
            if is_float(value):
                wide = name == "logits" or name.startswith("kept.")
                value = self._as(value, torch.float32 if wide else self.narrow)
            values.append(value)
        node.args = (tuple(values),)

    def _retype(self, node: Node) -> None:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        try:
            with self.mode, enable_python_dispatcher(), torch.no_grad():  # the dispatcher: composites of symbolic sizes
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception as cause:
            types = [f"{n.name}: {n.meta['val'].dtype}" for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
            raise LowerError(f"precision: {node.format_node()} does not take {types}: {cause}") from cause

    def _fake(self, value: Tensor, want: torch.dtype) -> Tensor:
        with self.mode:
            return value.to(want)


def _captured_type(stage: Stage) -> torch.dtype:
    """The type most parameters have: what the model was loaded in."""
    sizes: dict[torch.dtype, int] = {}
    for node in stage.graph.nodes:
        if node.op == "get_attr" and is_float(node):
            value = node.meta["val"]
            sizes[value.dtype] = sizes.get(value.dtype, 0) + value.numel()
    return max(sizes, key=lambda d: sizes[d], default=torch.float32)


def _is_conversion(node: Node) -> bool:
    return kind(node) in ("to", "_to_copy", "type_as") and isinstance(node.target, OpOverload)


def _float_masks(node: Node) -> set[Node]:
    """The additive mask of an attention keeps its type: the op adds it to float32 logits."""
    names = {"attention": 3, "attention_rows": 2, "attention_columns": 2, "scaled_dot_product_attention": 3}
    at = names.get(kind(node))
    return {node.args[at]} if at is not None and len(node.args) > at and isinstance(node.args[at], Node) else set()


def _ancestors_of_angles(graph: Graph) -> set[Node]:
    """Everything computed that a cosine or sine is made of, and those: position ids reach 1e5, where float16 steps are 64 wide."""
    found: set[Node] = set()
    pending = [n for n in graph.nodes if n.op == "call_function" and kind(n) in ("cos", "sin")]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [n for n in node.all_input_nodes if n.op == "call_function"]
    return found
