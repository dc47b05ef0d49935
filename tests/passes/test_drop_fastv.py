"""drop-fastv: the graph, a number by another route, refusals."""

import helpers
import pytest
import torch

from foveate.graph.dump import dump
from foveate.passes import pipeline, recipe
from foveate.passes.base import PassError, make


def test_graph(toy, golden):
    pipeline.run(toy, recipe.load("drop-fastv{layer=1,keep=2}, clean-up"))
    golden("drop_fastv", dump(toy, "prefill"))


def test_keeps_what_the_last_token_attends_to(toy):
    feed = helpers.feeds([1, 1], [4, 2], seed=5)
    embed = toy["prefill"].module.lm.embed.weight
    hidden = embed[feed["input_ids"]].clone()
    for b in range(2):
        hidden[b, feed["input_ids"][b] == helpers.IMAGE] = feed["image_features"][b]
    cos = torch.cos(feed["position_ids"][..., None] * torch.tensor([1.0, 0.3, 0.1, 0.03]))
    q, k, _ = (hidden @ toy["prefill"].module.lm.layers.get_submodule("0").qkv.weight.T).chunk(3, -1)
    want = []
    for b in range(2):
        last = int(feed["attention_mask"][b].sum()) - 1
        p = ((q[b] * cos[b])[last] @ (k[b] * cos[b])[: last + 1].T * 0.5).softmax(-1)
        visual = (feed["input_ids"][b] == helpers.IMAGE).nonzero()[:, 0]
        want.append(sorted(p[visual].topk(2).indices.tolist()))
    make("drop-fastv", {"layer": 1, "keep": 2}).run(toy)
    assert toy["prefill"].run(feed)["kept.layer1"].tolist() == want


def test_has_nothing_to_tap_at_the_first_layer(toy):
    with pytest.raises(PassError, match=r"drop-fastv: reads the attention before layer 0, and there is none; the first layer it can cut at is 1"):
        make("drop-fastv", {"layer": 0, "keep": 2}).run(toy)


def test_decode_after_a_cut_equals_recomputing_the_longer_prompt_with_the_same_cut(toy):
    """16 greedy steps over a cache whose layers have different lengths, against a prefill of prompt + answer that keeps the same tokens."""
    feed = helpers.feeds([1, 1], [4, 4], seed=2)
    full = toy.clone()
    make("drop-random", {"layer": 1, "keep": 2}).run(toy)  # chooses by index, so the longer prompt chooses the same
    make("drop-random", {"layer": 1, "keep": 2}).run(full)
    out = toy["prefill"].run(feed)
    lengths = out["kv_lengths"].clone()
    past = {f"past_{n}": out[n] for n in toy["decode"].outputs if n != "logits"}
    logits = out["logits"]
    for _ in range(16):
        token = logits.argmax(-1, keepdim=True)
        token = torch.where(token == helpers.IMAGE, 1, token)
        position = feed["attention_mask"].sum(1, keepdim=True)
        step = toy["decode"].run({"input_ids": token, "position_ids": position, "lengths": lengths, **past})
        logits = step["logits"]
        past = {f"past_{n}": torch.cat([past[f"past_{n}"][:, :, : int(lengths[int(n[2:]), 0])], step[n]], 2) for n in toy["decode"].outputs if n != "logits"}
        lengths = lengths + 1
        one = torch.ones_like(token)
        feed = feed | {"input_ids": torch.cat([feed["input_ids"], token], 1), "attention_mask": torch.cat([feed["attention_mask"], one], 1),
                       "position_ids": torch.cat([feed["position_ids"], position], 1)}
        helpers.close(logits, full["prefill"].run(feed)["logits"], 3e-5)
