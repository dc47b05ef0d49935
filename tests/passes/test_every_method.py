"""The contract of every method, found by discovery: a new file is covered the day it lands."""

import os

import helpers
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.graph.dump import dump
from foveate.graph.verify import verify
from foveate.passes.base import PassError, discover, make
from foveate.passes.oracle import mask_only
from foveate.passes.select import Select
from foveate.passes.vision_select import VisionSelect

CASES = int(os.environ.get("FOVEATE_ORACLE_CASES", "75"))  # per method; `make nightly` asks for 10,000 in all
IN_LLM = [n for n, p in discover().items() if issubclass(p, Select)]
AT_VISION = [n for n, p in discover().items() if issubclass(p, VisionSelect)]


@pytest.fixture(params=IN_LLM)
def method(request):
    return request.param


@pytest.fixture(params=[*IN_LLM, *AT_VISION])
def any_method(request):
    return request.param


def build(name, keep, layer=1):
    return make(name, {"keep": keep} | ({"layer": layer} if name in IN_LLM else {}))


def test_keeping_every_token_leaves_the_graph_alone(any_method, toy):
    before = dump(toy)
    assert not build(any_method, 1.0).run(toy)
    assert dump(toy) == before


def test_keeping_as_many_tokens_as_there_are_changes_no_bit(method, toy):
    feed = helpers.feeds([1, 1], [4, 4])
    want = toy["prefill"].run(feed)
    assert build(method, 6).run(toy)
    got = toy["prefill"].run(feed)
    for name in want:
        assert torch.equal(got[name], want[name]), name


def test_shortens_every_layer_behind_it_and_none_before(method, toy):
    assert build(method, 2).run(toy)
    verify(toy)
    assert [entry.length for entry in toy.kv] == ["S", "-N + S + 2", "-N + S + 2"]
    assert toy.facts.min_visual == 2


def test_a_share_is_a_symbolic_budget(method, toy):
    assert build(method, 0.25).run(toy)
    verify(toy)
    out = toy["prefill"].run(helpers.feeds([1, 2, 0], [4, 2, 5]))
    assert out["kv_lengths"].T.tolist() == [[10, 6, 6], [14, 5, 5], [5, 5, 5]]  # ceil(6 / 4) = 2, ceil(12 / 4) = 3


def test_a_vision_method_shortens_every_image(toy):
    for name in AT_VISION:
        program = toy.clone()
        assert build(name, 2).run(program)
        verify(program)
        out = program["vision"].run({"pixel_values": torch.randn(3, 6, 3)})
        assert out["image_features"].shape == (6, helpers.WIDTH) and out["kept.vision"].shape == (3, 2)
        assert program.facts.visual_per_image == 2


def test_refuses_more_tokens_than_an_image_has(any_method, toy):
    with pytest.raises(PassError, match=rf"{any_method}: keep=7 is more than the 6"):
        build(any_method, 7).run(toy)


def test_names_the_missing_layer(method, toy):
    with pytest.raises(PassError, match=rf"{method}: no layer 9 in prefill; this program has 0..2"):
        build(method, 2, layer=9).run(toy)


def test_duplicate_tokens_and_constant_images_keep_exactly_the_budget(method, toy):
    assert build(method, 3).run(toy)
    feed = helpers.feeds([1, 2], [3, 3])
    feed["image_features"] = torch.ones_like(feed["image_features"])
    out = toy["prefill"].run(feed)
    assert (out["kept.layer1"] >= 0).all() and out["kv_lengths"][1].tolist() == [6, 6]
    assert all(len(set(row)) == 3 and row == sorted(row) for row in out["kept.layer1"].tolist())


def test_a_batch_equals_its_samples_alone(method, toy):
    assert build(method, 3).run(toy)
    batch = helpers.feeds([1, 2, 0], [5, 2, 3], seed=3)
    together = toy["prefill"].run(batch)
    for b in range(3):
        valid = int(batch["attention_mask"][b].sum())
        n = max(int((batch["input_ids"][b] == helpers.IMAGE).sum()), 3)
        text = valid - int((batch["input_ids"][b] == helpers.IMAGE).sum())
        one = {k: v[b : b + 1, : n if k == "image_features" else text + n] for k, v in batch.items()}
        alone = toy["prefill"].run(one)
        helpers.close(together["logits"][b], alone["logits"][0])
        assert together["kept.layer1"][b].tolist() == alone["kept.layer1"][0].tolist()


_PAIRS: dict[tuple, tuple] = {}


def pair(name, layer, keep):
    """(cut, mask-only) programs, traced once per setting."""
    if (name, layer, keep) not in _PAIRS:
        selection, cut = build(name, keep, layer), helpers.toy()
        masked = mask_only(cut, [selection])
        selection.run(cut)
        _PAIRS[name, layer, keep] = cut["prefill"], masked["prefill"]
    return _PAIRS[name, layer, keep]


@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_cut_equals_the_mask_only_oracle(method, data):
    """Same scores, nothing gathered, dropped columns masked: logits and the K/V rows of kept tokens agree. 75 cases per method; more with
    FOVEATE_ORACLE_CASES (the nightly command)."""
    layer = data.draw(st.sampled_from([1, 2]))
    keep = data.draw(st.sampled_from([1, 3, 5, 0.3, 0.7]))
    batch = data.draw(st.integers(1, 3))
    images = data.draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch))
    text = data.draw(st.lists(st.integers(1, 6), min_size=batch, max_size=batch))
    feed = helpers.feeds(images, text, seed=data.draw(st.integers(0, 10**6)), left=data.draw(st.booleans()), minimum=5)
    cut, masked = pair(method, layer, keep)
    got, want = cut.run(feed), masked.run(feed)
    helpers.close(got["logits"], want["logits"], 3e-5)  # a softmax over 1e-30-masked columns, summed in another order
    for b, row in enumerate(got[f"kept.layer{layer}"].tolist()):
        visual = (feed["input_ids"][b] == helpers.IMAGE).nonzero()[:, 0]
        dropped = set(range(len(visual))) - set(row)
        stays = [t for t in range(feed["input_ids"].shape[1]) if feed["attention_mask"][b, t] and t not in {int(visual[i]) for i in dropped}]
        assert got["kv_lengths"][layer, b] == len(stays)
        helpers.close(got[f"k.{layer}"][b, :, : len(stays)], want[f"k.{layer}"][b][:, stays], 3e-5)
