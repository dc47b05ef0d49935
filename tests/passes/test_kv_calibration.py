"""Scales from data: they equal the ranges of the data, do not move with the prompt, and what does not fit is refused by message."""

from __future__ import annotations

import pytest
import torch
from helpers import feeds, toy
from safetensors.torch import save_file

from foveate.passes.base import PassError, make
from foveate.passes.kv_calibrate import calibrate, save
from foveate.passes.pipeline import run
from foveate.passes.recipe import load

DATA = [feeds([1, 2], [5, 4], seed=1), feeds([1, 0], [3, 6], seed=2, left=True)]


@pytest.fixture(scope="module")
def ranges():
    return calibrate(toy(2), DATA)


def test_ranges_are_those_of_the_valid_rows(ranges):
    found = []
    for feed in DATA:
        out = toy(2)["prefill"].run(feed)
        found += [out["k.1"][b][:, feed["attention_mask"][b].bool()] for b in range(2)]
    rows = torch.cat(found, 1)
    torch.testing.assert_close(ranges["k.1.min"], rows.amin(1))
    torch.testing.assert_close(ranges["k.1.max"], rows.amax(1))


def test_scales_stay_when_the_prompt_changes(ranges, tmp_path):
    save(ranges, tmp_path / "r.safetensors")
    program = run(toy(2), load(f"kv-int4{{margin=1,scales={tmp_path / 'r.safetensors'}}}"))
    one, two = (program["prefill"].run(feeds([1], [4], seed=s)) for s in (3, 4))
    for name in ("k.0.lo.scale", "k.0.scale"):
        torch.testing.assert_close(one[name], two[name])
    torch.testing.assert_close(one["k.0.lo.scale"][0, :, 0], (ranges["k.0.max"] - ranges["k.0.min"]) / 15)
    torch.testing.assert_close(one["k.0.scale"][0, :, 0], torch.maximum(ranges["k.0.max"], -ranges["k.0.min"]) / 127)  # what is appended
    plain = run(toy(2), load("kv-int4{margin=1}"))
    assert not torch.equal(plain["prefill"].run(feeds([1], [4], seed=3))["k.0.lo.scale"], one["k.0.lo.scale"])


def test_an_empty_set_is_refused():
    with pytest.raises(PassError, match="calibrate: the calibration set is empty; give at least one batch"):
        calibrate(toy(2), [])


def test_data_that_lack_an_input_are_refused():
    with pytest.raises(PassError, match=r"calibrate: batch 1 lacks \['image_features'\]"):
        calibrate(toy(2), [{n: t for n, t in DATA[0].items() if n != "image_features"}])


def test_nan_in_keys_is_refused():
    broken = {**DATA[0], "image_features": DATA[0]["image_features"] * float("nan")}
    with pytest.raises(PassError, match="calibrate: the keys of layer 0 hold NaN or infinity"):
        calibrate(toy(2), [broken])


def test_a_stored_program_is_refused():
    with pytest.raises(PassError, match=r"calibrate: layers \[0, 1\] are stored in a format already"):
        calibrate(run(toy(2), load("kv-int8")), DATA)


@pytest.mark.parametrize(("change", "message"), [
    (lambda r: {n: t for n, t in r.items() if ".1." not in n}, r"lacks \['k.1.min', 'k.1.max'\] of layer 1; it has layers \[0\]"),
    (lambda r: r | {"k.0.min": torch.zeros(3, 4)}, r"has k.0.min of \(heads, channels\) \(3, 4\), this model caches \(1, 4\) in layer 0"),
    (lambda r: r | {"v.0.max": torch.full((1, 4), float("nan"))}, r"has no ordered finite ranges for v.0")])
def test_a_file_that_does_not_fit_the_model_is_refused(ranges, tmp_path, change, message):
    save_file(change(dict(ranges)), tmp_path / "r.safetensors")
    with pytest.raises(PassError, match=message):
        make("kv-int8", {"scales": str(tmp_path / "r.safetensors")}).run(toy(2))


def test_a_missing_or_broken_file_is_refused(tmp_path):
    with pytest.raises(PassError, match=r"scales: no file .*gone; make it with passes/kv_calibrate.py, or say scales=prompt"):
        make("kv-int8", {"scales": str(tmp_path / "gone")}).run(toy(2))
    (tmp_path / "bad").write_bytes(b"no")
    with pytest.raises(PassError, match=r"scales: .*bad is not a safetensors file"):
        make("kv-int8", {"scales": str(tmp_path / "bad")}).run(toy(2))


def test_scales_of_data_are_per_channel():
    with pytest.raises(PassError, match=r"kv-int8: scales='x' are per channel, k_per=token and v_per=channel are not both"):
        make("kv-int8", {"scales": "x", "k_per": "token"}).run(toy(2))
