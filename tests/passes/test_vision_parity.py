"""Every method in parity with its published code: outputs of the official functions on 100 seeded inputs, replayed from
tests/golden/parity.

Each golden file names repository, commit and function. Inputs come from tests/vision_inputs.py; the foreign code is not part of this
project.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from vision_inputs import SEEDS, draw, onto, signals

from foveate.passes.base import make
from foveate.passes.methods.merge_tome import MergeToMe
from foveate.passes.methods.prune_elip import PruneElip

GOLDEN = Path(__file__).parent.parent / "golden" / "parity"


def golden(name):
    found = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    assert "github.com/" in str(found["source"]) and " @ " in str(found["source"])
    return found


def kept(method, count, s):
    return method.plan(count, s).kept.tolist()


def mask(indices, n):
    out = np.zeros(n, bool)
    out[[i for i in indices if i >= 0]] = True
    return out


@pytest.mark.parametrize(("name", "parameters", "key", "count", "given"), [
    ("prune-vision-cls", {}, "kept", 11, {"images": 2}),
    ("prune-vtc-cls", {"start": 1}, "kept", 11, {"layers": 4}),
    ("prune-vispruner", {"important": 0.5}, "kept_32_50", 32, {"images": 2, "grid": (12, 12)}),
    ("prune-vispruner", {"important": 0.75}, "kept_32_75", 32, {"images": 2, "grid": (12, 12)}),
    ("prune-divprune", {"mode": "parity"}, "kept", 12, {"heads": 4, "width": 8}),
    ("prune-divprune", {"mode": "fixed"}, "kept", 12, {"heads": 4, "width": 8}),
])
def test_selections_are_the_published_ones(name, parameters, key, count, given):
    want, method = golden(name)[key], make(name, parameters)
    for seed in SEEDS:
        assert kept(method, count, signals(seed, **given)) == want[seed].tolist(), seed


def test_divprune_repeats_duplicates_in_parity_and_never_in_fixed():
    """Four distinct tokens, twelve wanted: the published code returns as many distinct ones as the oracle counted."""
    want = golden("prune-divprune")["distinct"]
    for seed in SEEDS:
        s = signals(seed, heads=4, width=8)
        s = replace(s, features=torch.cat([s.features[:, :4]] * 12, 1))
        assert len(set(kept(make("prune-divprune", {"mode": "parity"}), 12, s)[0])) == want[seed] < 12
        assert len(set(kept(make("prune-divprune"), 12, s)[0])) == 12


def test_cdpruner():
    want, method = golden("prune-cdpruner")["kept"], make("prune-cdpruner", {"relevance": "text", "sign": -1, "mode": "parity"})
    for seed in SEEDS:
        s, text = signals(seed, images=2, heads=4, width=8), draw(1000 * seed + 7, 3, 32)
        vector = (text / text.norm(dim=-1, keepdim=True)).mean(0)[None].expand(2, -1)
        assert kept(method, 11, replace(s, extra={"text": vector})) == want[seed].tolist(), seed


def test_visionzip():
    want, method = golden("merge-visionzip"), make("merge-visionzip", {"mode": "parity", "contextual": 4 / 14})
    for seed in SEEDS:
        s = signals(seed, images=2)
        plan = method.plan(14, s)
        assert (plan.kept[:, 1:10] + 1).tolist() == want["dominant"][seed][:, 1:].tolist()
        torch.testing.assert_close(onto(plan.apply(torch.cat([s.cls_feature, s.features], 1))), torch.from_numpy(want["rows"][seed]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("uniform", [0.0, 0.75])
def test_prumerge(uniform):
    """Counts and merged rows; the golden rows of all seeds lie one behind the other."""
    want, method = golden("merge-prumerge-plus" if uniform else "merge-prumerge"), make("merge-prumerge", {"mode": "parity", "uniform": uniform})
    ends = np.cumsum(want["counts"])
    for seed in SEEDS:
        s, count = signals(seed, grid=(24, 24)), int(want["counts"][seed])
        rows = method.plan(int(want["counts"].max()), s).apply(s.features)
        expected = torch.from_numpy(want["rows"][ends[seed] - count : ends[seed]])
        torch.testing.assert_close(onto(rows[0, :count]), expected, rtol=1e-4, atol=1e-4)  # sums of up to 576 rows, in another order
        assert not rows[0, count:].any()


@pytest.mark.parametrize("gain", [1.0, 6.0])
def test_holov(gain):
    """Flat attention, and peaked attention, where the published code leaves rows empty."""
    want, method = golden("prune-holov")[f"kept_{int(gain)}"], make("prune-holov", {"stretches": 7, "mode": "parity"})
    assert gain == 1.0 or (want < 0).any()
    for seed in SEEDS:
        s = signals(seed, images=2)
        s = replace(s, layers=(replace(s.layers[-1], q=s.layers[-1].q * gain),))
        assert kept(method, 12, s) == want[seed].tolist(), seed


def test_hired():
    want, method = golden("prune-hired")["mask"], make("prune-hired", {"rows": 2, "columns": 2, "mode": "parity"})
    for seed in SEEDS:
        got = kept(method, int(5 * 48 * 0.2), signals(seed, images=5, layers=2))[0]
        assert np.array_equal(np.packbits(mask(got, 240)), want[seed]), seed


def test_globalcom2():
    want, method = golden("prune-globalcom2")["kept"], make("prune-globalcom2", {"mode": "parity"})
    for seed in SEEDS:
        assert kept(method, 80, signals(seed, images=5, grid=(8, 8)))[0] == want[seed].tolist(), seed


def test_evs():
    want, method = golden("prune-evs")["mask"], make("prune-evs", {"frames": 6})
    for seed in SEEDS:
        got = kept(method, 72, signals(seed, images=6))[0]
        assert np.array_equal(np.packbits(mask(got, 288)), want[seed]), seed


def test_tome():
    want = golden("merge-tome")
    for seed in SEEDS:
        s = signals(seed, images=2)
        x = torch.cat([s.cls_feature, s.features], 1)
        size, place = torch.ones_like(x[..., 0]), torch.arange(x.shape[1])[None].expand(2, -1) - 1
        for step in range(2):
            x, size, place = MergeToMe.merged(x, s.layers[-1].k.mean(1) if step == 0 else x[..., :5], size, place, 9, 1)
        assert size.tolist() == want["sizes"][seed].tolist() and (size.sum(1) == 49).all()
        torch.testing.assert_close(onto(x), torch.from_numpy(want["rows"][seed]), rtol=1e-4, atol=1e-4)


def test_must_drop():
    """The vision stage: means first, most alike first, then the other patches; rows of all seeds lie one behind the other."""
    want = golden("merge-must-drop")
    ends = np.cumsum(want["counts"])
    for seed in SEEDS:
        s, count = signals(seed, grid=(12, 12)), int(want["counts"][seed])
        x = torch.cat([s.cls_feature, s.features], 1)
        rows, place = make("merge-must-drop", {"mode": "parity"}).merged(x, 1, 12, 16, (145 - count) // 8)
        torch.testing.assert_close(onto(rows)[0], torch.from_numpy(want["rows"][ends[seed] - count : ends[seed]]), rtol=1e-4, atol=1e-4)
        assert sorted(set(place[0].tolist())) == sorted(place[0].tolist())


def test_elip():
    want = golden("prune-elip")["rows"]
    for seed in SEEDS:
        s = signals(seed, images=2)
        x = torch.cat([0 * s.cls_feature, s.features], 1)
        out, place = PruneElip.reduced(x, s.cls.mean(1), torch.arange(48)[None].expand(2, -1), 20)
        torch.testing.assert_close(onto(out), torch.from_numpy(want[seed]), rtol=1e-4, atol=1e-4)
        assert place.shape == (2, 21) and (place[:, -1] == -1).all()
