"""Half precision in the graph: where it is narrow, where it stays wide, and what large activations do to it."""

import pytest
import torch
from helpers import WIDTH, toy
from torch import nn
from torch.export import Dim

from foveate.export.errors import LowerError
from foveate.export.precision import kind, to_precision
from foveate.graph.program import Facts, Program
from foveate.graph.stage import from_exported

# Unit roundoff of float16 is 4.9e-4, of bfloat16 3.9e-3; the toy's random weights amplify about 20-fold over its layers.
BOUND = {"float16": 2e-2, "bfloat16": 1.5e-1}


def feeds_of(program, stage, precision):
    """The example inputs in the types that the narrowed stage takes."""
    types = {n.meta["name"]: n.meta["val"].dtype for n in program[stage].graph.nodes if n.op == "placeholder"}
    return {name: value.to(types[name]) for name, value in program.example[stage].items()}


@pytest.mark.parametrize("residual", ["float32", "half"])
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
@pytest.mark.parametrize("stage", ["vision", "prefill"])
def test_narrow_graphs_agree_with_float32(precision, residual, stage):
    program = toy(2)
    narrow = to_precision(program, precision, residual)
    want = program[stage].run(program.example[stage])
    got = narrow[stage].run(feeds_of(narrow, stage, precision))
    for name, value in want.items():
        if value.is_floating_point():
            assert (got[name].float() - value).abs().max() <= BOUND[precision] * value.abs().max(), name
        else:
            assert torch.equal(got[name], value), name


def test_features_and_cache_are_narrow_and_logits_wide():
    narrow = to_precision(toy(2), "float16")
    inputs = {n.meta["name"]: n.meta["val"].dtype for s in narrow.stages.values() for n in s.graph.nodes if n.op == "placeholder"}
    outputs = {f"{stage}.{name}": node.meta["val"].dtype for stage in narrow.stages for name, node in narrow[stage].output_nodes.items()}
    assert inputs["image_features"] == inputs["past_k.0"] == inputs["past_v.1"] == torch.float16
    assert inputs["pixel_values"] == torch.float32 and inputs["input_ids"] == torch.int64
    assert outputs["vision.image_features"] == outputs["prefill.k.0"] == outputs["decode.v.1"] == torch.float16
    assert outputs["prefill.logits"] == outputs["decode.logits"] == torch.float32
    assert narrow.facts.dtype == "float16"


def test_the_original_is_left_alone_and_parameters_are_shared():
    program = toy(2)
    before = str(program["prefill"].graph)
    narrow = to_precision(program, "float16")
    assert str(program["prefill"].graph) == before
    assert narrow["prefill"].module.lm.head.weight is program["prefill"].module.lm.head.weight


class Large(nn.Module):
    """An RMS norm and a gated MLP over a residual stream with values of 1e4, as LLaMA- and Qwen-like models carry in a few channels."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(12, 64)
        self.embed.weight.data.normal_()
        self.embed.weight.data[:, 3] = 1.2e4
        self.scale = nn.Parameter(torch.ones(64))
        self.gate, self.up, self.down = nn.Linear(64, 128, bias=False), nn.Linear(64, 128, bias=False), nn.Linear(128, 64, bias=False)
        self.down.weight.data[3] *= 500  # each layer adds some 5e4 to the loud channel: two of them pass 65504
        self.head = nn.Linear(64, 12, bias=False)

    def norm(self, h):
        return self.scale * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))

    def forward(self, input_ids):
        h = self.embed(input_ids)
        for _ in range(4):
            x = self.norm(h)
            h = h + self.down(nn.functional.silu(self.gate(x * 40)) * self.up(x * 40))
        return (self.head(self.norm(h)[:, -1]),)


def large() -> tuple[Large, Program]:
    torch.manual_seed(0)
    model = Large()
    ids = torch.arange(10).reshape(2, 5)
    exported = torch.export.export(model, (ids,), dynamic_shapes=({0: Dim("B", min=1, max=64), 1: Dim("S", min=2, max=64)},))
    facts = Facts(model_type="large", image_token_id=9, eos_token_ids=(0,), vocab_size=12, hidden_size=64, layers=1, layer_path="x")
    return model, Program(
        {"prefill": from_exported(exported, ["input_ids"], ["logits"])}, facts, [], example={"prefill": {"input_ids": ids}}
    )


def test_islands_keep_large_activations_finite():
    _, program = large()
    ids = program.example["prefill"]["input_ids"]
    want = program["prefill"].run({"input_ids": ids})["logits"]
    naive = large()[0].half()(ids)[0].float()  # squares are inf, their reciprocal root 0: the norm erases everything
    assert not (naive - want).abs().max() < 0.5 * want.abs().max(), (
        "the case must be one that plain float16 cannot compute, or it shows nothing"
    )
    got = to_precision(program, "float16")["prefill"].run({"input_ids": ids})["logits"]
    assert got.isfinite().all()
    assert (got - want).abs().max() <= 2e-2 * want.abs().max()  # a few times float16's roundoff over four layers


def test_statistics_and_tables_are_computed_wide():
    _, program = large()
    for case in (program, toy(2)):
        narrow = to_precision(case, "float16")
        wide = {
            n.name: kind(n)
            for s in narrow.stages.values()
            for n in s.graph.nodes
            if n.op == "call_function"
            and kind(n) in ("pow", "mean", "rsqrt", "cos", "silu", "softmax")
            and n.meta["val"].dtype != torch.float32
        }
        assert not wide
        products = [
            n.meta["val"].dtype for s in narrow.stages.values() for n in s.graph.nodes if n.op == "call_function" and kind(n) == "linear"
        ]
        assert products and set(products) == {torch.float16}


def test_a_half_residual_is_narrow_between_layers():
    adds = {}
    for residual in ("float32", "half"):
        narrow = to_precision(toy(2), "float16", residual)
        adds[residual] = {
            n.meta["val"].dtype
            for n in narrow["prefill"].graph.nodes
            if n.op == "call_function" and kind(n) == "add" and tuple(n.meta["val"].shape)[-1] == WIDTH
        }
    assert adds == {"float32": {torch.float32}, "half": {torch.float16}}


def test_float32_changes_nothing():
    program = toy(2)
    assert str(to_precision(program, "float32")["decode"].graph) == str(program["decode"].graph)


def test_a_model_captured_in_bfloat16_becomes_float16():
    torch.manual_seed(0)

    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)

        def forward(self, input_ids):
            h = self.embed(input_ids)
            wide = h.float()
            h = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)
            return (self.head(h[:, -1]).float(),)

    model, ids = Small().bfloat16(), torch.arange(10).reshape(2, 5)
    exported = torch.export.export(model, (ids,))
    facts = Facts(model_type="small", image_token_id=9, eos_token_ids=(0,), vocab_size=12, hidden_size=8, layers=1, layer_path="x")
    program = Program({"prefill": from_exported(exported, ["input_ids"], ["logits"])}, facts, [])
    narrow = to_precision(program, "float16")
    types = {n.meta["val"].dtype for n in narrow["prefill"].graph.nodes if n.op == "call_function" and kind(n) in ("linear", "embedding")}
    assert types == {torch.float16}
    assert not [n for n in narrow["prefill"].graph.nodes if n.op == "call_function" and n.meta["val"].dtype == torch.bfloat16]
    want, got = (p["prefill"].run({"input_ids": ids})["logits"] for p in (program, narrow))
    assert (got - want).abs().max() <= 2e-2 * want.abs().max()  # the reference itself is bfloat16


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("int8",), r"precision: 'int8' is none of \['float32', 'float16', 'bfloat16'\]"),
        (("float16", "double"), r"residual='double' is none of \['float32', 'half'\]"),
    ],
)
def test_unknown_precisions_are_refused(arguments, message):
    with pytest.raises(LowerError, match=message):
        to_precision(toy(2), *arguments)
