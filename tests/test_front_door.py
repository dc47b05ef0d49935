"""Recipes that change caches or insert tensors, through `optimize_model` itself: what a dry run without weights says is what is built, and it answers."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import tiny_llava
from PIL import Image

import foveate

BUILT = [  # appended, read and float partitions, a cut, a stage of its own
    "drop-fastv{layer=1,keep=8}, kv-keep-dropped{lo=int2}, evict-dropped{optional=true}",
    "kv-kivi{group=2,residual=4,layers=[0]}, evict-snapkv{window=2,sinks=1,recent=2,layers=[1]}, kv-zipcache{sinks=1,recent=2,layers=[2]}",
]
FORECAST = [
    "context-registers{depth=1}",
    "prefusion{registers=4,layer=1,content=visual}, lora{rank=2}, kv-fp8",
    "prune-elip{layers=[0],ahead=[1],keep=[0.5]}, victor{registers=4,layer=1}, kv-int4",
]


@pytest.fixture(scope="module")
def folder():
    return str(tiny_llava())


@pytest.mark.parametrize("recipe", BUILT)
def test_what_a_dry_run_says_is_what_is_built(folder, tmp_path, recipe):
    said = foveate.forecast(folder, recipe, target="ort")
    made = foveate.optimize_model(folder, recipe, target="ort", output=tmp_path / "artifact")
    assert said.limits == [] and said.report.as_dict() == made.report.as_dict()
    before, after = said.report.before, said.report.after
    assert after.kv_bytes < before.kv_bytes and after.decode_bytes < before.decode_bytes
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    with foveate.load(tmp_path / "artifact") as session:
        assert session.generate([picture], "<image> what is this ?", max_new_tokens=6).tokens[0].size


@pytest.mark.parametrize("recipe", FORECAST)
def test_a_dry_run_reads_no_weights(folder, recipe):
    plan = foveate.forecast(folder, recipe, target="ort")
    assert {t.device.type for _, t in plan.program.parameters()} == {"meta"}
    assert plan.report.as_dict()["after"] != plan.report.as_dict()["before"]
