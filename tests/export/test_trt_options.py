"""What a TensorRT build can be told, what it refuses before building, and what the engines refuse when they are opened or fed."""

from dataclasses import fields, replace

import pytest
import torch
from helpers import toy
from torch import nn

from foveate.export.artifact import Artifact
from foveate.export.backends import find
from foveate.export.backends import trt as trt_backend
from foveate.export.backends._trt_build import canonical
from foveate.export.backends._trt_engine import outside, refuse
from foveate.export.backends._trt_limits import limits
from foveate.export.backends._trt_options import TrtOptions, as_range, axis_ranges, shape_range, symbol_ranges
from foveate.export.errors import LowerError
from foveate.graph.program import Program
from foveate.graph.stage import from_exported


def test_the_listed_defaults_are_those_of_the_options():
    assert trt_backend.DEFAULTS == {f.name: f.default for f in fields(TrtOptions)}


@pytest.mark.parametrize(
    "given, want", [(4, (4, 4, 4)), ("1:64:512", (1, 64, 512)), ([2, 3, 3], (2, 3, 3)), (None, None), ("7", (7, 7, 7))]
)
def test_ranges(given, want):
    assert as_range("text", given) == want


@pytest.mark.parametrize("given", ["a:b:c", "1:2", "0:1:2", "5:4:6", [1, 2], 0])
def test_bad_ranges_are_refused(given):
    with pytest.raises(LowerError, match=r"trt: text=.* is no range; write one number, or min:opt:max"):
        TrtOptions(text=given)


def test_an_unknown_option_names_its_neighbour():
    with pytest.raises(LowerError, match=r"no option 'precison'; did you mean 'precision'\?"):
        find("tensorrt-rtx").settings({"precison": "float16"})


@pytest.mark.parametrize("spelling", ["SM89", "sm_89", "89", 8.9, "8.9"])
def test_spellings_of_a_compute_capability(spelling):
    assert canonical(spelling) == "8.9"


def test_ranges_follow_from_the_facts():
    axes = axis_ranges(toy(2), TrtOptions(images="1:1:3", text="1:20:100", new_tokens=50))
    assert axes["N"] == (6, 6, 18) and axes["S"] == (7, 26, 118) and axes["P"] == (1, 26, 168) and axes["I"] == (1, 1, 3)


def test_a_reduced_program_keeps_its_least_number_of_visual_rows():
    program = toy(2)
    program.facts = replace(program.facts, min_visual=9)
    assert axis_ranges(program, TrtOptions())["N"][0] == 9


def test_every_input_of_every_stage_has_a_range():
    program = toy(2)
    axes = axis_ranges(program, TrtOptions(batch="1:2:4"))
    shapes = {}
    for name, stage in program.stages.items():
        ranges = symbol_ranges(stage, axes)
        for node in stage.graph.nodes:
            if node.op == "placeholder":
                shapes[f"{name}.{node.meta['name']}"] = shape_range(node, ranges)
    assert shapes["prefill.input_ids"] == [(1, 7), (2, 70), (4, 1048)]
    assert shapes["prefill.image_features"] == [(1, 6, 4), (2, 6, 4), (4, 24, 4)]
    assert shapes["decode.past_k.1"] == [(1, 1, 1, 4), (2, 1, 70, 4), (4, 1, 1560, 4)]
    assert shapes["decode.lengths"] == [(2, 1), (2, 2), (2, 4)]
    assert shapes["vision.pixel_values"] == [(1, 6, 3), (2, 6, 3), (16, 6, 3)]


# ** limits known before building **


class Selecting(nn.Module):
    def __init__(self, k):
        super().__init__()
        self.k = k

    def forward(self, input_ids):
        return (input_ids.float().topk(self.k, 1).values,)


def program_of(module, *inputs, names=("input_ids",)):
    exported = torch.export.export(module, inputs)
    return Program({"prefill": from_exported(exported, list(names), ["logits"])}, toy(2).facts, [])


@pytest.mark.parametrize(
    "k, said", [(3840, []), (3841, ["prefill: topk: top-k of 3841; TensorRT's limit is 3840: keep fewer tokens here"])]
)
def test_the_limit_of_topk(k, said):
    assert limits(program_of(Selecting(k), torch.zeros(1, 4000, dtype=torch.int64)), TrtOptions()) == said


def test_bytes_and_data_dependent_sizes_are_named():
    class Odd(nn.Module):
        def forward(self, x):
            return (torch.zeros(9).index_add(0, torch.nonzero(x > 3)[:, 0], torch.ones(1).expand(torch.nonzero(x > 3).shape[0])),)

    said = limits(program_of(Odd(), torch.arange(6, dtype=torch.uint8)), TrtOptions())
    assert any("input input_ids is uint8" in s for s in said)
    assert any("nonzero has a result whose size depends on data" in s for s in said)
    assert any("index_add: adding scatters have no TensorRT layer" in s for s in said)


def test_bfloat16_on_turing_is_named():
    assert limits(toy(2), TrtOptions(precision="bfloat16", compute_capability="7.5")) == [
        "bfloat16 needs compute capability 8.0; 7.5 has none, use precision=float16"
    ]


@pytest.mark.rtx
def test_an_unknown_compute_capability_lists_the_known():
    backend = find("tensorrt-rtx")
    assert backend.check(toy(2), {}) == []
    said = backend.check(toy(2), {"compute_capability": "9.0"})
    assert len(said) == 1 and "no compute capability 9.0" in said[0] and "8.9" in said[0]
    with pytest.raises(LowerError, match=r"tensorrt-rtx: this program cannot be lowered: no compute capability 9\.0"):
        backend.lower(toy(2), None, {"compute_capability": "9.0"})


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    backend = find("tensorrt-rtx")
    monkeypatch.setattr(type(backend), "module", "tensorrt_of_another_world")
    assert backend.available() == "the package tensorrt_of_another_world is not installed; pip install 'foveate[rtx]'"
    with pytest.raises(LowerError, match=r"tensorrt-rtx: the package tensorrt_of_another_world is not installed; pip install"):
        backend.check(toy(2), {})


def test_classic_tensorrt_wants_the_gpu_that_runs_the_engine(monkeypatch):
    backend = find("tensorrt")
    monkeypatch.setattr(trt_backend, "_gpu", lambda: None)
    assert "this machine has none" in backend.check(toy(2), {})[0]
    monkeypatch.setattr(trt_backend, "_gpu", lambda: "9.0")
    assert backend.check(toy(2), {}) == []
    assert backend.check(toy(2), {"compute_capability": "8.6"}) == ["classic TensorRT builds for the GPU at hand (9.0), not for 8.6"]


# ** refusals at run time: no GPU needed to refuse **


@pytest.fixture
def artifact(tmp_path):
    profile = {
        "input_ids": [[1, 7], [1, 70], [1, 1048]],
        "image_features": [[1, 6, 4], [1, 6, 4], [1, 24, 4]],
        "position_ids": [[3, 1, 7], [3, 1, 70], [3, 1, 1048]],
    }
    component = {"file": "components/prefill.engine", "compute_capability": "8.9", "version": "1.7.1", "profile": profile}
    return Artifact(tmp_path, {"model": "my/model", "components": {"prefill": component}})


def test_a_matching_machine_is_not_refused(artifact):
    refuse(artifact, "tensorrt-rtx", "1.7.1", "8.9")


@pytest.mark.parametrize(
    "version, gpu, message",
    [
        ("1.7.1", None, r"prefill\.engine needs an NVIDIA GPU of compute capability 8\.9, and torch sees none here .*--target ort"),
        (
            "1.7.1",
            "8.6",
            r"built for compute capability 8\.9, this GPU has 8\.6; rebuild: foveate optimize my/model --recipe .* --target "
            r"tensorrt-rtx --option compute_capability=8\.6",
        ),
        ("1.8.0", "8.9", r"built by version 1\.7\.1, installed is 1\.8\.0; install that one, or rebuild: foveate optimize my/model"),
    ],
)
def test_another_machine_is_refused_with_the_way_out(artifact, version, gpu, message):
    with pytest.raises(LowerError, match=message):
        refuse(artifact, "tensorrt-rtx", version, gpu)


@pytest.mark.parametrize(
    "shapes, message",
    [
        (
            {"input_ids": (1, 2000)},
            r"input_ids has size 2000 in dimension 1, this engine takes 7 to 1048; rebuild: .*--option sequence=7:70:2000",
        ),
        ({"input_ids": (3, 70)}, r"input_ids has size 3 in dimension 0, this engine takes 1 to 1; rebuild: .*--option batch=1:1:3"),
        ({"position_ids": (3, 1, 5)}, r"position_ids has size 5 in dimension 2, .*--option sequence=5:70:1048"),
        ({"image_features": (1, 30, 4)}, r"image_features has size 30 .*--option visual=6:6:30"),
        ({"image_features": (1, 6, 5)}, r"image_features has size 5 in dimension 2, this engine takes 4 to 4$"),
        ({"input_ids": (70,)}, r"input_ids has shape \[70\], expected 2 dimensions"),
    ],
)
def test_inputs_outside_the_profile_are_refused_with_the_way_out(artifact, shapes, message):
    with pytest.raises(LowerError, match=message):
        outside(artifact, "tensorrt-rtx", "prefill", shapes)


def test_inputs_inside_the_profile_pass(artifact):
    outside(artifact, "tensorrt-rtx", "prefill", {"input_ids": (1, 70), "image_features": (1, 24, 4), "position_ids": (3, 1, 1048)})
