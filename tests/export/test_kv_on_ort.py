"""Caches of codes on ONNX Runtime: every pass that stores one, found by discovery, against the eager program; the fused forms by shape."""

from __future__ import annotations

import collections
import functools
import itertools
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lowering import distance, engine, prompt, rollout, run_onnx

from foveate.export.backends.eager import EagerEngine
from foveate.export.backends.ort import Ort, scratch_bytes, share_scratch
from foveate.export.kv_packing import pack_codes
from foveate.export.onnx_kv import KVContrib, planes
from foveate.export.onnx_kv_ops import KV_OPS
from foveate.export.to_onnx import to_onnx
from foveate.graph.capture import capture
from foveate.graph.families import REGISTRY
from foveate.graph.families._tiny import build
from foveate.graph.kv_format import KVFormat, Partition
from foveate.graph.program import KVLayer, Stage
from foveate.graph.stage import from_exported
from foveate.passes.base import discover
from foveate.passes.kv_mixed import MixedKV
from foveate.passes.kv_store import StoreKV
from foveate.passes.pipeline import run
from foveate.passes.recipe import load

EXACT = 1e-5  # relative to the logit scale: float32, the same sums in another order; a code that rounds the other way would be far above
F = torch.ops.foveate
SMALL = {  # what a tiny model (16 channels, 30 tokens) needs to be divided at all
    "kv-kivi": "group=4,residual=8",
    "kv-int2": "v_per=group:8",
    "kv-sign": "v_per=group:8",
    **{n: "sinks=1,recent=2,important=0.3" for n, p in discover().items() if issubclass(p, MixedKV)},
}
NAMES = [name for name, p in discover().items() if issubclass(p, StoreKV)]
RECIPES = [
    *[f"{name}{{{SMALL[name]}}}" if name in SMALL else name for name in NAMES if name != "kv-keep-dropped"],
    "drop-fastv{layer=1,keep=10} kv-keep-dropped",
    "kv-int4{k_per=token,v_per=group:8,appended=int4}",
    "kv-int4{appended=int4}",
    "kv-int4{appended=float}",
    "kv-int2{k_per=channel,v_per=channel}",
    "kv-zipcache{hi=int8,lo=int4,sinks=1,recent=2,important=0.3,streaming_gap=4}",
    "kv-zipcache{hi=float,lo=int2,sinks=1,recent=2,important=0.3,appended=float}",
    "kv-int8{layers=[1]}",
    "kv-zipcache{sinks=1,recent=2,important=0.3,layers=[0,1]}",  # two layers unpack into the same memory
]


@functools.cache
def _llava(layers: int):
    """4 heads on 2 of width 16."""
    program = capture(build(REGISTRY["llava"], layers).model)
    del program.stages["vision"]  # no test here looks
    return program


def stored(text: str):
    program = _llava(2 if " " in text or "layers" in text else 1).clone()  # a cut and a choice of layers need two
    for step in text.split(" "):
        run(program, load(step))
    return program


def pair(text: str, folder, **options):
    program = stored(text)
    return program, EagerEngine.of(program), engine(program, folder, "ort", threads=1, **options)


@pytest.mark.parametrize("text", RECIPES)
def test_every_format_equals_eager(text, tmp_path):
    """Three samples of unequal length, more steps than there is room for (buffers grow, flushes happen), the same bytes as eager's cache."""
    program, eager, ort = pair(text, tmp_path)
    feeds = prompt(program, batch=3, visual=24, text=8, padding=5, seed=1)  # with seed 0 a value lies halfway between two codes, to the last digit
    want, theirs = rollout(program, eager, feeds, steps=8, capacity=36)
    have, ours = rollout(program, ort, feeds, steps=8, capacity=36)
    assert distance(have, want) < EXACT
    for name, rows in theirs.parts.items():
        np.testing.assert_array_equal(ours.parts[name], rows)
    assert ours.clip_rate() == theirs.clip_rate()
    assert (Ort().scratch(program, {}, {"S": 32, "N": 24}) > 0) == (ort.manifest["decode"]["scratch"] != {})
    spare = sum(ours.buffers[f"past_{w}.{l}{p.suffix()}"][:, :, :1].nbytes for l, f in ours.formats.items() for p in f.partitions[1:] for w in "kv")
    assert 0 <= ours.nbytes - theirs.nbytes <= 1.05 * theirs.nbytes * 0.05 + 2 * spare  # one row behind what is only read


def test_codes_are_in_place_and_nothing_is_dequantized(tmp_path):
    for number, text in enumerate(["kv-int8", "kv-int4", "kv-zipcache{hi=int8,lo=int4,sinks=1,recent=2}", "kv-zipcache{lo=int4,hi=int4,sinks=1,recent=2}"]):
        _, _, ort = pair(text, tmp_path / str(number))
        decode = ort.manifest["decode"]
        wanted = [n.removeprefix("past_") for n in ort.pasts if not n.endswith((".scale", ".center"))]
        assert sorted(decode["in_place"]) == sorted(wanted) and decode["notes"] == []


def test_what_no_operator_reads_is_said(tmp_path):
    _, _, ort = pair("kv-fp8", tmp_path)
    assert any("fp8 per channel/channel part is dequantized in every step" in n and "saves memory, not time" in n for n in ort.manifest["decode"]["notes"])
    assert ort.manifest["decode"]["in_place"] == []


def test_the_portable_spelling_alone_equals_eager(tmp_path):
    program, eager, ort = pair("kv-zipcache{sinks=1,recent=2,important=0.3}", tmp_path, fuse=False)
    feeds = prompt(program, batch=2, visual=24, text=8, padding=3)
    assert distance(rollout(program, ort, feeds, steps=3)[0], rollout(program, eager, feeds, steps=3)[0]) < EXACT


def test_layers_unpack_in_turn_into_the_same_memory(tmp_path):
    """What a step unpacks is one layer's, whatever their number; ONNX Runtime unpacks a layer after the attention of the one before."""
    program, _, ort = pair("kv-zipcache{sinks=1,recent=2,important=0.3,layers=[0,1],appended=int4}", tmp_path)
    feeds = prompt(program, batch=2, visual=24, text=8)
    _, cache = ort.prefill(feeds, 40)
    outputs = ort.manifest["decode"]["scratch"]
    assert sorted(set(outputs.values())) == [f"past_{w}.{l}.lo" for w in "kv" for l in (0, 1)]
    arrays = share_scratch(outputs, cache.buffers)
    assert all(a.shape == (*(past := cache.buffers[outputs[n]]).shape[:3], 2 * past.shape[3]) for n, a in arrays.items())
    for one, other in itertools.combinations(arrays, 2):
        assert np.shares_memory(arrays[one], arrays[other]) == (one.split(".")[1] == other.split(".")[1])
    assert scratch_bytes(outputs, cache.buffers) == sum(2 * max(cache.buffers[f"past_{w}.{l}.lo"].nbytes for l in (0, 1)) for w in "kv")
    row = scratch_bytes(outputs, {n: a[:, :, :1] for n, a in cache.buffers.items()})
    assert Ort().scratch(program, {}, {"S": 32, "N": 24}) * 2 == scratch_bytes(outputs, cache.buffers) + row  # of one sample; a bound has a row to spare
    assert Ort().scratch(program, {"fuse": False}, {"S": 32, "N": 24}) == 0
    order = _order(next(tmp_path.rglob("decode.onnx")), lambda session: _one_step(ort, cache, session))
    assert sorted(order[:4]) == sorted(order[4:]) == ["C", "C", "G", "G"], order


def _order(file, run_) -> str:
    """C for every row of codes that is joined with its other plane, G for every attention, as they ran."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(file.with_suffix(""))
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    run_(session)
    events = [e for e in json.loads(Path(session.end_profiling()).read_text()) if e["name"].endswith("_kernel_time")]
    joined = {n.name for n in onnx.load(file, load_external_data=False).graph.node if n.op_type == "Concat" and n.output[0].startswith("wide.")}
    kinds = {e["name"].removesuffix("_kernel_time"): e["args"]["op_name"] for e in events}
    return "".join("G" if kind == "GroupQueryAttention" else "C" if name in joined else "" for name, kind in kinds.items())


def _one_step(ort, cache, session) -> None:
    ort.sessions["decode"] = session
    ort.decode(cache, np.full((2, 1), 1), np.full((2, 1), 32))


def test_parallel_answers_share_a_prompt_and_go_on_alone(tmp_path):
    _, _, ort = pair("kv-int4", tmp_path)
    feeds = prompt(stored("kv-int4"), batch=1, visual=24, text=8)
    _, cache = ort.prefill(feeds, 40)
    many = cache.take(np.array([0, 0, 0]))
    alone = [ort.decode(cache, np.array([[1]]), np.array([[32]])), ort.decode(cache, np.array([[2]]), np.array([[33]]))]
    first = ort.decode(many, np.array([[5], [1], [3]]), np.full((3, 1), 32))
    second = ort.decode(many, np.array([[2], [2], [4]]), np.full((3, 1), 33))
    np.testing.assert_allclose(first[1], alone[0][0], atol=1e-5)  # another batch size, another order of sums
    np.testing.assert_allclose(second[1], alone[1][0], atol=1e-5)
    assert np.abs(second[0] - second[1]).max() > 1e-3


def test_512_steps_do_not_drift(tmp_path):
    """Greedy, with flushes: eager and ONNX Runtime choose the same tokens, and the last logits are as close as the first."""
    _greedy(*pair("kv-zipcache{hi=int8,lo=int4,sinks=1,recent=2,streaming_gap=64}", tmp_path), 512)


def _greedy(program, eager, ort, steps) -> None:
    feeds = prompt(program, batch=2, visual=24, text=8, padding=3)
    found, caches = [], []
    for run_ in (eager, ort):
        outputs, cache = run_.prefill(feeds, 40)
        found.append([outputs["logits"]])
        caches.append(cache)
    valid = feeds["attention_mask"].sum(1, keepdims=True)
    for i in range(steps):
        token = found[0][-1].argmax(-1)[:, None]
        np.testing.assert_array_equal(found[1][-1].argmax(-1)[:, None], token)
        for run_, cache, logits in zip((eager, ort), caches, found, strict=True):
            logits.append(run_.decode(cache, token, valid + i))
    assert distance(found[1][-8:], found[0][-8:]) < EXACT


# ** attention alone, over shapes **


def attention_stage(heads: int, groups: int, width: int, form: KVFormat, rows: dict[str, int]) -> tuple[Stage, list[str]]:
    """Decode attention over the partitions of a format, as the KV passes leave it; 2 samples in the trace."""
    names = ["q", "k", "v", *(f"lengths{p.suffix()}" for p in form.partitions)]
    states = {}
    for p in form.partitions:
        for w in "kv":
            states[f"past_{w}.0{p.suffix()}"] = torch.zeros(2, groups, rows[p.name], width, dtype=torch.float32 if p.code == "float" else torch.int8)
            for s in p.states(w):
                states[f"past_{w}.0{p.suffix()}.{s}"] = torch.ones(2, groups, 1, width)
    names += list(states)

    def attend(*values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        have = dict(zip(names, values, strict=True))
        joined, masks, new = {}, None, {}
        for w in "kv":
            for p in form.partitions:
                past = f"past_{w}.0{p.suffix()}"
                state = (have.get(f"{past}.scale"), have.get(f"{past}.center"))
                bits = {"int8": 8, "int4": 4, "int2": 2, "float": 0}[p.code]
                rows_ = F.dequantize_kv(have[past], *state, 0) if bits else have[past]
                if p.name:
                    joined[w] = torch.cat([rows_, joined[w]], 2)
                    continue
                new[w] = F.quantize_kv(have[w], *state, bits, 0) if bits else F.kv_store(have[w], 0, w)
                joined[w] = F.kv_append(rows_, F.dequantize_kv(new[w], *state, 0) if bits else have[w], 0, w)
        masks = F.kv_mask(have["past_k.0"], have["lengths"], 0)
        for p in form.partitions[1:]:
            masks = torch.cat([F.kv_held(have[f"past_k.0{p.suffix()}"], have[f"lengths{p.suffix()}"], 0), masks], 1)
        y = F.attention(have["q"], joined["k"], joined["v"], masks, None, None, width**-0.5, False, 0, 0.0, 0)
        return y, new["k"], new["v"]

    class Module(torch.nn.Module):
        def forward(self, values):
            return attend(*values)

    shapes = {"q": (2, heads, 1, width), "k": (2, groups, 1, width), "v": (2, groups, 1, width)}
    example = [torch.zeros(*shapes[n]) if n in shapes else torch.zeros(1, 2, dtype=torch.long) if n.startswith("lengths") else states[n] for n in names]
    B = torch.export.Dim("B", min=1, max=64)
    P = {p.name: torch.export.Dim(f"P{p.name}", min=1, max=9000) for p in form.partitions}
    axes = [{1: B} if n.startswith("lengths") else {0: B} for n in names]
    for name, axis in zip(names, axes, strict=True):
        if name in states and states[name].shape[2] > 1:
            axis[2] = P[name.split(".")[2] if name.count(".") > 1 else ""]
    exported = torch.export.export(Module(), (example,), dynamic_shapes=(axes,), strict=False)
    return from_exported(exported, names, ["y", "k.0", "v.0"]), names


ROWS = 2**22  # elements of the keys of a drawn case at most, so that a case takes about a second


@st.composite
def cases(draw):
    """1 to 8 groups of 1 to 8 heads of 64 to 256 channels, 1 to 8192 tokens in one partition or two, 1 to 4 samples, within `ROWS`."""
    groups, ratio = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    width = 8 * draw(st.integers(8, 32))
    first = draw(st.sampled_from(["float", "int8", "int4", "int2"]))
    second = draw(st.sampled_from(["", "int8", "int4", "int2"]))
    batch = draw(st.integers(1, 4))
    most = min(8192, ROWS // (groups * width * batch))
    tokens = draw(st.one_of(st.integers(1, 8), st.integers(1, most)))
    low = draw(st.integers(0, tokens)) if second else 0
    return groups, ratio, width, first, second, draw(st.booleans()), (tokens - low, low), batch, draw(st.integers(0, 99))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cases())
def test_attention_of_any_shape_equals_the_dialect(tmp_path_factory, case):
    _check_attention(tmp_path_factory, case)


@pytest.mark.parametrize("first", ["int8", "int4"])
def test_attention_over_8192_tokens(tmp_path_factory, first):
    _check_attention(tmp_path_factory, (1, 2, 64, first, "int2", True, (6000, 2192), 1, 0))


@pytest.mark.parametrize(("first", "centred", "more"), [("int8", False, 0), ("int4", True, 3)])
def test_scales_meet_queries_without_splitting_heads(tmp_path_factory, first, centred, more):
    """As many heads as groups: two products, two quotients, and reshapes of states only (and of what the graph is given and returns)."""
    nodes = _check_attention(tmp_path_factory, (4, 1, 64, first, "", centred, (300, 0), 2, 0))
    kinds = collections.Counter(n.op_type for n in nodes)
    assert kinds["Mul"] == kinds["Div"] == 2 and kinds["Sub"] + kinds["Add"] - 1 == more  # 1: the number of rows
    made = {o: n for n in nodes for o in n.output}
    attention = next(n for n in nodes if n.op_type == "GroupQueryAttention")
    assert [made[i].op_type for i in attention.input[:3]] == ["Mul", *(["Div"] * 2)]


def _check_attention(tmp_path_factory, case) -> list[onnx.NodeProto]:
    groups, ratio, width, first, second, centred, tokens, batch, seed = case
    parts = [Partition(code=first, centred=centred and first != "float")]
    if second:
        parts.append(Partition("lo", second, centred=centred))
    form, rows = KVFormat(tuple(parts)), {"": tokens[0] + 4, "lo": tokens[1] + 2}
    stage, names = attention_stage(groups * ratio, groups, width, form, rows)
    generator = torch.Generator().manual_seed(seed)
    feeds = {}
    for name, node in zip(names, (n for n in stage.graph.nodes if n.op == "placeholder"), strict=True):
        part = parts["lo" in name.split(".")]
        sizes = [s if isinstance(s, int) else batch for s in node.meta["val"].shape]
        if name.startswith("lengths"):
            most = tokens["lo" in name]
            feeds[name] = torch.tensor([[max(most - 3 * b, 0) for b in range(batch)]])
            continue
        if name.startswith("past_") and not isinstance(node.meta["val"].shape[2], int):
            sizes[2] = rows[part.name]
        if node.meta["val"].dtype == torch.int8:
            top = {"int8": 128, "int4": 8, "int2": 2}[part.code]
            feeds[name] = torch.randint(-top, top, sizes, generator=generator, dtype=torch.int8)
        else:
            value = torch.randn(sizes, generator=generator)
            feeds[name] = value.abs() * 0.2 + 0.05 if name.endswith("scale") else value
    want = stage.run(feeds)["y"]
    layer = KVLayer(0, groups, width, width, format=form)
    packed = pack_codes(stage, [layer]).clone()
    contrib = KVContrib(packed, "decode", [layer])
    assert contrib.notes == []
    given_ = {n: _as_stored(packed, n, t) for n, t in feeds.items()}
    have = run_onnx(packed, given_, tmp_path_factory.mktemp("attention"), emitters=KV_OPS, at=contrib.emitters)
    nodes = list(to_onnx(packed, "s", None, KV_OPS, at=contrib.emitters).graph.node)
    assert {"GroupQueryAttention"} == {n.op_type for n in nodes if n.domain}
    error = np.abs(have["y"] - want.numpy()).max() / want.abs().max()
    assert error < EXACT, case
    return nodes


def _as_stored(stage: Stage, name: str, value: torch.Tensor) -> torch.Tensor:
    val = stage.placeholder(name).meta["val"]
    if val.dtype != torch.uint8:
        return value
    bits = 8 * int(val.shape[3]) // value.shape[3]
    return (F.pack_kv(value, bits).short() + 128).to(torch.uint8)


def test_planes_say_what_they_promise():
    """Two-bit digits as the nibbles of a byte and of four times the byte."""
    forward, inverse, offset = planes(16)
    codes = torch.randint(-2, 2, (5, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    byte = F.pack_kv(codes, 2).short() + 128
    both = torch.cat([byte, byte * 4 % 256], 1)
    nibbles = torch.stack([both % 16, both // 16], -1).flatten(1).float() - 8
    torch.testing.assert_close(forward @ (codes.float() + 2).T - 8, nibbles.T)
    torch.testing.assert_close(nibbles @ inverse.T + offset, codes.float())
