"""Vision-side methods in front of a language model: the whole toy VLM, several pictures, and any method of the language model behind them."""

from __future__ import annotations

import functools
import itertools
import os

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_cases import METHODS as IN_LLM
from llm_cases import build
from vision_cases import METHODS
from vision_inputs import signals

from foveate.graph.verify import verify
from foveate.passes.base import make
from foveate.passes.oracle import mask_only
from foveate.passes.vision_select import VisionMerge

KEEP = 3
GROUPED = {"prune-evs": {"frames": 3}, "prune-globalcom2": {"rows": 1, "columns": 2}}  # three pictures per budget


def at_vision(name, keep=KEEP):
    return make(name, {"keep": keep, **GROUPED.get(name, {})})


@functools.cache
def program(vision, llm=None):
    """The toy after a method at the vision side and, maybe, one in the language model; traced once, never changed."""
    found = helpers.toy()
    assert at_vision(vision).run(found)
    if llm:
        assert build(llm, 2).run(found)
    verify(found)
    return found


def pictures(count, seed):
    return torch.randn(count, 6, 3, generator=torch.Generator().manual_seed(seed))


def prompt(found, images, text, seed=0, pixels=None):
    """Prefill feeds of samples with so many pictures each, through the vision stage; every picture brings what the program says."""
    each = found.facts.visual_per_image
    pixels = pictures(sum(images), seed) if pixels is None else pixels
    with torch.no_grad():
        seen = found["vision"].run({"pixel_values": pixels}) if sum(images) else {"image_features": torch.zeros(0, helpers.WIDTH)}
    feed = helpers.feeds(images, text, seed=seed, per_image=each, minimum=max(4, found.facts.min_visual))
    feed["image_features"] = torch.zeros_like(feed["image_features"])
    for b, rows in enumerate(torch.split(seen["image_features"], [each * i for i in images])):
        feed["image_features"][b, : len(rows)] = rows
    return feed, seen


@pytest.mark.parametrize("name", METHODS)
def test_keeping_every_token_is_the_identity_bit_for_bit(name):
    """The plan itself, where the budget is everything: the pass would not even run it."""
    method = at_vision(name)
    if isinstance(method, VisionMerge):
        pytest.skip("a merging method writes a summary or contextual rows even where all could stay; the pass does nothing then")
    s = signals(4, images=method.shared, grid=(2, 3), layers=2)
    plan = method.plan(6 * method.shared, s)
    x = s.features.flatten(0, 1)[None] if method.shared > 1 else s.features
    assert torch.equal(plan.apply(x)[:1], x)


@pytest.mark.parametrize("name", METHODS)
def test_equals_the_unreduced_program_given_the_same_rows(name):
    """Gathered (or merged) outside the graph: the unreduced tower, the rows that `kept.vision` names, the unreduced language model."""
    found, shared = program(name), at_vision(name).shared
    images, text = [shared, 2 * shared, 0], [4, 3, 2]
    feed, seen = prompt(found, images, text, seed=1)
    if not isinstance(at_vision(name), VisionMerge):
        with torch.no_grad():
            whole = helpers.toy()["vision"].run({"pixel_values": pictures(sum(images), 1)})["image_features"].view(-1, 6, helpers.WIDTH)
        rows = torch.cat([x[[i for i in kept if i >= 0]] for x, kept in zip(whole, seen["kept.vision"].tolist(), strict=True)])
        for b, part in enumerate(torch.split(rows, [KEEP * i for i in images])):
            torch.testing.assert_close(feed["image_features"][b, : len(part)], part, rtol=1e-5, atol=1e-5)  # matmul blocking
            feed["image_features"][b, : len(part)] = part
    got, want = found["prefill"].run(feed), helpers.toy()["prefill"].run(feed)
    assert torch.equal(got["logits"], want["logits"])  # a method at the vision side leaves the language model alone
    assert got["kv_lengths"].T.tolist() == [[t + KEEP * i] * 3 for t, i in zip(text, images, strict=True)]


@pytest.mark.parametrize("name", METHODS)
def test_sixteen_steps_equal_recomputing_the_longer_prompt(name):
    found = program(name)
    feed, _ = prompt(found, [at_vision(name).shared], [4], seed=2)
    out = found["prefill"].run(feed)
    lengths, logits = out["kv_lengths"].clone(), out["logits"]
    names = [n for n in found["decode"].outputs if n != "logits"]
    past = {f"past_{n}": out[n] for n in names}
    for _ in range(16):
        token = logits.argmax(-1, keepdim=True)
        token = torch.where(token == helpers.IMAGE, 1, token)
        position = feed["attention_mask"].sum(1, keepdim=True)
        step = found["decode"].run({"input_ids": token, "position_ids": position, "lengths": lengths, **past})
        logits = step["logits"]
        past = {f"past_{n}": torch.cat([past[f"past_{n}"][:, :, : int(lengths[int(n[2:]), 0])], step[n]], 2) for n in names}
        lengths = lengths + 1
        grown = {"input_ids": token, "attention_mask": torch.ones_like(token), "position_ids": position}
        feed = feed | {n: torch.cat([feed[n], value], 1) for n, value in grown.items()}
        helpers.close(logits, found["prefill"].run(feed)["logits"], 3e-5)


CASES = int(os.environ.get("FOVEATE_PAIR_CASES", "8"))  # a pair is traced anew: a second each
PAIRS = list(itertools.product(METHODS, IN_LLM))


@settings(max_examples=CASES, deadline=None)
@given(data=st.data())
def test_any_method_at_the_vision_side_before_any_in_the_language_model(data):
    """Several pictures per sample: the cut equals its mask-only oracle, and a batch of three its samples alone."""
    vision, llm = data.draw(st.sampled_from(PAIRS))
    seed, shared = data.draw(st.integers(0, 10**6)), at_vision(vision).shared
    images = [shared * i for i in data.draw(st.permutations([0, 1, 2]))]
    text = data.draw(st.lists(st.integers(1, 5), min_size=3, max_size=3))
    found = program(vision, llm)
    feed, _ = prompt(found, images, text, seed)
    before = helpers.toy()
    at_vision(vision).run(before)
    got, want = found["prefill"].run(feed), mask_only(before, [build(llm, 2)])["prefill"].run(feed)
    helpers.close(got["logits"], want["logits"], 3e-5)  # a softmax over 1e-30-masked columns, summed in another order
    pixels, start = pictures(sum(images), seed), 0
    for b in range(3):
        n = images[b] * found.facts.visual_per_image
        length = text[b] + max(n, 4, found.facts.min_visual)
        alone = {k: v[b : b + 1, :length] for k, v in feed.items() if k != "image_features"}
        alone["image_features"] = torch.zeros(1, length - text[b], helpers.WIDTH)
        if n:
            with torch.no_grad():
                alone["image_features"][0, :n] = found["vision"].run({"pixel_values": pixels[start : start + images[b]]})["image_features"]
        start += images[b]
        helpers.close(got["logits"][b : b + 1], found["prefill"].run(alone)["logits"], 3e-5)
