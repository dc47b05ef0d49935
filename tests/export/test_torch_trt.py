"""Torch-TensorRT: what can be said without CUDA: availability, the exported stages, the settings, what a missing GPU refuses."""

import sys

import pytest
import torch
from helpers import toy

from foveate.export.artifact import Artifact
from foveate.export.backends import find
from foveate.export.backends._trt_options import TrtOptions, axis_ranges
from foveate.export.backends.torch_trt import _example, compile_settings, export_stage
from foveate.export.backends.trt import prepare, profile_shapes
from foveate.export.errors import LowerError


@pytest.fixture(scope="module")
def prepared():
    program = toy(2)
    return prepare(program, TrtOptions())[0], axis_ranges(program, TrtOptions())


@pytest.mark.parametrize("stage", ["vision", "prefill", "decode"])
def test_exported_stages_know_aten_only_and_say_the_same(prepared, stage):
    """What Torch-TensorRT would be given. float16 sums in another order: a few roundoffs of values up to a hundred."""
    program, axes = prepared
    shapes = profile_shapes(program[stage], axes)
    exported = export_stage(program[stage], shapes)
    assert not [n for n in exported.graph.nodes if n.op == "call_function" and str(n.target).startswith("foveate")]
    torch.manual_seed(0)
    feeds = [_example(program[stage], n, shapes[n]) for n in program[stage].inputs]
    with torch.no_grad():
        want, got = program[stage].module(*feeds), exported.module()(*feeds)
    for a, b in zip(want, got, strict=True):
        assert (a.float() - b.float()).abs().max() <= 1e-2 * max(1.0, float(a.float().abs().max()))


def test_settings_follow_the_options():
    told = compile_settings(TrtOptions(workspace_mb=64, optimization_level=2), {"min_block_size": 7})
    assert (
        told["use_explicit_typing"]
        and told["min_block_size"] == 7
        and told["workspace_size"] == 64 << 20
        and told["optimization_level"] == 2
    )


def test_without_the_package_or_a_gpu_it_says_so(monkeypatch, tmp_path):
    backend = find("torch-tensorrt")
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)  # as if it were not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert "torch_tensorrt is not installed; pip install 'foveate[torch-tensorrt]'" in backend.available()
    assert any("not installed" in s for s in backend.check(toy(2), {}))
    with pytest.raises(LowerError, match=r"torch-tensorrt: this program cannot be lowered: .*not installed"):
        backend.lower(toy(2), tmp_path, {})
    with pytest.raises(LowerError, match=r"torch-tensorrt: the package torch_tensorrt is not installed"):
        backend.open(Artifact(tmp_path, {}))
    assert not list(tmp_path.iterdir())
