"""FX -> ONNX: every operator against torch, names, sizes, weights, and refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from helpers import toy
from lowering import run_onnx, stage_of
from torch.export import Dim

from foveate.export.errors import LowerError
from foveate.export.expand import expand
from foveate.export.onnx_dialect import PORTABLE, attention_matmul
from foveate.export.onnx_registry import EMITTERS
from foveate.export.onnx_weights import WeightFile
from foveate.export.to_onnx import to_onnx

foveate = torch.ops.foveate
B, S = Dim("B", min=2, max=64), Dim("S", min=5, max=512)
X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
I = torch.tensor([[0, 2, 4, 1, 3], [4, 3, 2, 1, 0]])
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))

FLOATS = {  # functions of X[B, S, 8], Y[B, S, 8] with B and S symbolic
    "arithmetic": lambda x, y: (x + 2 * y) / (1.5 - x.abs()) - y.neg(),
    "alpha": lambda x, y: torch.add(x, y, alpha=3),
    "floor_division": lambda x, y: (x // 0.3, torch.remainder(x, 0.7), torch.div(x, y, rounding_mode="trunc")),
    "unary": lambda x, y: (
        x.sin().exp(),
        x.cos().tanh(),
        x.sigmoid(),
        x.abs().sqrt(),
        x.abs().rsqrt(),
        (x.abs() + 1).log(),
        x.floor(),
        x.ceil(),
        x.round(),
    ),
    "activations": lambda x, y: (F.silu(x), F.gelu(x), F.gelu(x, approximate="tanh"), F.relu(x), F.softplus(x)),
    "powers": lambda x, y: (x.pow(2), x.abs().pow(1.5), x.abs() ** y, x.square()),
    "clamp": lambda x, y: (x.clamp(-0.5, 0.5), x.clamp(min=0.1), x.clamp(max=0.2), torch.maximum(x, y), torch.minimum(x, y)),
    "compare": lambda x, y: (x > y, x <= 0.2, x == x, x != y, ~(x > 0) & (y > 0) | (x < -1)),
    "where": lambda x, y: (torch.where(x > 0, x, y), torch.where(x > 0, x, 0.0), x.masked_fill(y > 0, -7.0)),
    "reductions": lambda x, y: (x.sum(-1), x.mean(1, keepdim=True), x.amax((1, 2)), x.amin(0), x.max(), x.sum(), x.mean(), x.var(-1)),
    "max_with_index": lambda x, y: (*x.max(2), *x.min(1), x.argmax(-1), x.argmin(1, keepdim=True)),
    "any_all": lambda x, y: ((x > 0).any(1), (x > -9).all(2), (x > 0).any(), (x > 0).sum(1)),
    "cumsum": lambda x, y: (x.cumsum(1), (x > 0).long().cumsum(-1)),
    "norms": lambda x, y: (x.norm(dim=-1), torch.linalg.vector_norm(x, 1, dim=1), F.normalize(x, dim=-1)),
    "softmax": lambda x, y: (x.softmax(-1), x.log_softmax(1)),
    "topk_sort": lambda x, y: (*x.topk(3, 2), *x.sort(2, descending=True), x.argsort(1)),
    "layer_norm": lambda x, y: (F.layer_norm(x, (8,), y[0, 0], y[0, 1]), F.layer_norm(x, (8,)), F.rms_norm(x, (8,), y[0, 0], 1e-5)),
    "matmul": lambda x, y: (x @ y.transpose(1, 2), torch.bmm(x, y.mT), torch.einsum("bsd,btd->bst", x, y)),
    "views": lambda x, y: (
        x.view(x.shape[0], x.shape[1], 2, 4).transpose(1, 2),
        x.flatten(1),
        x.reshape(-1, 8),
        x.unflatten(2, (4, 2)),
        x.permute(2, 0, 1),
    ),
    "squeeze": lambda x, y: (x.unsqueeze(1).squeeze(1), x[:, :1].squeeze(1), x[None].squeeze(0)),
    "expand": lambda x, y: (x[:, :1].expand(-1, y.shape[1], -1), x[:1].expand_as(y), x[:, None].expand(-1, 3, -1, -1)),
    "slices": lambda x, y: (x[:, 1:], x[..., :-2], x[:, -1], x[:, :, 1::2], x[:, 0], x.narrow(2, 2, 3), x[:, x.shape[1] - 2 :]),
    "join": lambda x, y: (torch.cat([x, y], 1), torch.stack([x, y], 1), torch.cat([x, y.double().float()], -1)),
    "split": lambda x, y: (*x.split([3, 5], 2), *x.chunk(2, -1), *x.unbind(2)[:2]),
    "repeat": lambda x, y: (x.repeat(1, 2, 1), x.repeat_interleave(3, 1), x.repeat_interleave(2, -1), x.tile(2)),
    "roll_flip": lambda x, y: (x.roll(2, 1), x.roll((1, -2), (1, 2)), x.flip(1)),
    "pad": lambda x, y: (F.pad(x, (1, 2)), F.pad(x, (0, 0, 3, 1), value=2.0), F.pad(x > 0, (0, 1))),
    "make": lambda x, y: (
        torch.zeros_like(x),
        torch.full_like(x, 2),
        x.new_ones(x.shape[1], 3),
        torch.arange(x.shape[1]),
        torch.full((x.shape[0], 2), -1),
    ),
    "arange": lambda x, y: (
        torch.arange(3, 9, 2),
        torch.arange(x.shape[1])[None] - 1,
        torch.linspace(0, 1, 5),
        torch.arange(2.0, 4.0, 0.5),
    ),
    "triangle": lambda x, y: ((x @ y.mT).tril(), (x @ y.mT > 0).triu(1)),
    "cast": lambda x, y: (x.long(), (x > 0).float(), x.double().float(), x.to(torch.int32), y.type_as(x)),
    "scatter": lambda x, y: (x.slice_scatter(y[:, :2], 1, 1, 3), x.slice_scatter(y[:, :, :3], 2, 1, 8, 3), torch.zeros_like(x).scatter(2, (x > 0).long(), y)),
    "sizes": lambda x, y: (x.reshape(x.shape[0] * x.shape[1], 8), x.new_zeros(x.shape[1] * 2 - 1), x.flatten().view(x.shape[0], -1)),
    "index_put": lambda x, y: x.index_put((torch.tensor([0]), torch.tensor([1])), torch.tensor(5.0)),
}


@pytest.mark.parametrize("name", FLOATS)
def test_operator(name, tmp_path):
    """Float32, other sample sizes than those exported; 1e-5 is a few rounding errors of sums of 8 values of size 1."""
    stage = stage_of(FLOATS[name], (X, Y), [{0: B, 1: S}, {0: B, 1: S}])
    generator = torch.Generator().manual_seed(3)
    feeds = {"in0": torch.randn(3, 7, 8, generator=generator), "in1": torch.randn(3, 7, 8, generator=generator)}
    got = run_onnx(stage, feeds, tmp_path)
    for key, want in stage.run(feeds).items():
        assert tuple(got[key].shape) == tuple(want.shape)
        np.testing.assert_allclose(got[key], want.detach().numpy(), rtol=1e-5, atol=1e-5)


INDEXED = {  # functions of X[B, S, 8] and indices[B, S]
    "gather": lambda x, i: x.gather(1, i[..., None].expand(-1, -1, 8)),
    "index_one": lambda x, i: (x[0][i], x[:, i[0]], x.index_select(1, i[0])),
    "index_two": lambda x, i: (x[i // 5, i], x[torch.arange(x.shape[0])[:, None], i], x.transpose(0, 2)[:, i[0], i[1] // 5]),
    "embedding": lambda x, i: F.embedding(i, x[0]),
    "one_hot": lambda x, i: F.one_hot(i, 9),
    "integers": lambda x, i: (i // 2, i % 3, (i - 3) // 2, i * 2 - 1, i == 2, i.float() * x[..., 0], (i > 1).sum()),
    "scatter_add": lambda x, i: torch.zeros(x.shape[0], 9).scatter_add(1, i, x[..., 0]),
}


@pytest.mark.parametrize("name", INDEXED)
def test_indexing_operator(name, tmp_path):
    stage = stage_of(INDEXED[name], (X, I), [{0: B, 1: S}, {0: B, 1: S}])
    generator = torch.Generator().manual_seed(3)
    feeds = {"in0": torch.randn(6, 6, 8, generator=generator), "in1": torch.randint(0, 6, (6, 6), generator=generator)}
    got = run_onnx(stage, feeds, tmp_path)
    for key, want in stage.run(feeds).items():
        np.testing.assert_allclose(got[key], want.detach().numpy(), rtol=1e-5, atol=1e-5)


PICTURES = {
    "conv": lambda x: (F.conv2d(x, IMAGE[:2, :, :3, :3], stride=2, padding=1), F.conv1d(x[:, :, 0], IMAGE[:2, :, 0, :3])),
    "pool": lambda x: (F.avg_pool2d(x, 2), F.max_pool2d(x, 2), F.adaptive_avg_pool2d(x, 4), F.adaptive_avg_pool2d(x, 1)),
    "resize": lambda x: (
        F.interpolate(x, (12, 16), mode="bilinear"),
        F.interpolate(x, (5, 4), mode="bicubic"),
        F.interpolate(x, (16, 16), mode="nearest"),
        F.interpolate(x, (12, 12), mode="bilinear", align_corners=True),
    ),
    "antialias": lambda x: F.interpolate(x, (5, 6), mode="bilinear", antialias=True),
    "more": lambda x: (
        F.unfold(x, 2, stride=2),
        F.conv2d(x, IMAGE[:2, :, :2, :2], padding="same"),
        F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1)),
    ),
    "shuffle": lambda x: (F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2), F.group_norm(x.repeat(1, 2, 1, 1), 2)),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_operator(name, tmp_path):
    """2e-5: bicubic weights are computed in float32 on both sides, in another order."""
    stage = stage_of(PICTURES[name], (IMAGE,), [{0: B}])
    feeds = {"in0": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(3))}
    got = run_onnx(stage, feeds, tmp_path)
    for key, want in stage.run(feeds).items():
        np.testing.assert_allclose(got[key], want.detach().numpy(), rtol=2e-5, atol=2e-5)


def attention_case(mask: str, causal: bool, window: int = 0, softcap: float = 0.0, groups: int = 2, positions: bool = False):
    def body(x, y):
        batch, rows = x.shape[:2]
        q, k = x.view(batch, rows, 4, 2).transpose(1, 2), y[..., : 2 * groups].view(batch, rows, groups, 2).transpose(1, 2)
        valid = torch.arange(rows)[None] < torch.full((batch, 1), 2) + torch.arange(batch)[:, None]
        square = (x @ y.mT)[:, None]
        hidden = {"none": None, "keys": valid, "bool": (square > -1) | torch.eye(rows).bool(), "float": square}[mask]
        slots = torch.arange(rows)[None].expand(batch, rows) * 2 if positions else None
        return foveate.attention(q, k, k * 2, hidden, slots, slots, 0.6, causal, window, softcap, 0)

    return body


ATTENTIONS = {
    "free": attention_case("none", False),
    "causal": attention_case("none", True),
    "keys": attention_case("keys", True),
    "bool": attention_case("bool", False),
    "float": attention_case("float", True),
    "window": attention_case("none", True, window=3),
    "positions": attention_case("none", True, window=5, positions=True),
    "softcap": attention_case("keys", True, softcap=2.0),
    "one_group": attention_case("none", True, groups=1),
    "all_heads": attention_case("keys", True, groups=4),
}


@pytest.mark.parametrize("spelling", ["op", "matmul", "body"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_spellings(name, spelling, tmp_path):
    """The operator, the products and the reference body agree; rows that see no key at all are left out (any value is right there)."""
    stage = stage_of(ATTENTIONS[name], (X, Y), [{0: B, 1: S}, {0: B, 1: S}])
    generator = torch.Generator().manual_seed(3)
    feeds = {"in0": torch.randn(3, 6, 8, generator=generator), "in1": torch.randn(3, 6, 8, generator=generator)}
    override = {"op": None, "matmul": {foveate.attention.default: attention_matmul}, "body": {foveate.attention.default: None}}[spelling]
    got = run_onnx(stage, feeds, tmp_path, emitters=override)["out0"]
    np.testing.assert_allclose(got, stage.run(feeds)["out0"].detach().numpy(), rtol=1e-5, atol=1e-5)


DIALECT = {
    "keep_tokens": lambda x, i: foveate.keep_tokens(x, i[:, :3]),
    "last_token": lambda x, i: (foveate.last_token(x, i > 1), foveate.last_token(x, i < 3)),
    "splice": lambda x, i: foveate.splice_image_features(x, x[:, :2] * 5, i > 2),
    "compact_and_top": lambda x, i: foveate.compact_tokens(foveate.top_tokens(x[..., 0], 3, None), 3),
    "merge_insert_scatter": lambda x, i: (foveate.merge_tokens(x, x[..., :4].mT.softmax(-1)), foveate.insert_tokens(x, x[0, :2], i[:, 0])),
    "compact_more_than_there_is": lambda x, i: foveate.compact_tokens(i > 2, 9),
    "top_of_a_budget": lambda x, i: foveate.top_tokens(x[..., 0], 7, i[:, 0]),
    "top_of_nan": lambda x, i: foveate.top_tokens(torch.where(i > 2, float("nan"), x[..., 0]), 4, None),
    "top_of_ties": lambda x, i: foveate.top_tokens(i.float().clamp(max=2), 4, None),
    "rows_of_groups": lambda x, i: foveate.attention_rows(
        x[:, None].repeat(1, 4, 1, 1), torch.stack([x, -x], 1), None, i[:, :1], 0.5, True, 3.0
    ),
    "rows_of_masks": lambda x, i: (
        foveate.attention_rows(x[:, None], x[:, None], (i[:, None, :, None] + i[:, None, None]) > 1, i[:, :2], 0.5, True, 0.0),
        foveate.attention_rows(x[:, None], x[:, None], (x[:1] @ x[:1].mT)[:, None], i, 0.5, False, 0.0),
    ),
    "farthest": lambda x, i: (foveate.farthest_tokens(x, 4, False), foveate.farthest_tokens(x, 1, False)),
    "farthest_of_twins": lambda x, i: foveate.farthest_tokens(x[:, i[0] // 2], 5, True),
    "dpp": lambda x, i: (foveate.dpp_tokens(x @ x.mT, 4, 1e-6), foveate.dpp_tokens(x @ x.mT, 4, 0.0)),
    "rows": lambda x, i: foveate.attention_rows(x[:, None], x[:, None], i > 0, i[:, :2], 0.5, True, 0.0),
    "varlen": lambda x, i: foveate.attention_varlen(x[:1, None], x[:1, None], x[:1, None], torch.tensor([0, 2, 5]), 0.5, 0),
    "quantize": lambda x, i: foveate.dequantize_kv(
        foveate.quantize_kv(x[:, None], x[:, None].abs().amax(3, keepdim=True) / 127, None, 8, 0), x[:, None].abs().amax(3, keepdim=True) / 127, None, 0
    ),
}


@pytest.mark.parametrize("name", DIALECT)
@pytest.mark.parametrize("portable", [True, False], ids=["spelt", "body"])
def test_dialect(name, portable, tmp_path):
    """With and without a spelling of its own: the body is always a way."""
    stage = stage_of(DIALECT[name], (X, I), None if name == "varlen" else [{0: B, 1: S}, {0: B, 1: S}])
    rows = 5 if name == "varlen" else 6
    generator = torch.Generator().manual_seed(3)
    feeds = {
        "in0": torch.randn(2, rows, 8, generator=generator),
        "in1": torch.stack([torch.randperm(rows, generator=generator) for _ in range(2)]),
    }
    if name == "splice":
        feeds["in1"] = torch.tensor([[3, 0, 4, 1, 1, 0], [0, 4, 1, 1, 5, 0]])
    got = run_onnx(stage, feeds, tmp_path, emitters=None if portable else dict.fromkeys(PORTABLE))
    for key, want in stage.run(feeds).items():
        np.testing.assert_allclose(got[key], want.numpy(), rtol=1e-5, atol=1e-5)


def test_the_toy_program(tmp_path):
    """All three stages in contract names; 1e-5 relative to values of about 30 in eight float32 layers."""
    program = toy()
    feeds = {"vision": program.example["vision"], "prefill": program.example["prefill"]}
    past = {f"past_{w}.{i}": torch.randn(2, 1, 3 + i, 4) for i in range(3) for w in "kv"}
    feeds["decode"] = {
        "input_ids": torch.tensor([[1], [2]]),
        "position_ids": torch.full((2, 1), 10),
        "lengths": torch.tensor([[1, 3], [2, 4], [3, 5]]),
        **past,
    }
    for name, stage in program.stages.items():
        got, want = run_onnx(stage, feeds[name], tmp_path), stage.run(feeds[name])
        for key in want:
            np.testing.assert_allclose(got[key], want[key].detach().numpy(), rtol=1e-5, atol=1e-5 * float(want[key].abs().max()))


def test_names_and_sizes():
    program = toy()
    prefill, decode = to_onnx(program["prefill"], "prefill"), to_onnx(program["decode"], "decode")

    def shapes(values):
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    onnx.checker.check_model(prefill, full_check=True)
    assert shapes(prefill.graph.input) == {
        "input_ids": ["B", "S"],
        "image_features": ["B", "N", 4],
        "position_ids": ["B", "S"],
        "attention_mask": ["B", "S"],
    }
    assert shapes(prefill.graph.output)["k.2"] == ["B", 1, "S", 4]
    assert shapes(decode.graph.input)["past_v.1"] == ["B", 1, "P1", 4]


def test_weights_are_written_once(tmp_path):
    """Two graphs over the same parameters: the second adds nothing to the file, and a repeated tensor is one initializer."""
    weight = torch.randn(64, 64)
    first = stage_of(lambda x, w: x @ w + x @ w, (torch.randn(3, 64),), w=weight)
    second = first.clone()
    with WeightFile(tmp_path / "weights.bin") as file:
        model = to_onnx(first, "first", file)
        size = file.bytes
        to_onnx(second, "second", file)
        assert file.bytes == size == 64 * 64 * 4
    assert [i.name for i in model.graph.initializer if i.data_location == onnx.TensorProto.EXTERNAL] == ["w"]


def test_a_tied_weight_is_not_stored_twice(tmp_path):
    """Embedding and head share a table: the head transposes it instead of keeping a transposed copy."""
    stage = stage_of(lambda i, w: F.linear(F.embedding(i, w), w), (I,), [{0: B, 1: S}], w=torch.randn(16, 32))
    feeds = {"in0": I}
    np.testing.assert_allclose(run_onnx(stage, feeds, tmp_path)["out0"], stage.run(feeds)["out0"].detach().numpy(), rtol=1e-5, atol=1e-4)
    assert (tmp_path / "weights.bin").stat().st_size == 16 * 32 * 4


def test_weights_on_meta_are_refused_or_left_as_holes(tmp_path):
    stage = stage_of(lambda x, w: x @ w, (torch.randn(3, 64),), w=torch.randn(64, 64))
    stage.module.w = torch.nn.Parameter(stage.module.w.to("meta"))
    with WeightFile(tmp_path / "a") as file, pytest.raises(LowerError, match=r"a weight of shape \(64, 64\) has no data"):
        to_onnx(stage, "stage", file)
    with WeightFile(tmp_path / "b", zeros_for_meta=True) as file:
        to_onnx(stage, "stage", file)
    assert (tmp_path / "b").stat().st_size == 64 * 64 * 4


def test_a_composite_operator_is_decomposed(tmp_path):
    """glu and addcmul have no emitter: torch's own decompositions bring them to ones that do."""
    assert not {torch.ops.aten.glu.default, torch.ops.aten.addcmul.default} & set(EMITTERS)
    stage = stage_of(lambda x, y: (F.glu(x), torch.addcmul(x, x, y, value=2)), (X, Y), [{0: B, 1: S}, {0: B, 1: S}])
    feeds = {"in0": X, "in1": Y}
    got, want = run_onnx(stage, feeds, tmp_path), stage.run(feeds)
    for key in want:
        np.testing.assert_allclose(got[key], want[key].numpy(), rtol=1e-5, atol=1e-5)


def test_expanding_leaves_the_program_alone():
    program = toy()
    before = [n.name for n in program["prefill"].graph.nodes]
    known = {k: v for k, v in {**EMITTERS, **PORTABLE}.items() if k is not foveate.attention.default}
    expanded = expand(program["prefill"], known)
    assert not [n for n in expanded.graph.nodes if n.target is foveate.attention.default]
    assert [n.name for n in program["prefill"].graph.nodes] == before


def test_an_operator_without_lowering_is_named():
    stage = stage_of(lambda x, y: torch.linalg.qr(x)[0], (X, Y))
    with pytest.raises(LowerError, match=r"aten\.linalg_qr\.default \(node linalg_qr, .* has no lowering to ONNX"):
        to_onnx(stage, "stage")


def test_a_data_dependent_shape_is_refused():
    with pytest.raises(LowerError, match="boolean mask gives a data-dependent shape"):
        to_onnx(stage_of(lambda x, y: x[y > 0].sum(), (X, Y)), "stage")


def test_a_deep_stage_is_written_fast(tmp_path):
    """32 layers in well under the 15 s that the goal allows, on a busy machine too."""
    import time

    program = toy(32)
    start = time.perf_counter()
    to_onnx(program["prefill"], "prefill")
    assert time.perf_counter() - start < 5
    assert Path(tmp_path).exists()
