"""Gather rows before the work that is done row by row, not behind it: what a cut drops is then not computed either."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from ...graph.program import Program, Stage
from ...graph.retype import retype
from ...graph.sites import same
from ...graph.stage import sweep
from ..base import Pass

aten = torch.ops.aten
KEEP = torch.ops.foveate.keep_tokens.default
ELEMENTWISE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.pow.Tensor_Scalar, aten.neg.default, aten.rsqrt.default,
               aten.silu.default, aten.gelu.default, aten.relu.default, aten.sigmoid.default, aten.tanh.default, aten.to.dtype,
               aten._to_copy.default, aten.clone.default, aten.contiguous.default}


@dataclass(frozen=True)
class GatherEarly(Pass):
    """
    rewrite:
        keep_tokens(f(x), i), f row by row and read by nothing else  ->  f(keep_tokens(x, i))

    The layer before a cut has attended over all tokens by then; its output projection and its MLP are needed for the kept ones alone. The
    numbers stay: every row is computed from the same row. Goes behind the passes that cut; stops where a method reads the stream of all tokens.
    """

    name: ClassVar[str] = "gather-early"
    may_be_idle: ClassVar[bool] = True

    def run(self, program: Program) -> bool:
        return any([_hoist(stage) for stage in program.stages.values()])


def _hoist(stage: Stage) -> bool:
    changed = False
    for keep in [n for n in stage.graph.nodes if n.target is KEEP]:
        if keep.users and isinstance(keep.args[0], Node) and (rows := _region(keep)):
            _move(stage, keep, rows)
            changed = True
    return changed


def _region(keep: Node) -> list[Node]:
    """The nodes behind keep's operand, in order, that only lead there, row by row."""
    x, index = keep.args
    tokens, found = x.meta["val"].shape[1], {keep}
    same_gather = {n for n in x.users if n.target is KEEP and n.args[1] is index}
    found |= same_gather
    at: Any = x
    region: list[Node] = []
    while at.op != "root":
        if at.users and found.issuperset(at.users) and _row_by_row(at, tokens):
            found.add(at)
            region.append(at)
        at = at.prev
    return region[::-1]


def _row_by_row(node: Node, tokens: Any) -> bool:
    """Does row t of the result [B, T, ...] depend on row t of the operands only?"""
    if node.op != "call_function" or not _carries(node, tokens):
        return False
    rank = node.meta["val"].dim()
    others = [n for n in node.all_input_nodes if not _carries(n, tokens)]
    if any(same(size, tokens) for n in others if isinstance(n.meta.get("val"), Tensor) for size in n.meta["val"].shape):
        return False  # tokens on another axis: a mask, or angles
    if any(n.meta["val"].dim() != rank for n in node.all_input_nodes if _carries(n, tokens)):
        return False
    if node.target in ELEMENTWISE:
        return True
    if node.target is aten.linear.default:
        return node.args[1] in others
    if node.target is aten.mean.dim:
        return [d % rank for d in node.args[1]] == [rank - 1] and len(node.args) > 2 and bool(node.args[2])
    return node.target is aten.layer_norm.default and len(node.args[1]) == 1


def _carries(node: Node, tokens: Any) -> bool:
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dim() >= 3 and same(val.shape[1], tokens)


def _move(stage: Stage, keep: Node, region: list[Node]) -> None:
    """Compute the region on gathered rows; the old one is then read by nobody."""
    x, index = keep.args
    tokens, done = x.meta["val"].shape[1], {}
    with stage.graph.inserting_before(keep):
        for node in region:
            for source in node.all_input_nodes:
                if source not in done and _carries(source, tokens):
                    done[source] = stage.graph.call_function(KEEP, (source, index))
            done[node] = stage.graph.node_copy(node, lambda n: done.get(n, n))
            done[node].meta = {k: v for k, v in node.meta.items() if k != "val"}
    keep.replace_all_uses_with(done[x])
    for twin in [n for n in x.users if n.target is KEEP and n.args[1] is index and n.users]:
        twin.replace_all_uses_with(done[x])
    sweep(stage)
    retype(stage)
    stage.module.recompile()


__all__ = ["GatherEarly"]
