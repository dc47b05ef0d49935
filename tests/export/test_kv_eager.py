"""The cache manager of the eager engine: long generations, what it refuses, copies, packed bytes."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from helpers import feeds, toy
from lowering import engine

from foveate.export.backends.eager import EagerEngine
from foveate.export.errors import LowerError
from foveate.passes.pipeline import run
from foveate.passes.recipe import load


@functools.cache
def built(recipe):
    return run(toy(2), load(recipe)) if recipe else toy(2)


def start(recipe, given, spare):
    batch = {n: t.numpy() for n, t in given.items()}
    one = EagerEngine.of(built(recipe))
    outputs, cache = one.prefill(batch, batch["input_ids"].shape[1] + spare)
    return one, outputs["logits"], cache, batch["attention_mask"].sum(1, keepdims=True)


def steps(one, cache, lengths, count, first=0):
    return np.stack([one.decode(cache, np.full(lengths.shape, 1 + i % 3), lengths + i) for i in range(first, first + count)])


@functools.cache
def long(recipe):
    one, _, cache, lengths = start(recipe, feeds([1, 2], [30, 34]), 512)
    return steps(one, cache, lengths, 512)


@pytest.mark.parametrize("recipe", ["kv-kivi{group=2,residual=32}", "kv-int8{k_per=token,v_per=token}", "kv-zipcache{hi=int8,lo=int8,streaming_gap=32}"])
def test_512_steps_do_not_drift(recipe):
    """The error against a float cache does not grow: over the last 128 steps it is no larger than over the first 128 (twice, for chance).

    The streaming cache's scales are the prompt's, so its first flush is the reference: steps 128 to 256.
    """
    exact = long("")
    error = np.abs(long(recipe) - exact).mean((1, 2)) / exact.std()
    reference = error[128:256] if "streaming" in recipe else error[:128]
    assert error[-128:].mean() <= 2 * reference.mean() + 1e-6
    assert error.mean() < 0.5


def test_a_token_is_quantized_once():
    """What a flush stored is never written again: the bytes of the settled rows stay through later flushes."""
    one, _, cache, lengths = start("kv-kivi{group=2,residual=8}", feeds([2], [20]), 100)
    steps(one, cache, lengths, 40)
    settled = int(cache.parts["lengths.lo"][0, 0])
    before = {n: t[:, :, : settled // (2 if n.endswith(("k.0.lo.scale", "k.0.lo.center")) else 1)].clone() for n, t in cache.values.items() if ".0.lo" in n}
    steps(one, cache, lengths, 40, 40)
    assert int(cache.parts["lengths.lo"][0, 0]) > settled
    for name, value in before.items():
        torch.testing.assert_close(cache.values[name][:, :, : value.shape[2]], value, rtol=0, atol=0)


def test_copies_go_their_own_ways():
    one, _, cache, lengths = start("kv-int4", feeds([1, 2], [5, 6]), 20)
    twins = cache.take(np.array([0, 0, 1]))
    a = steps(one, twins, lengths[[0, 0, 1]], 6)
    b = steps(one, cache, lengths, 6)
    np.testing.assert_allclose(a[:, [0, 2]], b, rtol=0, atol=1e-6 * np.abs(b).max())  # other batch, other order of summation
    np.testing.assert_array_equal(a[:, 0], a[:, 1])


def test_the_clip_rate_counts_what_the_prompt_did_not_foresee():
    one, _, cache, lengths = start("kv-int8{margin=4}", feeds([2], [30]), 20)
    assert cache.clip_rate() == 0.0
    steps(one, cache, lengths, 10)
    assert cache.clip_rate() == 0.0, "a range four times the prompt's holds everything here"
    small = run(toy(2), load("kv-int8{margin=1}"))
    narrow = EagerEngine.of(small)
    batch = {n: t.numpy() for n, t in feeds([0], [2]).items()}
    _, tight = narrow.prefill(batch, 40)
    steps(narrow, tight, batch["attention_mask"].sum(1, keepdims=True), 10)
    assert tight.clip_rate() > 0.05, "two rows foresee little"
    assert start("", feeds([1], [5]), 4)[2].clip_rate() is None


def test_nan_in_keys_is_named():
    given = feeds([1, 1], [5, 6])
    given["image_features"][1] = float("nan")
    with pytest.raises(LowerError, match=r"cache: the keys of layer 0 hold NaN or infinity in samples \[1\]; they cannot be quantized"):
        start("kv-int8", given, 4)


def test_missing_scales_are_named(tmp_path):
    one = engine(built("kv-int8"), tmp_path, "eager")
    batch = {n: t.numpy() for n, t in feeds([1], [5]).items()}
    _, cache = one.prefill(batch, 20)
    del cache.values["past_k.1.scale"]
    with pytest.raises(LowerError, match=r"eager: decode lacks the inputs \['past_k.1.scale'\]"):
        one.decode(cache, np.array([[1]]), np.array([[11]]))


@pytest.mark.parametrize(("recipe", "small"), [("kv-int4", 8), ("kv-zipcache{sinks=0,recent=1}", 7)])
def test_codes_are_packed(recipe, small):
    """Against float32, at the same number of rows, once the rows outweigh the scales; 8 = 32 bits / 4."""
    given = feeds([40], [60], per_image=10)
    whole, stored = (start(name, given, 1)[2].nbytes for name in ("", recipe))
    assert whole / stored > small * 0.8
