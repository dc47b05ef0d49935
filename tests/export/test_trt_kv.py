"""Quantized caches on TensorRT: spelt so that attention reads codes as they lie, kept by an engine whose stages are played by torch here, and
proven fused in engines that are built without a GPU."""

import dataclasses
import json
import warnings

import numpy as np
import onnx
import pytest
import torch
from helpers import toy
from lowering import distance, engine, prompt, rollout
from onnx import TensorProto, helper

from foveate.export.artifact import Artifact
from foveate.export.backends import find
from foveate.export.backends._trt_build import Request
from foveate.export.backends._trt_build import build as build_engine
from foveate.export.backends._trt_cache import is_codes, pack, packed_bits, unpack
from foveate.export.backends._trt_engine import TrtEngine
from foveate.export.backends._trt_options import TrtOptions, axis_ranges
from foveate.export.backends.trt import prepare, profile_shapes
from foveate.export.engine_report import EngineReport, Kernel
from foveate.export.errors import CacheFullError, LowerError
from foveate.graph.capture import capture
from foveate.graph.families._tiny import build
from foveate.graph.families.base import REGISTRY
from foveate.passes.pipeline import run
from foveate.passes.recipe import load

CLOSE = 1e-4  # float32, of the logits' spread: another order of the same sums, and now and then a code on the edge between two
RECIPES = {
    "int8": "kv-int8",
    "int4": "kv-int4",
    "int2": "kv-int2{v_per=group:4}",
    "zipcache": "kv-zipcache{recent=2,probes=2}",
    "mikv": "kv-mikv{recent=2}",
    "kivi": "kv-kivi{group=4,residual=8}",
    "fp8": "kv-fp8",
}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def programs():
    return {name: run(toy(2), load(recipe)) for name, recipe in RECIPES.items()}


class Played:
    """A stage of TensorRT, played by the respelt graph itself."""

    def __init__(self, stage):
        self.stage, self.inputs, self.outputs = stage, stage.inputs, stage.outputs
        self.types = {n.meta["name"]: n.meta["val"].dtype for n in stage.graph.nodes if n.op == "placeholder"}
        self.types |= {name: node.meta["val"].dtype for name, node in stage.output_nodes.items()}
        self.placed = 0

    def __call__(self, feeds, place):
        results = {}
        for name, value in self.stage.run({n: feeds[n].to(self.types[n]).contiguous() for n in self.inputs}).items():
            spot = place(name, tuple(value.shape))
            if spot is not None:  # rows of one sample: the engine would have written them here
                assert spot.shape[0] == 1
                spot[:, : value.shape[1]] = value
                self.placed += 1
            results[name] = value if spot is None else spot
        return results


def played(program, folder, batch=1, past=200):
    """The program as a TensorRT artifact whose stages torch plays, in float32."""
    options = TrtOptions(precision="float32", batch=batch, past=f"1:16:{past}")
    spelt, _ = prepare(program, options)
    axes = axis_ranges(program, options)
    components = {n: {"profile": {k: [list(s) for s in v] for k, v in profile_shapes(s, axes).items()}} for n, s in spelt.stages.items()}
    manifest = {"model": "toy", "components": components, "kv": [dataclasses.asdict(e) for e in program.kv]}
    return TrtEngine("tensorrt-rtx", Artifact(folder, manifest), {n: Played(s) for n, s in spelt.stages.items()}, device="cpu")


# ** the layout **


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bytes_hold_what_was_put_into_them(bits, dtype):
    low, high = (-1, 2) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    codes = torch.randint(low, high, (2, 5, 3, 32)).to(torch.int8)
    codes = torch.where(codes == 0, 1, codes) if bits == 1 else codes
    packed = pack(codes, bits, dtype)
    assert packed.dtype == torch.int8 and packed.shape == (2, 5, 3, 32 * bits // 8)
    assert (unpack(packed, bits, dtype) == codes).all()


def test_names_of_codes():
    assert [n for n in ("past_k.0", "v.12", "k.3.lo", "past_v.1.lo.scale", "k.0.scale", "k.0.center", "lengths.lo", "kv_pos.1") if is_codes(n)] == [
        "past_k.0", "v.12", "k.3.lo"
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["int8", "zipcache", "kivi"])
def test_decode_reads_token_major_codes_and_returns_one_row(programs, name):
    spelt, _ = prepare(programs[name], TrtOptions())
    decode, bits = spelt["decode"], packed_bits(programs[name].kv)
    for node in decode.graph.nodes:
        label = node.meta.get("name", "")
        if node.op == "placeholder" and is_codes(label):
            width = 4 * bits.get(label.removeprefix("past_"), 8) // 8
            assert str(tuple(node.meta["val"].shape)[2:]) == str((1, width)), label
    assert all(tuple(n.meta["val"].shape[1:3]) == (1, 1) for o, n in decode.output_nodes.items() if o.startswith(("k.", "v.")))
    assert not [n for n in decode.graph.nodes if n.op == "call_function" and "kv_append" in str(n.target)]


def test_widths_that_do_not_fill_bytes_are_refused(programs):
    odd = [dataclasses.replace(e, head_dim=3) for e in programs["int4"].kv]
    with pytest.raises(LowerError, match=r"layer 0: 3 channels of 4 bits do not fill whole bytes"):
        packed_bits(odd)


# ** the engine, its stages played by torch **


@pytest.mark.parametrize(("name", "batch"), [*((name, 1) for name in RECIPES), ("int4", 2), ("zipcache", 2), ("kivi", 2)])
def test_generation_is_that_of_the_eager_target(programs, name, batch, tmp_path):
    program = programs[name]
    feeds = prompt(program, batch, 6, 9, padding=3 if batch > 1 else 0)
    oracle = engine(program, tmp_path, "eager")
    steps = 24 if name == "kivi" else 8
    want, _ = rollout(program, oracle, feeds, steps)
    run_ = played(program, tmp_path, batch)
    have, cache = rollout(program, run_, feeds, steps)
    assert distance(have, want) <= CLOSE
    if batch == 1:
        assert run_.stages["decode"].placed >= steps * 4, "rows were written where they belong, not copied there"
    assert cache.held <= 15 + steps and cache.nbytes > 0


def test_a_sample_may_be_continued_twice(programs, tmp_path):
    """Parallel answers to one prompt: a copy of a cache goes its own way."""
    program = programs["int4"]
    run_ = played(program, tmp_path, batch=2)
    feeds = prompt(program, 2, 6, 4)
    _, cache = run_.prefill(feeds, 14)
    twin = cache.take(np.array([1, 1]))
    step = np.full((2, 1), 10)
    first = run_.decode(twin, np.array([[1], [2]]), step)
    assert np.abs(first[0] - first[1]).max() > 1e-3
    again = run_.decode(cache, np.array([[1], [1]]), step)
    assert np.abs(again[1] - first[0]).max() <= 1e-5
    assert 0.0 <= cache.clip_rate() <= 1.0


def test_a_full_cache_is_refused_before_anything_runs(programs, tmp_path):
    program = programs["int8"]
    run_ = played(program, tmp_path)
    feeds = prompt(program, 1, 6, 4)
    _, cache = run_.prefill(feeds, 11)
    run_.decode(cache, np.array([[1]]), np.array([[10]]))
    held = cache.lengths.copy()
    with pytest.raises(CacheFullError, match=r"the cache of layer 0 is full after 11 rows; ask prefill for more capacity"):
        run_.decode(cache, np.array([[1]]), np.array([[11]]))
    assert (cache.lengths == held).all()
    with pytest.raises(LowerError, match=r"need 500 cache rows, the decode engine takes 200; rebuild: .*past=1:200:500"):
        run_.prefill(feeds, 500)
    assert run_.limit == 200


def test_keys_that_are_no_numbers_are_refused(programs, tmp_path):
    run_ = played(programs["int8"], tmp_path)
    feeds = prompt(programs["int8"], 1, 6, 4)
    feeds["image_features"][0, 2] = np.nan
    with pytest.raises(LowerError, match=r"hold NaN or infinity in samples \[0\]; they cannot be quantized"):
        run_.prefill(feeds, 11)


# ** what a plan does with codes **


def report(kernels, inputs=("past_k.0", "past_v.0")):
    profile = {n: [[1, 1, 2, 16], [1, 9, 2, 16], [1, 99, 2, 16]] for n in inputs}
    tensors = [{"name": n, "dtype": "int8", "shape": [1, -1, 2, 16]} for n in inputs]
    return EngineReport("decode", "t", "1", "8.9", "float16", 1, 1, 1.0, 1, tensors, [], profile, 1, kernels)


MHA = Kernel("_gemv_mha_v1", "8 1 1", "32 1 1", 8, ("past_k.0.1", "past_k.0.scale.1", "past_v.0.1"), ("k.0.1", "y"))


def test_the_fusion_check_names_who_reads_the_codes():
    assert report([MHA]).unfused == [] and "reads 2 quantized caches as they lie" in report([MHA]).attention
    other = Kernel("__myl_CastMulConc", "129 1 1", "128 1 1", 4, ("past_k.0.1",), ("wide",))
    assert report([other, MHA]).unfused == [
        "past_k.0 is read by __myl_CastMulConc (grid 129 1 1, writes wide) before attention: it is dequantized to memory"
    ]
    assert "1 of 2 quantized caches are dequantized to memory" in report([other, MHA]).attention
    assert report([MHA], ("past_k.0", "past_v.0", "past_k.0.lo")).unfused == ["past_k.0.lo is read by no kernel that this plan shows"]
    assert "does not show its kernels" in report([]).unfused[0]
    assert report([MHA], ()).unfused == []


def test_an_unfused_plan_is_an_error_or_a_loud_remark():
    backend = find("tensorrt-rtx")
    bad = report([Kernel("__myl_Cast", "9 1 1", "128 1 1", 4, ("past_k.0.1", "past_v.0.1"), ("wide",)), MHA])
    with pytest.raises(LowerError, match=r"tensorrt-rtx: decode: past_k\.0 is read by __myl_Cast .*--option unfused=warn builds it all the same"):
        backend._fusion(bad, "error")
    with pytest.warns(UserWarning, match="dequantized to memory"):
        assert len(backend._fusion(bad, "warn")) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend._fusion(report([MHA]), "error") == []
    with pytest.raises(LowerError, match=r"unfused='maybe' is none of \['error', 'warn'\]"):
        TrtOptions(unfused="maybe")




# ** real engines, built without a GPU **


@pytest.fixture(scope="module")
def llava():
    """A tiny llava of one layer: grouped queries, head width 16."""
    torch.set_num_threads(1)
    return capture(build(REGISTRY["llava"], 1).model)


def engines(program, folder, stages=("decode",), **options):
    """Reports of the engines of these stages."""
    program.stages = {n: s for n, s in program.stages.items() if n in stages}
    find("tensorrt-rtx").lower(program, folder, options)
    return {e["stage"]: e for e in json.loads((folder / "reports/engines.json").read_text())["engines"]}


MIXED = "kv-zipcache{hi=int8,lo=int4,important=0.3,recent=4,probes=4}"


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("recipe", "stages", "caches", "past"),
    [
        ("kv-int8", ("prefill", "decode"), 2, [1, -1, 2, 16]),
        ("kv-int4", ("decode",), 4, [1, -1, 2, 16]),
        ("kv-int4{appended=int4}", ("decode",), 2, [1, -1, 2, 8]),
        (MIXED, ("decode",), 4, [1, -1, 2, 16]),
        ("kv-zipcache{hi=int8,lo=int4,appended=int4,recent=4,probes=4}", ("decode",), 6, [1, -1, 2, 8]),
    ],
    ids=["int8", "int4", "int4-appended", "mixed", "three-parts"],
)
def test_decode_engines_read_codes_inside_attention(llava, tmp_path, recipe, stages, caches, past):
    """The default refuses a plan that does not, so that building is the proof; the report says it as well."""
    found = engines(run(llava.clone(), load(recipe)), tmp_path, stages)
    decode = found["decode"]
    assert decode["fused_attention"] == 1 and decode["cache_copies"] == 0
    assert decode["quantized_caches"] == caches and decode["unfused"] == []
    assert decode["attention"] == f"1 x gemv_mha_v1 (vec8); reads {caches} quantized caches as they lie"
    assert next(i["shape"] for i in decode["inputs"] if i["name"] == "past_k.0") == past
    rows = {o["name"]: (o["dtype"], o["shape"]) for o in decode["outputs"] if o["name"].startswith("k.")}
    assert rows == {"k.0": ("int8", [1, 1, *past[2:]])}, "the new row alone leaves the engine"
    if "prefill" in found:
        assert {o["name"]: o["dtype"] for o in found["prefill"]["outputs"]}["k.0"] == "int8" and found["prefill"]["fused_attention"] == 1


def by_hand(fused, heads=8, groups=8, width=64):
    """A decode attention over int8 codes with a scale per channel: the products spelt out, or ONNX's Attention behind the same arithmetic."""
    nodes, half = [], TensorProto.FLOAT16
    inputs = [helper.make_tensor_value_info("q", half, [1, heads, 1, width])]
    for which in "kv":
        inputs.append(helper.make_tensor_value_info(f"past_{which}.0", TensorProto.INT8, [1, "P", groups, width]))
        inputs.append(helper.make_tensor_value_info(f"past_{which}.0.scale", half, [1, 1, groups, width]))
        nodes += [
            helper.make_node("Cast", [f"past_{which}.0"], [f"{which}1"], to=half),
            helper.make_node("Mul", [f"{which}1", f"past_{which}.0.scale"], [f"{which}2"]),
            helper.make_node("Transpose", [f"{which}2"], [which], perm=[0, 2, 1, 3]),
        ]
    if fused:
        nodes.append(helper.make_node("Attention", ["q", "k", "v"], ["y"]))
    else:
        nodes += [
            helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
            helper.make_node("MatMul", ["q", "kt"], ["logits"]),
            helper.make_node("Softmax", ["logits"], ["p"], axis=-1),
            helper.make_node("MatMul", ["p", "v"], ["y"]),
        ]
    graph = helper.make_graph(nodes, "step", inputs, [helper.make_tensor_value_info("y", half, [1, heads, 1, width])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)


@pytest.mark.rtx
@pytest.mark.parametrize("fused_op", [False, True], ids=["products", "attention-op"])
def test_the_check_sees_a_known_unfused_form(fused_op, tmp_path):
    """Attention as one operator behind a dequantization writes keys and values back first; the same arithmetic as products does not."""
    onnx.save_model(by_hand(fused_op), str(tmp_path / "m.onnx"))
    shapes = {"q": [(1, 8, 1, 64)] * 3}
    for which in "kv":
        shapes[f"past_{which}.0"] = [(1, rows, 8, 64) for rows in (1, 256, 2048)]
        shapes[f"past_{which}.0.scale"] = [(1, 1, 8, 64)] * 3
    trt = pytest.importorskip("tensorrt_rtx")
    _, found = build_engine(trt, "tensorrt-rtx", Request("decode", tmp_path / "m.onnx", shapes, 1), TrtOptions(), "8.9")
    assert found.fused == 1
    if fused_op:
        assert len(found.unfused) == 2 and all("dequantized to memory" in said and "__myl_" in said for said in found.unfused)
    else:
        assert found.unfused == []
