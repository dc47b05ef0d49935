"""Trace a plain torch function and inline it at a node."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from .program import Stage
from .retype import fake_mode


def splice(stage: Stage, before: Node, function: Callable[..., Any], *args: Any, like: Node | None = None) -> Any:
    """Inline function(*args) before the node `before`; returns the nodes in the structure that `function` returns.

    Args may be nodes (traced at their fake values) or plain values. The inlined nodes get the layer tag of `like`, or none.
    """
    nodes = [a for a in args if isinstance(a, Node)]

    def over_nodes(*values: Any) -> list[Any]:
        found = iter(values)
        result = function(*[next(found) if isinstance(a, Node) else a for a in args])
        flat, over_nodes.spec = tree_flatten(result)  # type: ignore[attr-defined]
        return flat

    with fake_mode(stage), torch.no_grad():
        traced = make_fx(over_nodes, tracing_mode="real", pre_dispatch=True)(*_apart([n.meta["val"] for n in nodes]))
    traced.graph.eliminate_dead_code()
    flat = _inline(stage, traced, before, nodes, like.meta if like else {})
    return tree_unflatten(flat, over_nodes.spec)  # type: ignore[attr-defined]


def _apart(values: list[Any]) -> list[Any]:
    """Tracing knows tensors by identity, and `retype` gives equal nodes of several layers one fake tensor: here every input has its own."""
    seen: list[Any] = []
    for value in values:
        known = isinstance(value, torch.Tensor) and any(value is v for v in seen)
        seen.append(value.detach() if known else value)
    return seen


def _inline(stage: Stage, traced: torch.fx.GraphModule, before: Node, inputs: list[Node], meta: dict[str, Any]) -> list[Any]:
    graph: Graph = stage.graph
    image: dict[Node, Any] = {}
    feeds = iter(inputs)
    with graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                image[node] = next(feeds)
            elif node.op == "output":
                return [torch.fx.node.map_arg(a, lambda n: image[n]) for a in node.args[0]]
            else:
                if node.op == "get_attr":
                    name = next(name for i in itertools.count() if not hasattr(stage.module, name := f"constant_{i}"))
                    stage.module.register_buffer(name, getattr(traced, str(node.target)))
                    copied = graph.get_attr(name)
                else:
                    copied = graph.node_copy(node, lambda n: image[n])
                copied.meta = {k: v for k, v in node.meta.items() if k == "val"}
                for key in ("nn_module_stack", "layer"):
                    if key in meta:
                        copied.meta[key] = meta[key]
                image[node] = copied
    raise AssertionError("a traced graph ends with an output")
