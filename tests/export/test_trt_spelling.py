"""Attention and cache as TensorRT gets them: the same numbers as the captured graphs, on eager and on ONNX Runtime, and kernels that
fuse."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers import IMAGE, toy

from foveate.export.backends import find
from foveate.export.backends._trt_options import TrtOptions
from foveate.export.backends._trt_spelling import ATTENTION, BODIES, is_padding, respell
from foveate.export.backends.trt import prepare
from foveate.export.errors import LowerError
from foveate.export.onnx_weights import WeightFile
from foveate.export.precision import to_precision
from foveate.export.to_onnx import to_onnx
from foveate.graph.capture import capture
from foveate.graph.families._tiny import build
from foveate.graph.families.base import REGISTRY
from foveate.passes.pipeline import run
from foveate.passes.recipe import load

IMAGE_TOKENS = 64
CLOSE = 1e-5  # float32: another order of the same sums
HALF = 2e-2  # float16 against float32 through three random layers of unit gain, relative to the largest value


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def llava():
    """A tiny llava of three layers: grouped queries, head width 16, 64 visual tokens."""
    torch.set_num_threads(1)
    return capture(build(REGISTRY["llava"], 3).model)


@pytest.fixture(scope="module")
def prompt(llava):
    """One sample with 64 visual and 6 text tokens, and its image features."""
    torch.manual_seed(1)
    ids = torch.tensor([[1, 20, *[llava.facts.image_token_id] * IMAGE_TOKENS, 30, 31, 32, 33]])
    pixels = torch.randn(1, 3, 32, 32)
    features = llava["vision"].run({"pixel_values": pixels})["image_features"].detach()
    return {
        "input_ids": ids,
        "image_features": features[None],
        "position_ids": torch.arange(ids.shape[1])[None],
        "attention_mask": torch.ones_like(ids),
    }


def narrowed(stage, feeds):
    types = {n.meta["name"]: n.meta["val"].dtype for n in stage.graph.nodes if n.op == "placeholder"}
    return {n: v.to(types[n]) for n, v in feeds.items()}


def agree(got, want, bound):
    for name, value in want.items():
        have = got[name].transpose(1, 2) if name.startswith(("k.", "v.")) else got[name]
        assert (have.float() - value).abs().max() <= bound * max(1.0, float(value.abs().max())), name


def step_after(prefill_out, length, ids):
    """Decode's inputs after a prefill, as captured: [B, G, P, D]."""
    layers = sum(n.startswith("k.") for n in prefill_out)
    past = {f"past_{w}.{i}": prefill_out[f"{w}.{i}"] for i in range(layers) for w in "kv"}
    return {"input_ids": torch.tensor([[40]]), "position_ids": torch.tensor([[ids]]), "lengths": torch.full((layers, 1), length)} | past


def token_major(feeds):
    return {n: v.transpose(1, 2).contiguous() if n.startswith("past_") else v for n, v in feeds.items()}


@pytest.mark.parametrize("precision, bound", [("float32", CLOSE), ("float16", HALF)])
def test_prefill_and_decode_say_the_same(llava, prompt, precision, bound):
    want = llava["prefill"].run(prompt)
    step = step_after(want, 70, 70)
    want_step = llava["decode"].run(step)
    program = to_precision(llava, precision)
    respell(program, batch_one=True)
    agree(program["prefill"].run(narrowed(program["prefill"], prompt)), want, bound)
    agree(program["decode"].run(narrowed(program["decode"], token_major(step))), want_step, bound)


def test_a_batch_keeps_its_length_mask(llava):
    torch.manual_seed(2)
    lengths = torch.tensor([[5, 9]] * 3)
    past = {f"past_{w}.{i}": torch.randn(2, 2, 9, 16) for i in range(3) for w in "kv"}
    step = {"input_ids": torch.tensor([[40], [41]]), "position_ids": torch.tensor([[5], [9]]), "lengths": lengths} | past
    want = llava["decode"].run(step)
    for name in past:
        step[name][0, :, 5:] = 1e3  # rows that no one may look at
    program = to_precision(llava, "float32")
    respell(program, batch_one=False)
    agree(program["decode"].run(token_major(step)), want, CLOSE)


def test_onnx_runtime_computes_what_tensorrt_parses(llava, prompt, tmp_path):
    """The very files: float16, attention fused or spelt out, narrowed weights in their own file."""
    program, remarks = prepare(llava, TrtOptions())
    assert remarks == []
    want = llava["prefill"].run(prompt)
    step = step_after(want, 70, 70)
    cases = {"prefill": (prompt, want), "decode": (token_major(step), llava["decode"].run(step))}
    for name, (feeds, expected) in cases.items():
        stage = program[name]
        with WeightFile(tmp_path / f"{name}.bin") as weights:
            onnx.save_model(to_onnx(stage, name, weights), str(tmp_path / f"{name}.onnx"))
        session = ort.InferenceSession(str(tmp_path / f"{name}.onnx"), providers=["CPUExecutionProvider"])
        used = {i.name for i in session.get_inputs()}
        values = session.run(stage.outputs, {n: v.numpy() for n, v in narrowed(stage, feeds).items() if n in used})
        agree({n: torch.from_numpy(np.asarray(v)) for n, v in zip(stage.outputs, values, strict=True)}, expected, HALF)
    parameters = sum(t.numel() for n, t in llava["prefill"].module.named_parameters() if "vision_tower" not in n and "projector" not in n)
    assert (tmp_path / "prefill.bin").stat().st_size <= 2.1 * parameters, "weights are narrowed while they are written"


def test_prefill_keeps_one_node_per_layer_and_decode_none(llava):
    program = to_precision(llava, "float16")
    respell(program, batch_one=True)
    count = {s: sum(n.target is ATTENTION for n in program[s].graph.nodes) for s in program.stages}
    assert count == {"vision": 2, "prefill": 3, "decode": 0}
    for node in program["prefill"].graph.nodes:
        if node.target is ATTENTION:
            assert node.args[3:6] == (None, None, None) and node.args[7] is True  # causal, and padding needs no mask


def test_only_the_prompts_padding_mask_may_be_dropped(llava):
    masks = [n.args[3] for n in llava["prefill"].graph.nodes if n.target is ATTENTION]
    assert masks and all(is_padding(m) for m in masks)
    program = llava.clone()
    stage = program["prefill"]
    node = next(n for n in stage.graph.nodes if n.target is ATTENTION)
    with stage.graph.inserting_before(node):
        other = stage.graph.call_function(torch.ops.aten.gt.Scalar, (stage.placeholder("input_ids"), 3))
        both = stage.graph.call_function(torch.ops.aten.logical_and.default, (node.args[3], other))
    assert not is_padding(both) and not is_padding(None)


@pytest.mark.parametrize("recipe", [[], [{"drop-uniform": {"layer": 1, "keep": 3}}]], ids=["whole", "reduced"])
def test_the_toy_agrees_in_float32_after_a_cut(recipe):
    program = toy(3)
    if recipe:
        run(program, load(recipe))
    ids = torch.tensor([[1, *[IMAGE] * 6, 2, 3, 4]])
    feeds = {
        "input_ids": ids,
        "image_features": torch.randn(1, 6, 4),
        "position_ids": torch.arange(10)[None],
        "attention_mask": torch.ones_like(ids),
    }
    want = program["prefill"].run(feeds)
    spelt = to_precision(program, "float32")
    respell(spelt, batch_one=True)
    agree(spelt["prefill"].run(feeds), want, CLOSE)


@pytest.mark.parametrize(
    "recipe", ["bypass-mod{layers=[1],keep=3}", "layer-expert{layers=[1],keep=3}", "exit-router{layers=[1],hidden=2,threshold=-5}"]
)
def test_where_tokens_leave_and_the_length_stays_the_last_row_is_two(recipe, tmp_path):
    """The file that TensorRT parses, on ONNX Runtime, against the graphs before they were respelt; a threshold of -5 lets everybody exit."""
    torch.manual_seed(3)
    program, ids = toy(3), torch.tensor([[1, *[IMAGE] * 6, 2, 3, 4]])
    feeds = {"input_ids": ids, "image_features": torch.randn(1, 6, 4), "position_ids": torch.arange(10)[None], "attention_mask": torch.ones_like(ids)}
    whole = program["prefill"].run(feeds)
    run(program, load(recipe))
    want = program["prefill"].run(feeds)
    assert (want["logits"] - whole["logits"]).abs().max() > 1e-3
    spelt = to_precision(program, "float32")
    respell(spelt, batch_one=True)
    stage = spelt["prefill"]
    assert sum(n.target is torch.ops.aten.cat.default and n.args[0][0] is n.args[0][-1] for n in stage.graph.nodes) == 1
    with WeightFile(tmp_path / "weights.bin") as weights:
        onnx.save_model(to_onnx(stage, "prefill", weights, emitters=BODIES), str(tmp_path / "prefill.onnx"))
    session = ort.InferenceSession(str(tmp_path / "prefill.onnx"), providers=["CPUExecutionProvider"])
    used = {i.name for i in session.get_inputs()}
    values = session.run(stage.outputs, {n: v.numpy() for n, v in feeds.items() if n in used})
    got = {n: torch.from_numpy(np.asarray(v)) for n, v in zip(stage.outputs, values, strict=True)}
    for layer, (rows,) in enumerate(want["kv_lengths"].tolist()):  # what lies behind the valid rows of a cache is anything
        for name in (f"k.{layer}", f"v.{layer}"):
            want[name], got[name] = want[name][:, :, :rows], got[name][:, :rows]
    agree(got, want, CLOSE)


# ** real engines, built without a GPU **


@pytest.mark.rtx
def test_engines_of_all_stages_and_what_they_contain(llava, tmp_path):
    components = find("tensorrt-rtx").lower(llava, tmp_path, {"compute_capability": "8.9"})
    assert sorted(components) == ["decode", "prefill", "vision"]
    for component in components.values():
        assert (tmp_path / component["file"]).stat().st_size > 100_000
        assert component["compute_capability"] == "8.9" and component["precision"] == "float16"
    assert not list(tmp_path.rglob("*.onnx")) and not list(tmp_path.rglob("*.bin")), "intermediate files are gone"
    report = json.loads((tmp_path / "reports/engines.json").read_text())
    engines = {e["stage"]: e for e in report["engines"]}
    assert engines["prefill"]["fused_attention"] == 3 and "gemm_mha" in engines["prefill"]["attention"]
    assert engines["decode"]["fused_attention"] == 3 and engines["decode"]["cache_copies"] == 0
    assert engines["decode"]["attention"] == "3 x gemv_mha_v1 (vec8)"
    assert all(e["seconds"] > 0 and e["peak_rss_bytes"] > 0 and e["kernel_count"] > 0 for e in engines.values())
    outputs = {o["name"]: (o["dtype"], o["shape"]) for o in components["decode"]["outputs"]}
    assert outputs["logits"][0] == "float" and outputs["k.0"] == ("half", [1, 1, 2, 16])
    inputs = {i["name"]: i["shape"] for i in components["decode"]["inputs"]}
    assert inputs["past_k.0"] == [1, -1, 2, 16], "token-major, one static sample"


@pytest.mark.rtx
@pytest.mark.parametrize(
    "recipe", [[{"drop-fastv": {"layer": 1, "keep": 16}}], [{"prune-vision-cls": {"keep": 16}}]], ids=["inside", "before"]
)
def test_reduced_programs_build(llava, recipe, tmp_path):
    """Index computation of a cut (top-k, running sum, scatter, gathers) and lengths that are differences (S - N + K)."""
    program = llava.clone()
    run(program, load(recipe))
    backend = find("tensorrt-rtx")
    assert backend.check(program, {}) == []
    backend.lower(program, tmp_path, {})
    engines = {e["stage"]: e for e in json.loads((tmp_path / "reports/engines.json").read_text())["engines"]}
    assert engines["prefill"]["fused_attention"] == 3, "attention behind a cut needs no mask either"
    assert engines["decode"]["fused_attention"] == 3 and engines["decode"]["cache_copies"] == 0


@pytest.mark.rtx
def test_the_parsers_refusal_names_node_and_reason(llava, tmp_path, monkeypatch):
    from foveate.export import to_onnx as module

    original = module.to_onnx

    def broken(stage, name, weights, **rest):
        model = original(stage, name, weights, **rest)
        model.graph.node[0].op_type = "NoSuchOperator"
        return model

    monkeypatch.setattr(module, "to_onnx", broken)
    with pytest.raises(LowerError, match=r"tensorrt-rtx: vision: the parser refuses NoSuchOperator at .*"):
        find("tensorrt-rtx").lower(llava, tmp_path, {})


@pytest.mark.gpu
def test_engines_generate_what_eager_does(llava, prompt, tmp_path):
    """Needs a GPU that TensorRT-RTX builds for: prefill and eight steps in place against the captured graphs."""
    from foveate.export.artifact import Artifact

    backend = find("tensorrt-rtx")
    major, minor = torch.cuda.get_device_capability()
    with Artifact.create(tmp_path / "engines") as draft:
        components = backend.lower(llava, draft.folder, {"compute_capability": f"{major}.{minor}"})
        draft.manifest |= {"target": backend.name, "facts": {}, "kv": [{"layer": k.layer} for k in llava.kv], "components": components}
    engine = backend.open(Artifact.load(tmp_path / "engines"))
    outputs, cache = engine.prefill({n: v.numpy() for n, v in prompt.items()}, capacity=78)
    want = llava["prefill"].run(prompt)
    assert np.abs(outputs["logits"] - want["logits"].numpy()).max() <= HALF * np.abs(want["logits"].numpy()).max()
    past = {n: v for n, v in want.items() if n.startswith(("k.", "v."))}
    for i in range(8):
        step = step_after(past, 70 + i, 70 + i)
        expected = llava["decode"].run(step)
        logits = engine.decode(cache, step["input_ids"].numpy(), step["position_ids"].numpy())
        assert np.abs(logits - expected["logits"].numpy()).max() <= 2 * HALF * np.abs(expected["logits"].numpy()).max()
        past = {n: torch.cat([past[n], expected[n]], 2) for n in past}
    engine.close()
