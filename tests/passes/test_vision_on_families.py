"""Vision-side methods on towers of real families: tiles with newlines and padding, packed windows, merged patches, DeepStack, no CLS.

Every method works, or says by name why not; what is kept are rows of the unreduced output; scores are checked by routes of their own.
"""

import functools
import itertools
import re

import helpers
import numpy as np
import onnxruntime
import pytest
import torch
from transformers.vision_utils import get_vision_window_index
from vision_cases import METHODS

from foveate.export.to_onnx import to_onnx
from foveate.graph.capture import _vision, _vision_layer_path, capture
from foveate.graph.families import REGISTRY, family_of
from foveate.graph.families._hooks import attention_of, patched, split_known
from foveate.graph.program import Facts, Program
from foveate.graph.sites import site
from foveate.graph.verify import verify
from foveate.passes import taps
from foveate.passes.base import PassError, make
from foveate.passes.vision_layout import find_layout

F = torch.ops.foveate
ATTENTION = (F.attention.default, F.attention_varlen.default)
SIZES = {"llava_next": (32, 20), "llava_onevision": (32, 32)}  # height, width: 32 x 20 in 2 x 2 tiles of 16 leaves padding in both columns
NO_CLS = "needs a vision tower with a CLS token"
SEPARATORS = "lays separators between them"
PACKED = "brings one packed picture at a time"
NOWHERE = "makes tokens that stand for no single patch"
REFUSED = {  # family -> method -> why; what is not listed works
    "llava_next": {"merge-prumerge": SEPARATORS, "merge-visionzip": SEPARATORS, "prune-evs": PACKED},
    "llava_onevision": dict.fromkeys(["merge-prumerge", "prune-globalcom2", "prune-hired", "prune-vision-cls", "prune-vispruner", "prune-vtc-cls"], NO_CLS)
    | {"merge-visionzip": SEPARATORS, "prune-evs": PACKED},
    "qwen2_5_vl": dict.fromkeys(["merge-prumerge", "prune-globalcom2", "prune-hired", "prune-vision-cls", "prune-vispruner", "prune-vtc-cls"], NO_CLS)
    | {"merge-visionzip": NOWHERE, "prune-evs": PACKED},
}
REFUSED["qwen3_vl"] = REFUSED["qwen2_5_vl"]


@functools.cache
def family(name):
    """(model, program) of the family's tiny model; methods work on clones."""
    torch.manual_seed(0)
    model = REGISTRY[name].tiny(1).model.eval()
    for parameter in model.parameters():  # wide enough that attention decides
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    adapter, example = family_of(model), None
    if name in SIZES:
        height, width = SIZES[name]
        example = {"pixel_values": torch.randn(1, 5, 3, 16, 16), "image_sizes": torch.tensor([[height, width]])}
    if name == "llava_next":
        return model, capture(model, vision=example)
    # the vision stage alone: the language model is not asked for
    with attention_of(model), patched([(torch, "split", split_known(torch.split)), *adapter.patches(model)]), torch.no_grad():
        given = adapter.vision_inputs(model, adapter.picture(example or adapter.vision_example(model, 2), 0))
        stage = _vision(adapter, model, given)
    facts = Facts(model_type=name, image_token_id=adapter.image_token_id(model), eos_token_ids=(0,), vocab_size=512, hidden_size=64, layers=1,
                  layer_path="none", vision_layer_path=_vision_layer_path(stage), positions=adapter.positions(model), features=adapter.features_of(model),
                  tokens_per_image=adapter.tokens_per_image(model), **adapter.vision_facts(model))
    return model, Program({"vision": stage}, facts, [], example={"vision": dict(given.tensors)})


def feed(program):
    given = program["vision"]
    shapes = {n: tuple(given.placeholder(n).meta["val"].shape) for n in given.inputs}
    return {n: torch.randn(shape, generator=torch.Generator().manual_seed(5)) for n, shape in shapes.items()}


def tapped(program, pixels):
    """q, k [views, H, T, D] of every vision attention, by running the unreduced stage with them as outputs."""
    stage = program.clone()["vision"]
    found = [n for n in stage.graph.nodes if n.target in ATTENTION]
    for i, node in enumerate(found):
        stage.add_output(f"q{i}", node.args[0])
        stage.add_output(f"k{i}", node.args[1])
    stage.module.recompile()
    with torch.no_grad():
        out = stage.run(pixels)
    return [(out[f"q{i}"], out[f"k{i}"], node.args[-5 if node.target == ATTENTION[0] else 4]) for i, node in enumerate(found)], out


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", REFUSED)
def test_every_method_keeps_rows_of_its_own_or_is_refused_by_name(name, method):
    program = family(name)[1].clone()
    if method in REFUSED[name]:
        with pytest.raises(PassError, match=f"^{method}: .*{re.escape(REFUSED[name][method])}"):
            make(method).run(program)
        return
    whole = family(name)[1]
    assert make(method, {"rows": 0, "columns": 0} if method == "prune-hired" else {}).run(program)
    verify(program)
    pixels = feed(program)
    with torch.no_grad():
        got, want = program["vision"].run(pixels), whole["vision"].run(pixels)
    kept = got["kept.vision"][0]
    assert len(kept) == program.facts.visual_per_image < len(want["image_features"]) == program.facts.tokens_per_image
    assert kept.tolist() == sorted(set(kept.tolist())) and kept.min() >= 0
    for feature in program.facts.features:  # DeepStack's further features go through the same choice
        torch.testing.assert_close(got[feature], want[feature][kept], rtol=1e-5, atol=1e-6)


def codes(model, name):
    """Family code itself lays out numbered tokens: per row of the picture the token's number, -1 for a newline."""
    views, n = 5, 16
    numbered = torch.arange(views * n, dtype=torch.float32).view(views, n, 1)
    more = {"vision_feature_select_strategy": "full"} if name == "llava_next" else {}
    packed, _ = model.model.pack_image_features([numbered], [SIZES[name]], image_newline=torch.tensor([-1.0]), **more)
    return packed[0][:, 0].long().tolist()


@pytest.mark.parametrize("name", SIZES)
def test_the_layout_found_is_the_one_that_the_family_s_own_code_makes(name):
    model, program = family(name)
    stage, skip = program["vision"], int(program.facts.has_cls)
    last = [n for n in stage.graph.nodes if n.target in ATTENTION][-1]
    layout = find_layout(stage, last, stage.output_nodes["image_features"], skip)
    assert [s[0] if s else -1 for s in layout.sources()] == codes(model, name)
    assert layout.mosaic() == (2, 2)
    assert (name == "llava_next") == any(row < 0 for view in layout.owner for row in view)  # padding is cut away


def test_windows_are_put_back_in_the_order_of_the_picture():
    """FoPru on Qwen2.5-VL by hand: softmax inside windows, mean over queries and heads, groups of four, inverse window order of HF's own code."""
    model, program = family("qwen2_5_vl")
    pixels, vision = feed(program), model.config.vision_config
    q, k, scale = tapped(program, pixels)[0][-1]
    grid = torch.tensor([[1, 8, 12]])
    order, bounds = get_vision_window_index(grid, spatial_merge_size=2, window_size=vision.window_size, patch_size=vision.patch_size)
    bounds = torch.unique_consecutive(torch.as_tensor(bounds)).tolist()
    received = torch.zeros(96)
    for start, stop in itertools.pairwise(bounds):
        received[start:stop] = (q[0, :, start:stop] @ k[0, :, start:stop].transpose(1, 2) * scale).softmax(-1).mean(0).sum(0) / 96
    assert len(bounds) > 2  # the last layer of the tiny model is a windowed one
    pooled = received.view(24, 4).mean(1)[torch.argsort(torch.as_tensor(order))]
    cut = program.clone()
    make("prune-fopru", {"keep": 7}).run(cut)
    assert cut["vision"].run(pixels)["kept.vision"][0].tolist() == sorted(pooled.topk(7).indices.tolist())


def test_hired_on_padded_tiles_by_hand():
    """The budget of a crop by the thumbnail's first layer, the choice by the last; padding is nobody's, newlines go."""
    model, program = family("llava_next")
    pixels, keep = feed(program), 30
    layers, _ = tapped(program, pixels)
    first, last = ((q[:, :, :1] @ k.transpose(2, 3) * scale).softmax(-1)[:, :, 0, 1:].sum(1) for q, k, scale in (layers[0], layers[-1]))
    rows = codes(model, "llava_next")
    there = set(rows)
    thumbnail = min(int(keep * 0.5), 16)
    salient = first[0].topk(8).indices.tolist()
    inside = [sum((t // 4) // 2 * 2 + (t % 4) // 2 == c for t in salient) for c in range(4)]
    quota = [thumbnail, *[int(i / sum(inside) * min(keep - thumbnail, 64)) for i in inside]]
    chosen = set()
    for view, count in enumerate(quota):
        held = [t for t in range(16) if view * 16 + t in there]
        chosen |= {view * 16 + t for t in sorted(held, key=lambda t: -last[view, t])[:count]}
    published = sorted(rows.index(t) for t in chosen)
    others = sorted((t for t in there - chosen if t >= 0), key=lambda t: -last[t // 16, t % 16])
    fixed = sorted(rows.index(t) for t in chosen | set(others[: keep - len(chosen)]))
    assert len(published) < keep  # flooring, or a crop with less than its quota
    cut = program.clone()
    make("prune-hired", {"keep": keep}).run(cut)
    assert cut["vision"].run(pixels)["kept.vision"][0].tolist() == fixed


def test_globalcom2_on_padded_tiles_by_hand():
    model, program = family("llava_next")
    pixels, rows = feed(program), codes(family("llava_next")[0], "llava_next")
    lines = [i for i, t in enumerate(rows) if t < 0]
    (q, k, scale), _ = tapped(program, pixels)[0][-1], model
    b = (q[:, :, :1] @ k.transpose(2, 3) * scale)[:, :, 0, 1:].mean(1)  # [views, 16]
    there, tokens = [[v * 16 + t in rows for t in range(16)] for v in range(5)], 28
    keep = tokens + len(lines)
    first = tokens * 16 // (len(rows) - len(lines))
    sums = np.array([sum(float(b[0, t]) for t in range(16) if (t // 4) // 2 * 2 + (t % 4) // 2 == c) for c in range(4)]) / 10
    p = np.exp(sums - sums.max()) / np.exp(sums - sums.max()).sum()
    wide = torch.nn.functional.interpolate(b[0].view(1, 1, 4, 4), size=(8, 8), mode="bilinear")[0, 0]
    score = [b[0].tolist()]
    for c in range(4):
        g = wide[c // 2 * 4 : c // 2 * 4 + 4, c % 2 * 4 : c % 2 * 4 + 4].flatten()
        held = torch.tensor(there[c + 1])
        score.append((b[c + 1] / (b[c + 1] * held).norm() + g / (g * held).norm()).tolist())
    quota = [first, *[int(sum(there[c + 1]) * min(1.0, first / 16 * (1 + p[c] - 1 / 4))) for c in range(4)]]
    chosen = set()
    for view, count in enumerate(quota):
        chosen |= {view * 16 + t for t in sorted((t for t in range(16) if there[view][t]), key=lambda t: -score[view][t])[:count]}
    cut = program.clone()
    make("prune-globalcom2", {"keep": keep}).run(cut)
    kept = cut["vision"].run(pixels)["kept.vision"][0].tolist()
    assert set(lines) <= set(kept) and len(kept) == keep
    assert {rows.index(t) for t in chosen} <= set(kept) and len(chosen) <= tokens  # the rest of the budget goes to the best anywhere


@pytest.mark.parametrize(("parameters", "message"), [
    ({"rows": 1, "columns": 4}, "rows=1 and columns=4, and llava_next was captured with 2 x 2 crops"),
    ({"rows": 2, "columns": 2, "keep": 5}, "keep=5 is less than the .* newline tokens that it leaves in the picture"),
])
def test_globalcom2_refuses_what_the_picture_does_not_have(parameters, message):
    with pytest.raises(PassError, match=f"prune-globalcom2: {message}"):
        make("prune-globalcom2", parameters).run(family("llava_next")[1].clone())


@pytest.mark.parametrize(("name", "method"), [("llava_next", "prune-hired"), ("llava_next", "prune-globalcom2"), ("qwen2_5_vl", "prune-fopru"),
                                              ("qwen3_vl", "prune-holov")])
def test_onnx_runtime_equals_eager(name, method):
    program = family(name)[1].clone()
    make(method).run(program)
    pixels, stage = feed(program), program["vision"]
    with torch.no_grad():
        want = stage.run(pixels)
    session = onnxruntime.InferenceSession(to_onnx(stage, "vision").SerializeToString(), providers=["CPUExecutionProvider"])
    got = dict(zip(stage.outputs, session.run(stage.outputs, {n: t.numpy() for n, t in pixels.items()}), strict=True))
    assert (got["kept.vision"] == want["kept.vision"].numpy()).all()
    for feature in program.facts.features:
        helpers.close(torch.from_numpy(got[feature]), want[feature], 1e-4)  # other kernels, float32


def test_the_rotary_tables_are_found_where_they_have_one_axis():
    """SparseVLM+ divides by what positions alone would attend: the tap is cos and sin of the model's own tables."""
    program = family("llava_next")[1].clone()
    table = taps.collect(program, site(program, 0), ["rope"])["rope"]
    assert [str(d) for d in table.meta["val"].shape[1:]] == [str(program["prefill"].placeholder("input_ids").meta["val"].shape[1]), "32"]
    stage = program["prefill"]
    stage.add_output("rope", table)
    stage.module.recompile()
    given = program.example["prefill"]
    given = given | {"position_ids": torch.arange(given["position_ids"].shape[1]).expand(given["position_ids"].shape)}
    cos, sin = stage.run(given)["rope"][0].chunk(2, -1)
    torch.testing.assert_close(cos[:, 0], torch.arange(len(cos)).float().cos(), rtol=0, atol=1e-5)
    torch.testing.assert_close(sin[:, 0], torch.arange(len(sin)).float().sin(), rtol=0, atol=1e-5)
    with pytest.raises(PassError, match="drop-sparse-vlm: version 2 corrects for rotary positions of one axis, and those of qwen3_vl have three"):
        make("drop-sparse-vlm", {"version": 2}).run(family("qwen3_vl")[1].clone())
