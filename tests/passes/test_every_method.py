"""The contract of every method, found by discovery: a new file is covered the day it lands. More on those of the vision side:
test_every_vision_method.py.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import helpers
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llm_cases import AT_VISION, BUDGETED, METHODS, build
from torch import Tensor

from foveate.export.to_onnx import to_onnx
from foveate.graph.dump import dump
from foveate.graph.verify import verify
from foveate.passes.base import PassError, make
from foveate.passes.bypass import Bypass
from foveate.passes.oracle import mask_only
from foveate.passes.select import Select

CASES = int(os.environ.get("FOVEATE_ORACLE_CASES", "25"))  # per method; ten methods: 250 in all. `make nightly` asks for 10,000


@pytest.fixture(params=METHODS)
def any_method(request):
    return request.param


@pytest.fixture(params=BUDGETED)
def method(request):
    return request.param


@pytest.fixture(params=[*BUDGETED, *AT_VISION])
def everywhere(request):
    return request.param


@functools.cache
def reduced(name, keep, layer=1):
    """The toy after the method; traced once, never changed."""
    program = helpers.toy()
    assert build(name, keep, layer).run(program)
    verify(program)
    return program


def extra(name, dropped):
    return build(name, 2).merged(dropped)


def test_keeping_every_token_leaves_the_graph_alone(everywhere, toy):
    before = dump(toy)
    assert not build(everywhere, 1.0).run(toy)
    assert dump(toy) == before


def test_keeping_as_many_tokens_as_there_are_changes_no_bit(method, toy):
    feed = helpers.feeds([1, 1], [4, 4])
    want, got = toy["prefill"].run(feed), reduced(method, 6)["prefill"].run(feed)
    for name, value in want.items():
        same = got[name][:, :, : value.shape[2]] if value.dim() == 4 else got[name]  # merging leaves room for a cluster: a row of filler
        assert torch.equal(same, value), name


def test_shortens_what_it_says_and_nothing_else(method):
    program, feed = reduced(method, 2), helpers.feeds([1, 1], [4, 4])
    out, short = program["prefill"].run(feed), 4 + 2 + extra(method, 4)
    last = 10 if isinstance(build(method, 2), Bypass) else short
    assert [out[f"k.{l}"].shape[2] for l in range(3)] == [10, short, last]
    assert [out[f"v.{l}"].shape[2] for l in range(3)] == [10, short, last]
    assert program.facts.min_visual == 2


def test_gathering_early_changes_no_number(any_method):
    """The shipped recipes do it behind every cut; methods that read or recycle what is dropped must be left alone where they do."""
    feed = helpers.feeds([1, 2, 1], [4, 2, 5], seed=5)
    early = reduced(any_method, 3).clone()
    make("gather-early").run(early)
    verify(early)
    want, got = reduced(any_method, 3)["prefill"].run(feed), early["prefill"].run(feed)
    assert list(got) == list(want)
    for name, value in want.items():
        helpers.close(got[name], value)


def test_a_share_is_a_symbolic_budget(method):
    out = reduced(method, 0.25)["prefill"].run(helpers.feeds([1, 2, 0], [4, 2, 5]))
    more = [extra(method, 4), extra(method, 9), 0]  # ceil(6 / 4) = 2, ceil(12 / 4) = 3
    assert out["kv_lengths"][1].tolist() == [6 + more[0], 5 + more[1], 5]
    assert out["kv_lengths"][0].tolist() == [10, 14, 5]


def test_refuses_more_tokens_than_an_image_has(everywhere, toy):
    with pytest.raises(PassError, match=rf"{everywhere}: keep=7 is more than the 6"):
        build(everywhere, 7).run(toy)


def test_names_the_missing_layer(any_method, toy):
    with pytest.raises(PassError, match=rf"{any_method}: .*(no layer 9 in prefill; this program has 0..2|layer 9 has no layer behind it)"):
        build(any_method, 2, layer=9).run(toy)


def images(kind, feed):
    features = feed["image_features"]
    if kind == "constant":
        return torch.ones_like(features)
    if kind == "duplicates":
        return features[:, :1].expand_as(features) * (torch.arange(features.shape[1]) % 2 + 1)[None, :, None]
    peak = torch.zeros_like(features)
    peak[:, 2] = 50 * features[:, 2]
    return peak


@pytest.mark.parametrize("kind", ["constant", "duplicates", "peak"])
@pytest.mark.parametrize("per_image", [5, 7])
def test_degenerate_images_keep_exactly_the_budget(method, kind, per_image):
    feed = helpers.feeds([1, 2], [3, 3], per_image=per_image)
    feed["image_features"] = images(kind, feed)
    out = reduced(method, 3)["prefill"].run(feed)
    assert torch.isfinite(out["logits"]).all()
    kept = [[i for i in row if i >= 0] for row in out["kept.layer1"].tolist()]
    for b, row in enumerate(kept):
        assert row == sorted(set(row)) and len(row) == 3 + extra(method, per_image * (b + 1) - 3)
        assert out["kv_lengths"][1, b] == 3 + len(row)


def test_a_batch_equals_its_samples_alone(any_method):
    program = reduced(any_method, 3)
    batch = helpers.feeds([1, 2, 0], [5, 2, 3], seed=3)
    together = program["prefill"].run(batch)
    for b in range(3):
        valid = int(batch["attention_mask"][b].sum())
        n = max(int((batch["input_ids"][b] == helpers.IMAGE).sum()), 3)
        text = valid - int((batch["input_ids"][b] == helpers.IMAGE).sum())
        one = {k: v[b : b + 1, : n if k == "image_features" else text + n] for k, v in batch.items()}
        alone = program["prefill"].run(one)
        helpers.close(together["logits"][b], alone["logits"][0])
        kept = alone["kept.layer1"][0].tolist()
        row = together["kept.layer1"][b].tolist()
        assert row[: len(kept)] == kept and set(row[len(kept) :]) <= {-1}


@functools.cache
def pair(name, layer, keep):
    """(cut, mask-only) prefill stages."""
    return reduced(name, keep, layer)["prefill"], mask_only(helpers.toy(), [build(name, keep, layer)])["prefill"]


@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_equals_the_mask_only_oracle(any_method, data):
    """Same scores and same merged tokens, nothing gathered, dropped columns masked: logits and the K/V rows of kept tokens agree.

    25 cases per method; more with FOVEATE_ORACLE_CASES (`make nightly`).
    """
    layer, keep = data.draw(st.sampled_from([(1, 1), (1, 3), (1, 0.3)]))
    batch = data.draw(st.integers(1, 3))
    counts = data.draw(st.lists(st.integers(0, 3), min_size=batch, max_size=batch))
    text = data.draw(st.lists(st.integers(1, 6), min_size=batch, max_size=batch))
    feed = helpers.feeds(counts, text, seed=data.draw(st.integers(0, 10**6)), left=data.draw(st.booleans()), minimum=5)
    cut, masked = pair(any_method, layer, keep)
    got, want = cut.run(feed), masked.run(feed)
    helpers.close(got["logits"], want["logits"], 3e-5)  # a softmax over 1e-30-masked columns, summed in another order
    for b, row in enumerate(got[f"kept.layer{layer}"].tolist()):
        visual = (feed["input_ids"][b] == helpers.IMAGE).nonzero()[:, 0]
        dropped = set(range(len(visual))) - set(row)
        gone = {int(visual[i]) for i in dropped}
        stays = [t for t in range(feed["input_ids"].shape[1]) if feed["attention_mask"][b, t] and t not in gone]
        assert got["kv_lengths"][layer, b] == len(stays)
        helpers.close(got[f"k.{layer}"][b, :, : len(stays)], want[f"k.{layer}"][b][:, stays], 3e-5)


@pytest.mark.parametrize("keep", [3, 0.25])
def test_onnx_runtime_equals_eager(any_method, keep):
    """The same tokens, the same rows, from the file that is shipped; a batch with padding, two images and none."""
    program, feed = reduced(any_method, keep).clone(), helpers.feeds([1, 2, 0], [5, 2, 3], seed=7)
    make("clean-up").run(program)
    stage = program["prefill"]
    want = stage.run(feed)
    session = onnxruntime.InferenceSession(to_onnx(stage, "prefill").SerializeToString(), providers=["CPUExecutionProvider"])
    got = dict(zip(stage.outputs, session.run(stage.outputs, {i.name: feed[i.name].numpy() for i in session.get_inputs()}), strict=True))
    for name, value in want.items():
        if name.startswith("kept") or name == "kv_lengths":
            assert (got[name] == value.numpy()).all(), name
        else:
            helpers.close(torch.from_numpy(got[name]), value.detach(), 1e-4)  # other kernels, float32


def given_again(base, kept):
    """The same cut on a longer prompt: these ranks stay, whatever the method would think of the answer."""

    @dataclass(frozen=True)
    class Given(base):
        def score(self, visual_index: Tensor) -> Tensor:
            return torch.tensor([float(i in kept) for i in range(64)])[visual_index.clamp(0, 63)]

        def limit(self, visual_index: Tensor) -> Tensor:
            return torch.full_like(visual_index[:, 0], len(kept))

    return Given(**{"layers": (1,)} if issubclass(base, Bypass) else {"layer": 1}, keep=max(len(kept), 1))


def test_decode_equals_recomputing_the_longer_prompt_with_the_same_cut(any_method):
    """16 greedy steps over a cache whose layers have different lengths, against a prefill of prompt + answer that keeps the same tokens."""
    if METHODS[any_method].merge is None:
        program = reduced(any_method, 3)
    else:  # a longer prompt would cluster other streams; what is cached, and how long, is the same without
        program = helpers.toy()
        build(any_method, 3, recycle=False).run(program)
    feed = helpers.feeds([1], [4], seed=2)
    out, full = program["prefill"].run(feed), helpers.toy()
    kept = [i for i in out["kept.layer1"][0].tolist() if i >= 0]
    given_again(Bypass if issubclass(METHODS[any_method], Bypass) else Select, kept).run(full)
    lengths, logits = out["kv_lengths"].clone(), out["logits"]
    names = [n for n in program["decode"].outputs if n != "logits"]
    past = {f"past_{n}": out[n] for n in names}
    for _ in range(16):
        token = logits.argmax(-1, keepdim=True)
        token = torch.where(token == helpers.IMAGE, 1, token)
        position = feed["attention_mask"].sum(1, keepdim=True)
        step = program["decode"].run({"input_ids": token, "position_ids": position, "lengths": lengths, **past})
        logits = step["logits"]
        past = {f"past_{n}": torch.cat([past[f"past_{n}"][:, :, : int(lengths[int(n[2:]), 0])], step[n]], 2) for n in names}
        lengths = lengths + 1
        grown = {"input_ids": token, "attention_mask": torch.ones_like(token), "position_ids": position}
        feed = feed | {n: torch.cat([feed[n], value], 1) for n, value in grown.items()}
        helpers.close(logits, full["prefill"].run(feed)["logits"], 3e-5)


def test_no_attention_of_a_whole_layer_is_built_for_a_score(any_method):
    """Beside the layers' own fused nodes nothing in the graph has two sequence axes under heads; scores read rows, or columns one head at a
    time.
    """
    stage = reduced(any_method, 0.25)["prefill"]
    before = sum(n.target is helpers.F.attention.default for n in helpers.toy()["prefill"].graph.nodes)
    assert sum(n.target is helpers.F.attention.default for n in stage.graph.nodes) == before
    lengths = {str(n.meta["val"].shape[2]) for n in stage.graph.nodes if n.target is helpers.F.kv_store.default}
    for node in stage.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() == 4:
            assert not {str(value.shape[2])} & {str(value.shape[3])} & lengths, node.format_node()
