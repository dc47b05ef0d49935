"""Samples and image features -> the padded arrays that the prefill stage takes.

Right padding; S = the longest text + N, where N is the largest number of visual tokens of a sample, so that every later length
S - N + K is the same for all samples (the contract of the prefill stage). Samples with fewer visual tokens get zero rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .context import context_feeds
from .errors import RunError
from .positions import axes, position_ids


def _nothing() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class Layout:
    """One sample's tokens after the vision stage has decided how many each image has."""

    tokens: np.ndarray  # int64[T]
    positions: np.ndarray  # int64[T] or [3, T]
    groups: tuple[np.ndarray, ...]  # per image the places of its tokens
    next_position: int  # of the first generated token
    context: np.ndarray = field(default_factory=_nothing)  # int64[C], a prefix that is read compressed and is not among the tokens
    context_positions: np.ndarray = field(default_factory=_nothing)  # int64[C] or [3, C]
    context_at: int = 0  # the place of the first token that waits for a latent

    @property
    def visual(self) -> int:
        return sum(len(g) for g in self.groups)


@dataclass(frozen=True)
class Batch:
    """The prefill stage's feeds and what the decode loop needs to go on."""

    feeds: dict[str, np.ndarray]
    layouts: tuple[Layout, ...]
    position_axes: int

    @property
    def size(self) -> int:
        return len(self.layouts)

    @property
    def length(self) -> int:
        """S"""
        return int(self.feeds["input_ids"].shape[1])

    def step_positions(self, step: int) -> np.ndarray:
        """position_ids[B, 1] or [3, B, 1] of generated token `step` (0 = the first)"""
        ids = np.array([[layout.next_position + step] for layout in self.layouts], np.int64)
        return ids if self.position_axes == 1 else np.repeat(ids[None], 3, 0)


def image_groups(
    tokens: np.ndarray, image_token: int, images: int, per_image: int | None, grids: np.ndarray | None = None, merge: int = 1
) -> tuple[np.ndarray, ...]:
    """tokens[T] -> per image the places of its placeholder tokens, in order.

    Cases: (1) grids given: image i has t*h*w/merge^2 tokens; (2) `per_image` fixed; (3) one uninterrupted run of placeholders per image;
    (4) all images have equally many.
    """
    places = np.flatnonzero(tokens == image_token)
    if images == 0:
        if len(places):
            raise RunError(f"prompt: {len(places)} image tokens, but no image was given")
        return ()
    if len(places) == 0:
        raise RunError(
            f"prompt: it has no image placeholder, but {images} image(s) were given; write the placeholder where the image belongs, "
            "or pass messages=[...] and let the chat template do it"
        )
    if grids is not None:
        counts = [int(np.prod(g)) // merge**2 for g in grids]
    elif per_image is not None and len(places) == images * per_image:
        counts = [per_image] * images
    else:
        runs = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
        counts = [len(r) for r in runs] if len(runs) == images else [len(places) // images] * images
    if sum(counts) != len(places) or len(counts) != images:
        raise RunError(
            f"prompt: {len(places)} image tokens do not belong to {images} image(s); the processor should write {counts} of them"
        )
    return tuple(np.split(places, np.cumsum(counts)[:-1]))


def lay_out(
    tokens: np.ndarray,
    groups: Sequence[np.ndarray],
    rows: Sequence[int],
    grids: np.ndarray | None,
    rule: Mapping[str, Any],
    kept: Sequence[np.ndarray] | None = None,
) -> Layout:
    """Give every image as many tokens as the vision stage returned rows for it (`rows`), and number the positions.

    A pass before the LLM returns fewer rows than the processor wrote placeholders: the surplus placeholders go. linear: positions are
    numbered anew, as the published methods do, or (`original` in the rule, what passes ask for) as for mrope: a kept token stays where it
    was on the picture (`kept`: per image the indices of its rows, -1 = the last), the text where it was.
    """
    ids = position_ids(len(tokens), groups, grids, rule)
    if all(len(g) == r for g, r in zip(groups, rows, strict=True)):
        return Layout(tokens, ids, tuple(groups), _next(ids))
    keep = np.ones(len(tokens), bool)
    source = np.arange(len(tokens))
    for i, (group, count) in enumerate(zip(groups, rows, strict=True)):
        if count > len(group):
            raise RunError(
                f"vision: it returned {count} rows for an image with {len(group)} placeholder tokens; it may return fewer, not more"
            )
        keep[group[count:]] = False
        chosen = np.arange(count) if kept is None else kept[i]
        source[group[:count]] = group[chosen]
    place = np.cumsum(keep) - 1
    shorter = tuple(place[g[:r]] for g, r in zip(groups, rows, strict=True))
    if axes(rule) == 1 and not rule.get("original"):
        short = position_ids(int(keep.sum()), shorter, None, rule)
        return Layout(tokens[keep], short, shorter, _next(short))
    return Layout(tokens[keep], ids[..., source[keep]], shorter, _next(ids))


def _next(ids: np.ndarray) -> int:
    return int(ids.max()) + 1


def assemble(layouts: Sequence[Layout], features: Mapping[str, Sequence[np.ndarray]], facts: Mapping[str, Any], pad_token: int) -> Batch:
    """layouts[B] and per feature B arrays [visual_b, D] -> the feeds of prefill.

    features: name -> per sample rows; a sample without images has an array of 0 rows.
    """
    N = max(max(layout.visual for layout in layouts), int(facts.get("min_visual") or 0), 1)
    S = max(len(layout.tokens) - layout.visual for layout in layouts) + N
    B = len(layouts)
    rank = axes(facts["positions"])
    ids = np.full((B, S), pad_token, np.int64)
    mask = np.zeros((B, S), np.int64)
    positions = np.zeros((rank, B, S), np.int64)
    for b, layout in enumerate(layouts):
        T = len(layout.tokens)
        ids[b, :T], mask[b, :T] = layout.tokens, 1
        positions[:, b, :T] = layout.positions
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": positions[0] if rank == 1 else positions}
    if (facts.get("context") or {}).get("tokens"):
        feeds |= context_feeds(layouts, rank, S)
    for name, rows in features.items():
        feeds[name] = _pad_rows(rows, [layout.visual for layout in layouts], N, name)
    return Batch(feeds, tuple(layouts), rank)


def _pad_rows(rows: Sequence[np.ndarray], counts: Sequence[int], N: int, name: str) -> np.ndarray:
    """B arrays [n_b, D] -> [B, N, D], zeros behind"""
    out = np.zeros((len(rows), N, rows[0].shape[1]), rows[0].dtype)
    for b, (r, n) in enumerate(zip(rows, counts, strict=True)):
        if len(r) != n:
            raise RunError(f"vision: sample {b} has {n} image tokens and {len(r)} rows of {name}")
        out[b, :n] = r
    return out
