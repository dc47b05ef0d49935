"""The contract of the methods at the vision side, found by discovery; what a tower cannot give them they refuse by name."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import towers
from vision_cases import CASES, IN_TOWER, KEEP, METHODS, VARIANTS
from vision_inputs import signals

from foveate.graph.dump import dump
from foveate.graph.verify import verify
from foveate.passes.base import PASSES, PassError, make
from foveate.passes.vision_select import VisionMerge


@pytest.fixture(params=CASES, ids=lambda c: "-".join([c[0], *(f"{k}={v}" for k, v in c[1].items())]))
def method(request):
    name, more = request.param
    return make(name, {"keep": KEEP, **more})


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@functools.lru_cache
def reduced(method, **kind):
    """Traced once per setting; tests only run it."""
    program = towers.tower(**kind)
    assert method.run(program)
    verify(program)
    return program


def pixels(method, groups=1, seed=0, n=15):
    return torch.randn(groups * method.shared, n, 3, generator=torch.Generator().manual_seed(seed))


def test_variants_are_of_methods_that_exist():
    assert set(VARIANTS) <= set(METHODS)


def test_every_image_brings_keep_tokens_and_says_which(method):
    program = reduced(method)
    images = pixels(method, 2)
    out = towers.run(program, images)
    kept = out["kept.vision"]
    assert out["image_features"].shape == (len(images) * KEEP, towers.OUT) and out["image_features"].isfinite().all()
    assert program.facts.features_per_image == program.facts.visual_per_image == KEEP
    assert kept.shape[0] == len(images) and kept.dtype == torch.int64 and ((kept >= -1) & (kept < 15)).all()
    stay = [[i for i in row if i >= 0] for row in kept.tolist()]
    assert all(len(set(row)) == len(row) for row in stay)
    if getattr(method, "mode", "fixed") == "fixed" and not isinstance(method, VisionMerge):
        assert sum(map(len, stay)) == len(images) * KEEP
        assert all(row == sorted(row) for row in stay)


def test_kept_tokens_are_the_whole_tower_s_own(method):
    """What a selecting method returns are rows of the unreduced output, those that `kept.vision` names, in that order."""
    if isinstance(method, VisionMerge):
        pytest.skip("merging changes rows; see test_merged_rows_are_the_weighted_sums")
    images = pixels(method, 2, seed=3)
    whole = towers.tower()["vision"].run({"pixel_values": images})["image_features"].view(len(images), 15, -1)
    out = towers.run(reduced(method), images)
    rows = out["image_features"].view(-1, KEEP * method.shared, towers.OUT)
    for group, got in enumerate(rows):
        want = [whole[i, j] for i in range(group * method.shared, (group + 1) * method.shared) for j in out["kept.vision"][i].tolist() if j >= 0]
        if getattr(method, "mode", "fixed") == "fixed":
            torch.testing.assert_close(got, torch.stack(want), rtol=1e-5, atol=1e-5)  # the projector's matmul on fewer rows: another blocking
        else:  # the published orders differ, and rows that nothing fills are what the projector makes of zeros
            assert all((row - got).abs().amax(1).min() < 1e-4 for row in want)


def test_a_batch_of_images_equals_single_ones(method):
    program, images = reduced(method), pixels(method, 3, seed=5)
    if getattr(method, "mode", "fixed") == "parity" and method.name in ("merge-prumerge", "prune-cdpruner"):
        pytest.skip(f"{method.name}: the published code pools its statistics over the batch")
    together = towers.run(program, images)
    for g in range(3):
        own = slice(g * method.shared, (g + 1) * method.shared)
        alone = towers.run(program, images[own])
        rows = slice(g * method.shared * KEEP, (g + 1) * method.shared * KEEP)
        assert torch.equal(together["kept.vision"][own], alone["kept.vision"])
        torch.testing.assert_close(together["image_features"][rows], alone["image_features"], rtol=1e-5, atol=1e-5)  # matmul blocking, as above


@pytest.mark.parametrize("picture", ["constant", "duplicates", "one peak"])
def test_degenerate_pictures_keep_exactly_the_budget(method, picture):
    if getattr(method, "mode", "fixed") == "parity":
        pytest.skip("parity keeps what the published code does with them")
    images = torch.ones(method.shared, 15, 3)
    if picture == "duplicates":
        images[:, ::2] = -1.0
    if picture == "one peak":
        images[:, 7] = 50.0
    out = towers.run(reduced(method), images)
    assert out["image_features"].isfinite().all()
    stay = [i for row in out["kept.vision"].tolist() for i in row if i >= 0]
    assert len(stay) == KEEP * method.shared - isinstance(method, VisionMerge) * (out["kept.vision"] < 0).sum()


def test_merged_tokens_pool_their_patches_or_are_refused(name):
    """4 x 6 patches, 2 x 2 of them a token: 6 tokens of a 2 x 3 grid; after the projector, whatever the method reads is a mean over
    blocks."""
    method = make(name, {"keep": 3})
    program = towers.tower(grid=(4, 6), merge=2)
    assert method.run(program)
    verify(program)
    out = towers.run(program, pixels(method, 1, n=24))
    assert out["image_features"].shape == (3 * method.shared, towers.OUT) and program.facts.visual_per_image == 3
    assert out["kept.vision"].max() < 6


def test_pooling_is_the_mean_over_blocks():
    program = towers.tower(grid=(4, 6), merge=2)
    make("prune-vision-cls", {"keep": 2}).run(program)
    images = pixels(make("prune-vision-cls"), 1, n=24)
    got = towers.run(program, images)["kept.vision"][0].tolist()
    plain = towers.tower(grid=(4, 6))
    attention = [n for n in plain["vision"].graph.nodes if n.target is torch.ops.foveate.attention.default][-1]
    plain["vision"].add_output("q", attention.args[0])
    plain["vision"].add_output("k", attention.args[1])
    plain["vision"].module.recompile()
    with torch.no_grad():
        out = plain["vision"].run({"pixel_values": images})
    p = torch.stack([(out["q"][0, h, 0] @ out["k"][0, h].T * 0.5).softmax(-1) for h in range(towers.HEADS)]).mean(0)[1:]
    blocks = [sum(float(p[(2 * r + i) * 6 + 2 * c + j]) for i in (0, 1) for j in (0, 1)) for r in range(2) for c in range(3)]
    assert got == sorted(sorted(range(6), key=lambda t: -blocks[t])[:2])


WITHOUT_CLS = {"merge-visionzip", "prune-holov", "prune-divprune", "prune-cdpruner", "prune-evs", "prune-fopru", "prune-random", "prune-uniform"}


def test_a_tower_without_cls_works_or_is_refused_by_name(name):
    method, program = make(name, {"keep": KEEP}), towers.tower(cls=False)
    if name in WITHOUT_CLS:
        assert method.run(program)
        assert towers.run(program, pixels(method))["image_features"].shape == (KEEP * method.shared, towers.OUT)
    else:
        before = dump(program)
        with pytest.raises(PassError, match=f"{name}: needs a vision tower with a CLS token; that of tower has none"):
            method.run(program)
        assert dump(program) == before


def test_unknown_geometry_is_refused_by_name(name):
    program = towers.tower()
    program.facts = replace(program.facts, vision_grid=None, tokens_per_image=None)
    with pytest.raises(PassError, match=f"{name}: needs images of a fixed grid; tower was captured without one"):
        make(name, {"keep": KEEP}).run(program)


def test_positions_on_the_picture_refuse_rows_that_are_nowhere(name):
    program = towers.tower(positions="mrope")
    method = make(name, {"keep": KEEP})
    if isinstance(method, VisionMerge):
        with pytest.raises(PassError, match=f"{name}: makes tokens that stand for no single patch, and tower gives every token"):
            method.run(program)
    elif method.shared > 1:
        with pytest.raises(PassError, match=f"{name}: lets images share a budget, and the positions of tower are per image"):
            method.run(program)
    else:
        assert method.run(program)


def test_a_second_reduction_reads_what_the_first_left_or_is_refused():
    program = towers.tower()
    make("prune-vision-cls", {"keep": 8}).run(program)
    with pytest.raises(PassError, match="prune-fopru: reads the grid of patches, and an earlier pass left 8 of 15 tokens per image"):
        make("prune-fopru", {"keep": 4}).run(program)
    make("prune-divprune", {"keep": 4}).run(program)
    out = towers.run(program, pixels(make("prune-divprune"), 2))
    assert out["image_features"].shape == (8, towers.OUT) and out["kept.vision"].shape == (2, 8) and out["kept.vision.2"].shape == (2, 4)


def test_a_text_vector_is_an_input_by_name():
    program = reduced(make("prune-cdpruner", {"keep": KEEP, "relevance": "text"}))
    assert program["vision"].inputs == ["pixel_values", "text"] and program.facts.vision_extra == ("text",)
    assert program["vision"].run(program.example["vision"])["kept.vision"].shape == (5, KEEP)


def test_no_method_needs_a_layer_s_whole_attention(method):
    """Scores come from `attention_rows`, `attention_columns` or keys: no other softmax than PruMerge's one row or GlobalCom2's over
    crops."""
    program = reduced(method)
    for node in program["vision"].graph.nodes:
        if "softmax" in str(node.target):
            assert node.meta["val"].shape[-2] in (1,) or node.meta["val"].dim() == 2, node.format_node()


@pytest.mark.parametrize("case", [*CASES, *IN_TOWER], ids=lambda c: "-".join([c[0], *(f"{k}={v}" for k, v in c[1].items())]))
def test_no_value_of_the_transformed_graph_is_an_eager_attention(case):
    """Beside the layers' own fused nodes nothing has two token axes under several heads; nor is there one attention node more or less."""
    name, more = case
    if case in IN_TOWER:
        program = towers.tower(layers=4)
        assert make(name, more).run(program)
    else:
        program = reduced(make(name, {"keep": KEEP, **more}))
    nodes = list(program["vision"].graph.nodes)
    layers = 4 if case in IN_TOWER else 3
    assert sum(n.target is torch.ops.foveate.attention.default for n in nodes) == layers + (name == "prune-elip")  # its look-ahead runs one more
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim() == 4 and value.shape[1] == towers.HEADS:
            assert value.shape[2] != value.shape[3] or value.shape[3] < 5, node.format_node()


def test_names_and_papers(name):
    assert PASSES[name].paper.startswith("arXiv:") or name in ("prune-random", "prune-uniform"), "only controls have no paper"
    assert PASSES[name].__module__.rsplit(".", 1)[-1].replace("_", "-") == name


def test_merged_rows_are_the_weighted_sums():
    """PruMerge and VisionZip in numpy, by loops, from the signals; weights of the fixed VisionZip sum to one."""
    s = signals(3, images=1, grid=(5, 7))
    x, k = s.features[0].double().numpy(), s.layers[-1].k[0, :, 1:].double().numpy()
    unit = lambda z: z / np.linalg.norm(z, axis=-1, keepdims=True)  # noqa: E731

    plan = make("merge-prumerge", {"neighbours": 4}).plan(6, s)
    a, keys = s.cls_joint[0].double().numpy(), unit(k.transpose(1, 0, 2).reshape(35, -1))
    chosen = sorted(np.argsort(-a)[:5].tolist())
    want = []
    for i in chosen:
        like = keys[i] @ keys.T
        near = [j for j in np.argsort(-like) if j != i][:4]
        want.append(x[i] + sum(a[j] * x[j] for j in near))
    want.append(sum(a[j] * x[j] for j in range(35) if j not in chosen))
    assert plan.kept[0].tolist() == [*chosen, -1]
    np.testing.assert_allclose(plan.apply(s.features)[0].numpy(), np.stack(want), rtol=1e-4, atol=1e-5)

    plan = make("merge-visionzip", {"contextual": 0.4}).plan(5, s)
    heads = s.cls[0].double().numpy().sum(0)
    chosen = sorted(np.argsort(-heads)[:3].tolist())
    rest, keys = [j for j in range(35) if j not in chosen], unit(k.mean(0))
    targets = [rest[0], rest[16]]
    group = {t: [t] for t in targets}
    for j in rest:
        if j not in targets:
            group[max(targets, key=lambda t: keys[j] @ keys[t])].append(j)
    want = [x[i] for i in chosen] + [np.mean([x[j] for j in group[t]], 0) for t in targets]
    assert plan.kept[0].tolist() == chosen + targets
    np.testing.assert_allclose(plan.apply(s.features)[0].numpy(), np.stack(want), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plan.weight.sum(-1), torch.ones(1, 5))
