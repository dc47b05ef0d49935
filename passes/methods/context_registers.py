"""Context registers: a few latent tokens, written by a small encoder, stand for a long text prefix."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import networkx as nx
import torch
from annotated_types import Ge
from torch import Tensor
from torch.fx import Node
from torch.nn import functional

from ...graph.errors import GraphError
from ...graph.kv_table import derive_kv
from ...graph.program import Program
from ...graph.retype import fake_mode, new_size, reroute, retype
from ...graph.sites import flow, layer_of, layers, same, site
from ...graph.splice import splice
from ..insert import Insertion, attribute
from ..registers import check_causal
from ..replay import replay

F = torch.ops.foveate
INPUTS = ("context_ids", "context_mask", "context_position_ids", "context_at")
EXAMPLE = 8179  # tokens of a context while shapes are computed: no size of a model


def parts(mask: Tensor, count: int) -> Tensor:
    """mask[B, C]  ->  w[B, M, C]: the average over each of M parts of the first c = sum(mask) tokens, as equal as they can be"""
    held = mask.sum(1)[:, None, None]
    at, part = torch.arange(mask.shape[1], device=mask.device)[None, None], torch.arange(count, device=mask.device)[None, :, None]
    low, high = part * held // count, (part + 1) * held // count
    return ((at >= low) & (at < high)).float() / (high - low).clamp(min=1).float()


def begin(words: Tensor, queries: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
    """words[B, C, D], queries[M, D], mask[B, C], positions[B, C] or [3, B, C]  ->  what the encoder reads: h[B, C + M, D], valid, positions; pooled[B, M, D]

    A query stands behind the prefix and brings the average of its part.
    """
    B, M = words.shape[0], queries.shape[0]
    pooled = F.merge_tokens(words, parts(mask, M))
    valid = torch.cat([mask != 0, torch.ones(B, M, dtype=torch.bool, device=mask.device)], 1)
    end = torch.where(mask != 0, positions, -1).amax(-1, keepdim=True)
    places = torch.cat([positions, end + 1 + torch.arange(M, device=mask.device)], -1)
    return torch.cat([words, pooled + queries], 1), valid, places, pooled


def finish(h: Tensor, read: Tensor, pooled: Tensor, weight: Tensor, at: Tensor) -> Tensor:
    """h[B, S, D], read[B, C + M, D], pooled[B, M, D], at[B]  ->  h with the latents pooled + W read in its rows at, ..., at + M - 1"""
    M = pooled.shape[1]
    latents = pooled + functional.linear(read[:, -M:], weight)
    slot = torch.arange(h.shape[1], device=h.device)[None] - at[:, None]
    return torch.where(((slot >= 0) & (slot < M))[..., None], F.keep_tokens(latents, slot.clamp(0, M - 1)), h)


@dataclass(frozen=True)
class ContextRegisters(Insertion):
    """The text in front of a boundary leaves the prompt; M latent tokens stand in its place, in every layer and in the cache.

    rewrite:
        h[B, S, D]  ->  h with rows at, ..., at + M - 1 from  mean(words of part j) + W encoder([words[B, C, D]; M queries])_j     (entry of the first layer)

    C3 (Context Cascade Compression, 2025), its encoder made of trained copies of the model's own first `depth` layers instead of a second model, and
    with the averages of M equal parts of the prefix beside it: W starts as zero, so that before training the latents are those averages, and a
    prefix of M tokens is read as it was. `until`: the prefix ends at the last image ("image") or at the last token with this number; it is the
    text before it but for the first `keep` tokens. The runtime finds it, sends it as `context_ids`, and gives M tokens in its place positions
    spread over it; the rest keeps its positions, so that decode does not change. A prefix of at most M tokens stays. `tokens` 0 is the control that
    drops the prefix.
    """

    name: ClassVar[str] = "context-registers"
    paper: ClassVar[str] = "arXiv:2511.15244"

    tokens: Annotated[int, Ge(0)] = 32
    depth: Annotated[int, Ge(1)] = 4
    until: Literal["image"] | Annotated[int, Ge(0)] = "image"
    keep: Annotated[int, Ge(0)] = 1

    def run(self, program: Program) -> bool:
        facts, where = program.facts, site(program, 0)
        if facts.context:
            raise self.fail("is in this program already; a prompt has one prefix")
        if self.until != "image" and (self.until >= facts.vocab_size or self.until == facts.image_token_id):
            raise self.fail(f"until={self.until} is no token that could end a text; there are 0..{facts.vocab_size - 1}, and {facts.image_token_id} is the "
                            "image")
        if not same(where.length, program["prefill"].placeholder("input_ids").meta["val"].shape[1]):
            raise self.fail("an earlier pass changed the sequence in front of the first layer; put context-registers before it")
        if self.tokens:
            check_causal(program, self.name)
            count = len(layers(program["prefill"], facts.layer_path))
            if self.depth >= count:
                raise self.fail(f"depth={self.depth} layers cannot be copied; this program has {count}, and the last stays the model's")
            try:
                self._insert(program)
            except GraphError as cause:
                raise self.fail(f"the first {self.depth} layers of {facts.model_type} cannot be an encoder: {cause}") from cause
        program.facts = replace(facts, context={"until": self.until, "keep": self.keep, "tokens": self.tokens})
        return True

    def _insert(self, program: Program) -> None:
        stage, where, end = program["prefill"], site(program, 0), site(program, self.depth).hidden
        first, width = where.first, program.facts.hidden_size
        ids, mask, positions, at = self._inputs(program)
        queries = self.learn(program, "prefill", first, "queries", lambda: self.noise("queries", self.tokens, width))
        weight = self.learn(program, "prefill", first, "map", lambda: torch.zeros(width, width))
        words = self._words(program, ids)
        read, valid, places, pooled = splice(stage, first, begin, words, queries, mask, positions)
        given = {where.hidden: read, stage.placeholder("position_ids"): places}
        read = replay(stage, first, end, given, valid, self._copy(program, first))
        mixed = splice(stage, first, finish, where.hidden, read, pooled, weight, at)
        for crossing in where.crossings:
            if crossing.node is where.hidden:
                for reader in crossing.readers:
                    reroute(reader, where.hidden, mixed)
        retype(stage)
        stage.module.recompile()
        program.kv = derive_kv(program)

    def _inputs(self, program: Program) -> list[Node]:
        stage = program["prefill"]
        ids, positions = (stage.placeholder(n).meta["val"] for n in ("input_ids", "position_ids"))
        size = new_size(stage, "context", EXAMPLE)
        with fake_mode(stage):
            one = [ids.new_empty((ids.shape[0], size)) for _ in range(2)]
            values = [*one, positions.new_empty((*positions.shape[:-1], size)), ids.new_empty((ids.shape[0],))]
        return [stage.add_input(name, value) for name, value in zip(INPUTS, values, strict=True)]

    def _words(self, program: Program, ids: Node) -> Node:
        """The prefix as the first layer would get it."""
        stage, where = program["prefill"], site(program, 0)
        made = {where.hidden, *nx.ancestors(flow(stage), where.hidden)}
        spliced = [n for n in made if n.target is F.splice_image_features.default]
        if len(spliced) != 1:
            raise GraphError(f"pictures come among the words {len(spliced)} times before the first layer; it must be once")
        words = replay(stage, where.first, spliced[0].args[0], {stage.placeholder("input_ids"): ids})
        return replay(stage, where.first, where.hidden, {spliced[0]: words}) if spliced[0] is not where.hidden else words

    def _copy(self, program: Program, before: Node) -> Callable[[Node], Node | None]:
        """A trained copy of every weight that a layer reads, the first time it is asked for."""
        stage, pattern = program["prefill"], re.compile(program.facts.layer_path)
        made: dict[str, Node] = {}

        def copy(node: Node) -> Node | None:
            path = str(node.target)
            value = attribute(stage, path)
            if not value.is_floating_point() or all(layer_of(user, pattern) is None for user in node.users):
                return None
            if path not in made:
                made[path] = self.learn(program, "prefill", before, path, lambda: value.detach().float().clone())
            return made[path]

        return copy
