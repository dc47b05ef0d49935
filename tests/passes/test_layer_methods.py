"""What single methods inside the language model promise beyond the contract: numbers by another route, and refusals."""

from dataclasses import replace

import helpers
import pytest
import torch

from foveate.graph.verify import verify
from foveate.passes import pipeline, recipe
from foveate.passes.base import PassError, make
from foveate.passes.budget import rank_in_group
from foveate.passes.exit_layers import ExitReport, exit_layers
from foveate.passes.oracle import mask_only
from foveate.passes.recycle import candidates, cluster, clusters


def ran(text):
    return pipeline.run(helpers.toy(), recipe.load(text))


def test_two_stages_equal_the_mask_only_oracle():
    method = make("drop-pyramid", {"layers": [1, 2], "keeps": [0.5, 0.25]})
    program, masked = helpers.toy(), mask_only(helpers.toy(), [method])
    method.run(program)
    feed = helpers.feeds([1, 2, 0], [5, 2, 3], seed=4)
    got = program["prefill"].run(feed)
    helpers.close(got["logits"], masked["prefill"].run(feed)["logits"], 3e-5)
    assert got["kv_lengths"].T.tolist() == [[11, 8, 7], [14, 8, 5], [3, 3, 3]]  # of the prompt's 6 and 12
    assert all(set(b) <= set(a) for a, b in zip(got["kept.layer1"].tolist(), got["kept.layer2"].tolist(), strict=True))


def test_pyramid_reads_the_attention_of_the_layer_it_cuts_at():
    """At layer 0 the toy's own first attention, on embeddings, decides: by hand."""
    program, feed = helpers.toy(), helpers.feeds([1], [4], seed=5)
    hidden = program["prefill"].module.lm.embed.weight[feed["input_ids"]].clone()
    visual = feed["input_ids"][0] == helpers.IMAGE
    hidden[0, visual] = feed["image_features"][0]
    cos = torch.cos(feed["position_ids"][..., None] * torch.tensor([1.0, 0.3, 0.1, 0.03]))
    q, k, _ = (hidden @ program["prefill"].module.lm.layers.get_submodule("0").qkv.weight.T).chunk(3, -1)
    p = ((q * cos)[0, -1] @ (k * cos)[0].T * 0.5).softmax(-1)[visual]
    make("drop-pyramid", {"layers": [0], "keeps": [2]}).run(program)
    assert program["prefill"].run(feed)["kept.layer0"][0].tolist() == sorted(p.topk(2).indices.tolist())


@pytest.mark.parametrize(("text", "message"), [
    ("drop-pyramid{layers=[1,2],keeps=[0.5]}", "drop-pyramid: layers and keeps go together; there are 2 layers and 1 keeps"),
    ("drop-pyramid{layers=[2,1],keeps=[0.5,0.2]}", r"drop-pyramid: layers must ascend, got \[2, 1\]"),
    ("drop-pyramid{layers=[1,2],keeps=[0.2,0.5]}", r"drop-pyramid: keeps must not grow, got \[0.2, 0.5\]"),
    ("bypass-mod{layers=[2],keep=0.5}", "bypass-mod: layer 2 has no layer behind it .*; the last that can be bypassed is 1"),
    ("bypass-mod{layers=[0,1],keep=0.5}", "bypass-mod: layer 1 chooses by the attention of layer 0, which is bypassed too .*; leave a layer between them"),
    ("exit-vision{layer=auto}", "exit-vision: layer: auto is a question to data: `foveate exits"),
    ("drop-zip-vl{layers=[0],keeps=[0.5]}", "drop-zip-vl: reads the attention before layer 0, .*the first layer it can cut at is 1"),
])
def test_refuses_by_name(text, message):
    with pytest.raises(PassError, match=message):
        ran(text)


def test_must_drop_evicts_from_the_caches_between_its_first_and_its_last_cut():
    text = "drop-must-drop{layers=[1,2],keeps=[5,3],global_share=0.15,individual=0.15,evict=%s}, clean-up"
    whole, short = ran(text % "false"), ran(text % "true")
    verify(short)
    assert [e.length for e in short.kv] == ["S", "-N + S + 3", "-N + S + 3"] and [e.length for e in whole.kv][1] == "-N + S + 5"
    feed = helpers.feeds([1, 2, 0], [5, 2, 3], seed=1)
    a, b = whole["prefill"].run(feed), short["prefill"].run(feed)
    assert torch.equal(a["logits"], b["logits"]) and torch.equal(a["kv_lengths"][[0, 2]], b["kv_lengths"][[0, 2]])
    assert torch.equal(b["kv_lengths"][1], b["kv_lengths"][2]) and (a["kv_lengths"][1] > b["kv_lengths"][1]).any()
    for s in range(3):
        is_text, seen = feed["input_ids"][s] != helpers.IMAGE, 0
        names = []  # of the rows of layer 1 in the run that evicts nothing: None for text, else the rank of the visual token
        kept = [i for i in a["kept.layer1"][s].tolist() if i >= 0]
        for t in range(int(feed["attention_mask"][s].sum())):
            rank = None if is_text[t] else seen
            seen += not is_text[t]
            if rank is None or rank in kept:
                names.append(rank)
        stays = [i for i, rank in enumerate(names) if rank is None or rank in a["kept.layer2"][s].tolist()]
        for name in ("k.1", "v.1"):
            assert torch.equal(b[name][s, :, : len(stays)], a[name][s][:, stays]), (s, name)


def test_zip_vl_keeps_the_mass_it_says():
    feed = helpers.feeds([2], [4], seed=3)
    counts = {}
    for mass in (0.3, 0.6, 0.9):
        program = ran(f"drop-zip-vl{{layers=[1],keeps=[1.0],mass={mass}}}")
        counts[mass] = sum(i >= 0 for i in program["prefill"].run(feed)["kept.layer1"][0].tolist())
    stage = helpers.toy()["prefill"]
    attention = next(n for n in stage.graph.nodes if n.target is helpers.F.attention.default)
    stage.add_output("q", attention.args[0])
    stage.module.recompile()
    out = stage.run(feed)
    q, k = out["q"][0, 0], out["k.0"][0, 0]
    p = (q @ k.T * 0.5).masked_fill(torch.ones(len(q), len(q)).triu(1).bool(), float("-inf")).softmax(-1)
    received = p.sum(0)[feed["input_ids"][0] == helpers.IMAGE].sort(descending=True).values
    for mass, count in counts.items():
        assert received[:count].sum() >= mass * received.sum() - 1e-5 > received[: count - 1].sum() - 2e-5
    bucketed = ran("drop-zip-vl{layers=[1],keeps=[1.0],mass=0.3,buckets=[4,8]}")["prefill"].run(feed)["kept.layer1"][0]
    assert sum(i >= 0 for i in bucketed.tolist()) == next(size for size in (4, 8, 12) if size >= counts[0.3])


def test_exit_leaves_only_text_even_when_the_prompt_ends_with_an_image():
    program = ran("exit-vision{layer=2}")
    feed = helpers.feeds([1, 0], [4, 4])
    out = program["prefill"].run(feed)
    assert out["kv_lengths"].T.tolist() == [[10, 10, 4], [4, 4, 4]]
    row = feed["input_ids"][0]
    last = torch.cat([row[row != helpers.IMAGE], row[row == helpers.IMAGE]])
    ends = program["prefill"].run({k: v[:1] for k, v in feed.items()} | {"input_ids": last[None]})
    assert ends["kept.layer2"].tolist() == [[5]] and ends["kv_lengths"][2].tolist() == [5]


def test_exit_layers_agree_with_exits_tried_one_by_one():
    feeds = [helpers.feeds([1, 2, 1], [5, 2, 3], seed=s) for s in range(3)]
    report = exit_layers(helpers.toy(), feeds)
    assert sorted(report.agreement) == [1, 2]
    for layer in (1, 2):
        program = ran(f"exit-vision{{layer={layer}}}")
        same = [(a["prefill"].run(f)["logits"].argmax(-1) == b["prefill"].run(f)["logits"].argmax(-1)).float().mean()
                for f in feeds for a, b in [(program, helpers.toy())]]
        assert report.agreement[layer] == pytest.approx(float(torch.stack(same).mean())) and report.kl[layer] >= 0
    assert ExitReport({}, {}, (1, 2, 2, 3)).choose(0.75) == 2 and ExitReport({}, {}, (1, 2, 2, 3)).choose(1.0) == 3
    with pytest.raises(PassError, match=r"exit-vision: no layers \[7\]; this program has 0..2"):
        exit_layers(helpers.toy(), feeds, [7])


def test_ranks_within_images():
    score, group = torch.tensor([[3.0, 1.0, 1.0, 5.0, 2.0, 9.0]]), torch.tensor([[0, 0, 0, 1, 1, 1]])
    present = torch.tensor([[1, 1, 1, 1, 1, 0]]).bool()
    assert rank_in_group(score, group, present)[:, :5].tolist() == [[0, 1, 2, 0, 1]]


def test_bypass_serves_every_image_alike():
    program = ran("bypass-mod{layers=[1],keep=0.5}")
    kept = program["prefill"].run(helpers.feeds([2], [4], seed=6))["kept.layer1"][0].tolist()
    assert len(kept) == 6 and sum(i < 6 for i in kept) == 3


def test_clusters_of_two_clouds_and_of_duplicates():
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1, 4, 3) * 0.1, torch.randn(1, 4, 3) * 0.1 + 9, torch.zeros(1, 2, 3)], 1)
    there = torch.arange(10)[None] < 8
    centre, owner = cluster(x, there, torch.tensor([2]))
    assert centre.sum() == 2 and len(set(owner[0, :4].tolist())) == len(set(owner[0, 4:8].tolist())) == 1 and owner[0, 0] != owner[0, 4]
    centre, owner = cluster(torch.ones(1, 6, 3), torch.ones(1, 6, dtype=torch.bool), torch.tensor([2]))
    assert centre.tolist() == [[True, True, False, False, False, False]] and owner[0].tolist() == [0, 1, 0, 0, 0, 0]


def test_cluster_counts_are_the_published_ones():
    for p in (1, 33, 276, 510):
        assert (candidates(p), clusters(p)) == (int(0.3 * p) + 1, int((int(0.3 * p) + 1) / 10) + 1)


@pytest.mark.parametrize("name", ["drop-fastv", "drop-dart", "drop-uniform"])
def test_a_budget_per_image_is_split_evenly(name):
    """Two images in one sample, one in the other: 5 tokens are 3 and 2 of them; alone, an image gets all."""
    program = ran(f"{name}{{layer=1,keep=5,per_image=true}}, clean-up")
    verify(program)
    kept = program["prefill"].run(helpers.feeds([2, 1], [4, 3], seed=8))["kept.layer1"].tolist()
    assert [sum(r // 6 == i for r in kept[0]) for i in (0, 1)] == [3, 2] and len(set(kept[1])) == 5


def test_a_budget_per_image_equals_its_oracle_and_keeps_the_best_of_each():
    method, feed = make("drop-fastv", {"layer": 1, "keep": 4, "per_image": True}), helpers.feeds([2, 0], [4, 3], seed=9)
    program, masked = helpers.toy(), mask_only(helpers.toy(), [method])
    method.run(program)
    got = program["prefill"].run(feed)
    helpers.close(got["logits"], masked["prefill"].run(feed)["logits"], 3e-5)
    stage, ids = helpers.toy()["prefill"], feed["input_ids"][:1]
    visual, valid = ids[0] == helpers.IMAGE, feed["attention_mask"][0] != 0
    hidden = stage.module.lm.embed.weight[ids].clone()
    hidden[0, visual] = feed["image_features"][0]
    cos = torch.cos(feed["position_ids"][:1, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.03]))
    q, k, _ = (hidden @ stage.module.lm.layers.get_submodule("0").qkv.weight.T).chunk(3, -1)
    p = ((q * cos)[0, valid][-1] @ (k * cos)[0, valid].T * 0.5).softmax(-1)[visual[valid]]
    want = sorted([*p[:6].topk(2).indices.tolist(), *(6 + p[6:].topk(2).indices).tolist()])
    assert got["kept.layer1"][0].tolist() == want


def test_a_budget_per_image_needs_images_of_one_size():
    program = helpers.toy()
    program.facts = replace(program.facts, tokens_per_image=None, features_per_image=None)
    with pytest.raises(PassError, match="drop-fastv: needs to know which image a token is of, and images of toy bring no fixed number of tokens"):
        make("drop-fastv", {"layer": 1, "keep": 4, "per_image": True}).run(program)
