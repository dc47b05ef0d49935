"""Sites, cost, dump, verify, splice and retype on the toy."""

import helpers
import pytest
import sympy
import torch

from foveate.graph.cost import cost
from foveate.graph.dump import dump
from foveate.graph.errors import GraphError
from foveate.graph.retype import reroute, retype
from foveate.graph.sites import role, site
from foveate.graph.splice import splice
from foveate.graph.verify import verify
from foveate.passes.base import make


def test_dump(toy, golden):
    golden("toy", dump(toy))


def test_dump_is_the_same_for_two_captures_of_one_model():
    helpers._toy.cache_clear()
    first = dump(helpers.toy())
    helpers._toy.cache_clear()
    assert dump(helpers.toy()) == first


def test_what_crosses_into_a_layer(toy):
    where = site(toy, 1)
    crossing = {c.node.name: c.axes for c in where.crossings}
    assert where.hidden.name in crossing and crossing[where.hidden.name] == (1,)
    assert len(crossing) == 3  # residual, cos, padding mask
    assert all(axes == (1,) for axes in crossing.values())


def test_an_unknown_layer_names_the_known_ones(toy):
    with pytest.raises(GraphError, match=r"no layer 5 in prefill; this program has 0..2"):
        site(toy, 5)


def test_a_role_follows_the_cut(toy):
    make("drop-uniform", {"layer": 1, "keep": 2}).run(toy)
    before, after = site(toy, 1), site(toy, 2)
    assert str(role(toy, "visual", after.first).meta["val"].shape[1]) == str(after.length)
    assert str(role(toy, "visual", before.first).meta["val"].shape[1]) != str(site(toy, 0).length)


def test_cost_counts_what_the_layers_compute(toy):
    at = cost(toy).at(B=2, S=10, N=6)
    d, tokens = helpers.WIDTH, 2 * 10
    layer = 2 * tokens * d * 3 * d + 2 * tokens * d * d + 2 * 2 * 2 * 10 * 10 * d  # qkv, mlp, two attention matmuls
    assert [row["flops"] for row in at["layers"] if row["layer"] >= 0] == [layer] * 3
    assert at["kv_bytes"] == 3 * 2 * 2 * 10 * d * 4


def test_cost_after_a_cut_is_the_cost_of_a_shorter_sequence(toy):
    whole = cost(toy).at(B=1, S=6, N=2)["layers"]
    make("drop-uniform", {"layer": 1, "keep": 2}).run(toy)
    cut = cost(toy)
    assert cut.flops.free_symbols == {sympy.Symbol(s, integer=True, positive=True) for s in "BSN"}
    layers = {row["layer"]: row for row in cut.at(B=1, S=10, N=6)["layers"]}
    assert layers[2]["flops"] == {r["layer"]: r for r in whole}[2]["flops"] and layers[2]["tokens"] == 6


def test_verify_finds_a_stale_mask(toy):
    make("drop-uniform", {"layer": 1, "keep": 2}).run(toy)
    stage = toy["prefill"]
    attentions = [n for n in stage.graph.nodes if n.target is torch.ops.foveate.attention.default]
    attentions[2].args = (*attentions[2].args[:3], attentions[0].args[3], *attentions[2].args[4:])
    with pytest.raises(GraphError, match=r"verify: prefill: the mask of attention_2 covers S? ?.*keys of"):
        verify(toy)


def test_verify_finds_a_wrong_kv_table(toy):
    make("drop-uniform", {"layer": 1, "keep": 2}).run(toy)
    toy.kv = [entry.__class__(**{**entry.__dict__, "length": "S"}) for entry in toy.kv]
    with pytest.raises(GraphError, match="verify: the KV table says"):
        verify(toy)


def test_splice_keeps_inputs_apart_that_share_a_fake_tensor(toy):
    """`retype` computes equal nodes of several layers once; tracing must not take one for the other."""
    one, two = site(toy, 1), site(toy, 2)
    two.hidden.meta["val"] = one.hidden.meta["val"]
    difference = splice(toy["prefill"], two.first, lambda a, b: a - b, one.hidden, two.hidden)
    assert difference.args[:2] == (one.hidden, two.hidden)


def test_splice_inlines_and_retype_follows(toy):
    stage = toy["prefill"]
    logits = stage.output_nodes["logits"]
    doubled = splice(stage, next(n for n in reversed(stage.graph.nodes) if n.op == "output"), lambda x, f: (x * f)[:, : x.shape[1] // 2], logits, 2.0)
    reroute(next(n for n in reversed(stage.graph.nodes) if n.op == "output"), logits, doubled)
    retype(stage)
    stage.module.recompile()
    feed = helpers.feeds([1], [3])
    want = helpers.toy()["prefill"].run(feed)["logits"]
    assert torch.equal(stage.run(feed)["logits"], 2 * want[:, :6])


def test_retype_says_which_node_no_longer_fits(toy):
    stage = toy["prefill"]
    first = site(toy, 1)
    wide = splice(stage, first.first, lambda h: torch.cat([h, h], -1), first.hidden)
    reroute(first.first, first.hidden, wide)
    with pytest.raises(GraphError, match=r"retype: .*linear.* does not fit its inputs"):
        retype(stage)


def test_the_prefill_and_decode_stages_share_their_parameters(toy):
    shared = dict(toy["prefill"].module.named_parameters())
    for name, parameter in toy["decode"].module.named_parameters():
        assert shared[name] is parameter
    assert sum(1 for _ in toy.parameters()) < sum(len(dict(s.module.named_parameters())) for s in toy.stages.values())


def test_a_stage_names_what_it_is_fed_wrongly(toy):
    with pytest.raises(GraphError, match=r"inputs missing \['attention_mask'\], unknown \['mask'\]"):
        feed = helpers.feeds([1], [3])
        toy["prefill"].run({**{k: v for k, v in feed.items() if k != "attention_mask"}, "mask": feed["attention_mask"]})


def test_the_picture_has_every_layer_and_the_cut(toy):
    from foveate.graph.view import dot, page

    make("drop-uniform", {"layer": 1, "keep": 2}).run(toy)
    text = dot(toy)
    assert text.count("subgraph cluster_") == 3 and text.count("{") == text.count("}")
    names = {line.split('"')[1] for line in text.splitlines() if "label=" in line and '"' in line and "->" not in line and "layer " not in line}
    assert all(part in names for line in text.splitlines() if "->" in line for part in (line.split('"')[1], line.split('"')[3]))
    shown = page(toy, {"S": 10, "N": 6})
    assert shown.count("class=cut") == 2 and "<td>6</td>" in shown and "http" not in shown
