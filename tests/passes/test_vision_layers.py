"""Methods inside the vision tower: shapes, single against batch, numbers by another route, refusals."""

import functools

import numpy as np
import pytest
import torch
import towers
from vision_cases import IN_TOWER

from foveate.graph.verify import verify
from foveate.passes.base import PassError, make
from foveate.passes.methods.merge_tome import MergeToMe


@functools.lru_cache
def _reduced(number):
    name, parameters = IN_TOWER[number]
    program = towers.tower(layers=4)
    assert make(name, parameters).run(program)
    verify(program)
    return program


@pytest.fixture(params=range(len(IN_TOWER)), ids=lambda i: f"{IN_TOWER[i][0]}-{i}")
def reduced(request):
    return _reduced(request.param)


def pixels(images, seed=0):
    return torch.randn(images, 15, 3, generator=torch.Generator().manual_seed(seed))


def test_every_image_brings_what_the_facts_say(reduced):
    out = towers.run(reduced, pixels(3))
    assert out["image_features"].shape == (3 * reduced.facts.visual_per_image, towers.OUT) and out["image_features"].isfinite().all()
    for name, kept in out.items():
        if name.startswith("kept"):
            assert kept.shape[0] == 3 and all(len({i for i in row if i >= 0}) == sum(i >= 0 for i in row) for row in kept.tolist())


def test_a_batch_of_images_equals_single_ones(reduced):
    images, n = pixels(3, seed=4), reduced.facts.visual_per_image
    together = towers.run(reduced, images)
    for i in range(3):
        alone = towers.run(reduced, images[i : i + 1])
        torch.testing.assert_close(together["image_features"][i * n : (i + 1) * n], alone["image_features"], rtol=3e-5, atol=3e-5)  # matmul blocking, 4 layers


@pytest.mark.parametrize("images", [torch.ones(2, 15, 3), torch.tensor([1.0, -1.0]).repeat(8)[:15].view(1, 15, 1).expand(2, 15, 3).contiguous()])
def test_degenerate_pictures(reduced, images):
    out = towers.run(reduced, images)
    assert out["image_features"].shape[0] == 2 * reduced.facts.visual_per_image and out["image_features"].isfinite().all()


def numpy_tower(program, images, edit):
    """The tower in numpy, float64; edit(layer, where, x, keys, bias) -> (x, bias) before each layer and between attention and MLP."""
    p = {n: t.detach().double().numpy() for n, t in program["vision"].module.named_parameters()}
    norm = lambda x, n: (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p[f"{n}.weight"] + p[f"{n}.bias"]  # noqa: E731
    linear = lambda x, n: x @ p[f"{n}.weight"].T + p[f"{n}.bias"]  # noqa: E731
    x = linear(images.double().numpy(), "patch")
    x = np.concatenate([p["cls"].repeat(len(x), 0), x], 1) + p["place"]
    bias = np.zeros(x.shape[:2])
    for layer in range(4):
        h = norm(x, f"layers.{layer}.norm")
        q, k, v = (linear(h, f"layers.{layer}.{n}").reshape(*h.shape[:2], towers.HEADS, -1).transpose(0, 2, 1, 3) for n in "qkv")
        logits = q @ k.transpose(0, 1, 3, 2) / 2.0 + bias[:, None, None]
        e = np.exp(logits - logits.max(-1, keepdims=True))
        y = (e / e.sum(-1, keepdims=True)) @ v
        x = x + linear(y.transpose(0, 2, 1, 3).reshape(*h.shape), f"layers.{layer}.out")
        x, bias = edit(layer, x, k, bias)
        x = x + np.maximum(linear(norm(x, f"layers.{layer}.norm2"), f"layers.{layer}.mlp"), 0)
    return linear(x[:, 1:], "projector")


def test_numpy_tower_is_the_tower():
    images = pixels(2)
    want = numpy_tower(towers.tower(layers=4), images, lambda _, x, k, bias: (x, bias))
    got = towers.tower(layers=4)["vision"].run({"pixel_values": images})["image_features"].view(2, 15, -1)
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-3, atol=1e-3)  # float32 against float64 through four layers of unit-variance weights


def test_tome_by_pairs_of_python_loops():
    """Token by token: who merges with whom, sizes, log-size bias, order of the patches they stand for."""
    r, groups = 3, None

    def merge(layer, x, k, bias):
        nonlocal groups
        groups = groups or [[[i] for i in range(x.shape[1])] for _ in x]
        out = []
        for b, tokens in enumerate(x):
            metric = k[b].mean(0)
            metric = metric / np.linalg.norm(metric, axis=-1, keepdims=True)
            evens, odds = range(0, len(tokens), 2), list(range(1, len(tokens), 2))
            nearest = {i: max(odds, key=lambda j: metric[i] @ metric[j]) for i in evens if i}
            go = sorted(nearest, key=lambda i: -(metric[i] @ metric[nearest[i]]))[:r]
            size = [len(g) for g in groups[b]]
            value, members = {j: tokens[j] * size[j] for j in odds}, {j: list(groups[b][j]) for j in odds}
            for i in go:
                value[nearest[i]] = value[nearest[i]] + tokens[i] * size[i]
                members[nearest[i]] += groups[b][i]
            stay = [i for i in evens if i not in go]
            out.append(np.stack([tokens[i] for i in stay] + [value[j] / len(members[j]) for j in odds]))
            groups[b] = [groups[b][i] for i in stay] + [members[j] for j in odds]
        return np.stack(out), np.log([[len(g) for g in gs] for gs in groups])

    images, program = pixels(2, seed=1), _reduced(0)
    want = numpy_tower(towers.tower(layers=4), images, merge)
    got = towers.run(program, images)
    assert all(sum(map(len, g)) == 16 for g in groups)
    for b in range(2):
        first = [g[0] - 1 for g in groups[b]][1:]
        order = np.argsort(first)
        assert got["kept.vision"][b].tolist() == sorted(first)
        np.testing.assert_allclose(got["image_features"].view(2, -1, towers.OUT)[b].detach().numpy(), want[b][order], rtol=2e-3, atol=2e-3)


def test_objects_enter_the_tower_alone():
    saliency = torch.randn(2, 15, generator=torch.Generator().manual_seed(2))
    program, images = _reduced(6), pixels(2, seed=2)

    def drop(layer, x, k, bias):
        if layer != 1:
            return x, bias
        rows = [[0, *sorted(1 + np.argsort(-saliency[b].numpy())[:4])] for b in range(2)]
        return np.stack([x[b][rows[b]] for b in range(2)]), bias[:, :5]

    # dropping before layer 2 commutes with layer 1's MLP, which is per token
    want = numpy_tower(towers.tower(layers=4), images, drop)
    got = program["vision"].run({"pixel_values": images, "saliency": saliency})["image_features"].view(2, 4, -1)
    np.testing.assert_allclose(got.detach().numpy(), want, rtol=1e-3, atol=1e-3)


def test_layers_bypassed_in_a_row_choose_by_the_last_whole_attention():
    """The second takes the best of the first, since both read the same scores; alone it would read other ones."""
    program, images = towers.tower(layers=4), pixels(2)
    assert make("bypass-vision", {"layers": (1, 2), "keep": (0.7, 0.4)}).run(program)
    verify(program)
    got = towers.run(program, images)
    first, second = (got[f"kept.vision_layer{i}"] for i in (1, 2))
    assert first.shape == (2, 10) and second.shape == (2, 6)
    assert all(set(b.tolist()) < set(a.tolist()) for a, b in zip(first, second, strict=True))
    alone = towers.tower(layers=4)
    make("bypass-vision", {"layers": (1,), "keep": (0.4,)}).run(alone)
    assert torch.equal(towers.run(alone, images)["kept.vision_layer1"], second)


def test_schedules_of_tome():
    assert MergeToMe(r=4).schedule(3) == [4, 4, 4]
    assert MergeToMe(r=4, inflect=-1.0).schedule(5) == [8, 6, 4, 2, 0]
    assert MergeToMe(r=4, inflect=1.0).schedule(5) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize(("name", "parameters", "kind", "message"), [
    ("merge-tome", {}, {"grid": (4, 6), "merge": 2}, "merge-tome: works inside the tower, and tower merges patches behind it"),
    ("prune-objects", {"layer": 9}, {}, r"prune-objects: no layer 9 in vision; this program has 0\.\.2"),
    ("prune-elip", {"layers": (1,), "ahead": (5,), "keep": (0.5,)}, {}, r"prune-elip: looks ahead to vision layer 5; the features come from layers 0\.\.2"),
    ("prune-elip", {"layers": (1,)}, {}, "prune-elip: layers, ahead and keep belong together, and they are 1, 3 and 3 long"),
    ("prune-elip", {}, {"cls": False}, "prune-elip: needs a vision tower with a CLS token"),
    ("bypass-vision", {"layers": (0,), "keep": (0.5,)}, {}, "bypass-vision: reads the attention before the layer, and there is none before vision layer 0"),
])
def test_refuses_by_name(name, parameters, kind, message):
    with pytest.raises(PassError, match=message):
        make(name, parameters).run(towers.tower(**kind))


@pytest.mark.parametrize(("name", "parameters"), [c for c in IN_TOWER if c[0] != "prune-elip"])
def test_towers_without_cls_work(name, parameters):
    program = towers.tower(cls=False, layers=4)
    assert make(name, parameters).run(program)
    verify(program)
    assert towers.run(program, pixels(2))["image_features"].shape == (2 * program.facts.visual_per_image, towers.OUT)
