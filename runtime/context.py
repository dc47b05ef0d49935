"""A long text prefix that the prefill reads compressed: which tokens it is, and what stands in its place.

The rule is `facts.context`: until ("image": the last one; or a token, its last occurrence), keep (first tokens that are never part of it), tokens
(how many latents stand for it; 0: nothing does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .batch import Layout


def boundary(tokens: np.ndarray, groups: Sequence[np.ndarray], until: Any) -> int | None:
    """The place of the first token behind the prefix; None where a prompt has no such image or token."""
    found = np.flatnonzero(tokens == until) if until != "image" else groups[-1][:1] if groups else []
    return int(found[-1]) if len(found) else None


def compressed(layout: Layout, rule: Mapping[str, Any], within: int | None = None) -> Layout:
    """The layout without its prefix, with M tokens in front of the boundary that wait for latents. A prefix of at most M tokens stays.

    The M tokens take positions, and numbers (for what looks at a history of tokens), of the middles of M equal parts of the prefix; all others keep
    theirs. within: look for the boundary among so many first tokens.
    """
    M, T = int(rule["tokens"]), len(layout.tokens)
    end = boundary(layout.tokens[:within], layout.groups, rule["until"])
    if end is None:
        return layout
    text = np.ones(T, bool)
    text[[*range(int(rule["keep"])), *(place for group in layout.groups for place in group)][:T]] = False
    text[end:] = False
    places = np.flatnonzero(text)
    if len(places) <= M:
        return layout
    edges = np.arange(M + 1) * len(places) // max(M, 1)
    middles = places[(edges[:-1] + edges[1:] - 1) // 2]
    source = np.concatenate([np.flatnonzero(~text[:end]), middles, np.arange(end, T)])
    at = len(source) - (T - end) - M
    moved = np.concatenate([np.cumsum(~text[:end]) - 1, np.arange(end, T) - end + at + M])
    return replace(layout, tokens=layout.tokens[source], positions=layout.positions[..., source], groups=tuple(moved[g] for g in layout.groups),
                   context=layout.tokens[places], context_positions=layout.positions[..., places], context_at=at)


def context_feeds(layouts: Sequence[Layout], axes: int, length: int) -> dict[str, np.ndarray]:
    """layouts[B] -> context_ids, context_mask [B, C], context_position_ids [B, C] or [3, B, C], context_at[B]; samples without a prefix have none"""
    C = max(1, *[len(layout.context) for layout in layouts])
    ids, mask = np.zeros((len(layouts), C), np.int64), np.zeros((len(layouts), C), np.int64)
    positions, at = np.zeros((axes, len(layouts), C), np.int64), np.full(len(layouts), length, np.int64)
    for b, layout in enumerate(layouts):
        if c := len(layout.context):
            ids[b, :c], mask[b, :c], at[b] = layout.context, 1, layout.context_at
            positions[:, b, :c] = layout.context_positions
    return {"context_ids": ids, "context_mask": mask, "context_position_ids": positions[0] if axes == 1 else positions, "context_at": at}
