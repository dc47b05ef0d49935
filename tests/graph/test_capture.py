"""What a captured Program looks like, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers

from foveate.graph.capture import capture
from foveate.graph.check import prompts, replay
from foveate.graph.errors import GraphError
from foveate.graph.families import REGISTRY, family_of, load_model
from foveate.graph.families._hooks import _mask
from foveate.graph.families._tiny import build, llama_config
from foveate.graph.ops import REFERENCE
from foveate.graph.program import Program

ATTENTION = torch.ops.foveate.attention.default
LAYERS = 3


@pytest.fixture(scope="module")
def llava() -> tuple[object, Program]:
    model = build(REGISTRY["llava"], LAYERS).model
    return model, capture(model)


@pytest.fixture(scope="module")
def gemma3() -> Program:
    return capture(build(REGISTRY["gemma3"], 2).model)


def nodes(program: Program, stage: str, target: object) -> list[torch.fx.Node]:
    return [n for n in program[stage].graph.nodes if n.target is target]


def test_names_follow_the_contract(llava):
    _, program = llava
    kv = [f"{kind}.{l}" for l in range(LAYERS) for kind in "kv"]
    assert program["vision"].inputs == ["pixel_values"] and program["vision"].outputs == ["image_features"]
    assert program["prefill"].inputs == ["input_ids", "image_features", "position_ids", "attention_mask"]
    assert program["prefill"].outputs == ["logits", "kv_lengths", *kv]
    assert program["decode"].inputs == ["input_ids", "position_ids", "lengths", *(f"past_{n}" for n in kv)]
    assert program["decode"].outputs == ["logits", *kv]
    for stage, example in program.example.items():
        assert set(example) == set(program[stage].inputs)


def test_one_attention_per_layer_with_the_padding_mask(llava):
    _, program = llava
    found = nodes(program, "prefill", ATTENTION)
    assert [n.args[10] for n in found] == list(range(LAYERS))
    for n in found:
        assert n.args[3].meta["val"].dim() == 2 and n.args[3].meta["val"].dtype == torch.bool and n.args[7] is True
    assert len(nodes(program, "vision", ATTENTION)) == 2  # of 3 blocks: the second last hidden state is taken, the last block is dead code
    for n in nodes(program, "decode", ATTENTION):
        assert n.args[3].target is torch.ops.foveate.kv_mask.default and n.args[7] is False


def test_lengths_are_counted_inside_each_layer(llava):
    """So that a cut above a layer changes the count of that layer alone."""
    _, program = llava
    stack = program["prefill"].output_nodes["kv_lengths"]
    counts = stack.args[0]
    assert len({id(c) for c in counts}) == LAYERS
    for l, count in enumerate(counts):
        assert any(f"layers.{l}" in path for path, _ in count.meta["nn_module_stack"].values())


def test_every_layer_has_its_own_past_length(llava):
    _, program = llava
    sizes = [program["decode"].placeholder(f"past_k.{l}").meta["val"].shape[2] for l in range(LAYERS)]
    assert len({str(s) for s in sizes}) == LAYERS and all(isinstance(s, torch.SymInt) for s in sizes)


def test_every_node_knows_its_value_and_no_assert_is_left(llava, gemma3):
    for program in (llava[1], gemma3):
        for stage in program.stages.values():
            for n in stage.graph.nodes:
                assert n.op == "output" or "val" in n.meta, n.format_node()
                assert "assert" not in str(n.target) and n.target is not torch.ops.aten.to.device
                assert n.op in ("placeholder", "get_attr", "call_function", "output")


def test_parameters_are_the_models_own_under_its_names(llava):
    model, program = llava
    own = dict(model.named_parameters())
    for stage in ("prefill", "decode"):
        for name, parameter in program[stage].module.named_parameters():
            assert parameter is own[name]


def test_batch_and_sequence_are_free(llava):
    _model, program = llava
    facts = program.facts
    for B, S, N in ((1, 20, 9), (4, 31, 1)):
        ids = torch.randint(10, 400, (B, S))
        ids[:, 2: 2 + N] = facts.image_token_id
        out = program["prefill"].run({"input_ids": ids, "image_features": torch.randn(B, N, facts.hidden_size),
                                      "position_ids": torch.arange(S).expand(B, S), "attention_mask": torch.ones(B, S, dtype=torch.int64)})
        assert out["logits"].shape == (B, facts.vocab_size) and out["kv_lengths"].tolist() == [[S] * B] * LAYERS


def test_the_comparison_can_fail(llava):
    """Two samples with each other's pictures: logits move by far more than the tolerance of the family tests."""
    _model, program = llava
    tiny = build(REGISTRY["llava"], LAYERS)
    ids, mask = prompts(REGISTRY["llava"], tiny, batch=1).padded(left=True)
    feeds = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    a, b = (replay(program, feeds | {"image_features": torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(s))}, ids[:, :1])[0] for s in (0, 1))
    assert (a - b).abs().max() > 1e-2


def test_capture_leaves_the_model_as_it_was(llava):
    model, _ = llava
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "sdpa"
    assert torch.split.__module__ == "torch.functional"


def test_windowed_layers_compare_slots(gemma3):
    """Prefill's windows are in a 4D mask (both directions inside a picture); decode compares the slots of past and new rows."""
    assert [row.window for row in gemma3.kv] == [12, 0]
    assert all(n.args[3].meta["val"].dim() == 4 for n in nodes(gemma3, "prefill", ATTENTION))
    windowed, full = nodes(gemma3, "decode", ATTENTION)
    assert windowed.args[4].meta["name"] == "slot" and windowed.args[8] == 12 and windowed.args[7] is True
    assert full.args[4] is None and full.args[8] == 0
    assert "kv_pos.0" in gemma3["prefill"].outputs and "kv_pos.1" not in gemma3["prefill"].outputs
    assert "past_pos.0" in gemma3["decode"].inputs and "slot" in gemma3["decode"].inputs


def test_a_model_on_meta_is_captured_for_its_shapes():
    with torch.device("meta"):
        model = REGISTRY["llava"].tiny(2).model
    program = capture(model.eval())
    assert all(t.device.type == "meta" for _, t in program.parameters())
    assert program["prefill"].output_nodes["logits"].meta["val"].shape[1] == 512


def test_fake_kernels_give_the_shapes_of_the_bodies():
    """attention and attention_varlen do not trace their bodies: the short-cut must agree with them."""
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 6)
    for op, values in ((ATTENTION, (q, k, v, None, None, None, 0.3, True, 0, 0.0, 0)),
                       (torch.ops.foveate.attention_varlen.default, (q[:1], q[:1], q[:1], torch.tensor([0, 1, 3]), 0.3, 0))):
        real = REFERENCE[op](*values)
        _same(op(*[x.to("meta") if isinstance(x, torch.Tensor) else x for x in values]), real)


@pytest.mark.parametrize("per", ["channel", "token", "group:2", "block:3"])
@pytest.mark.parametrize("permuted", [False, True])
def test_fake_kernels_of_codes_give_the_shapes_of_the_bodies(per, permuted):
    """So do the ops that store keys and values, of which a pass traces dozens; heads in front of tokens or behind."""
    x, valid = torch.randn(2, 2, 7, 4, dtype=torch.float16), torch.ones(2, 7, dtype=torch.bool)
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if permuted else x
    F, block = torch.ops.foveate, 3 if per.startswith("block") else 0
    for bits, centred in ((1, False), (1, True), (4, False), (4, True)):
        scale, center = REFERENCE[F.kv_scale.default](x, valid, bits, per, centred, 1.2)
        for fake, real in zip(F.kv_scale(x.to("meta"), valid.to("meta"), bits, per, centred, 1.2), (scale, center), strict=True):
            _same(fake, real)
        codes = REFERENCE[F.quantize_kv.default](x, scale, center, bits, block)
        _same(F.quantize_kv(x.to("meta"), scale.to("meta"), center.to("meta"), bits, block), codes)
        _same(F.dequantize_kv(codes.to("meta"), scale.to("meta"), None, block), REFERENCE[F.dequantize_kv.default](codes, scale, None, block))


def _same(fake, real):
    assert fake.shape == real.shape and fake.dtype == real.dtype and fake.stride() == real.stride()


# ---- refusals


def test_a_text_only_model_is_refused():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_config(1)))
    with pytest.raises(GraphError, match=r"'llama' is a text-only model"):
        capture(model)


def test_a_model_type_without_family_names_those_that_exist():
    model = build(REGISTRY["llava"], 1).model
    model.config.model_type = "unheard_of"
    with pytest.raises(GraphError, match=r"no family for model type 'unheard_of'; families: .*llava.*qwen2_vl"):
        family_of(model)
    with pytest.raises(GraphError, match=r"Linear is not a Hugging Face model"):
        family_of(torch.nn.Linear(2, 2))


def test_images_without_processor_are_refused():
    with pytest.raises(GraphError, match=r"no processor with an image_processor"):
        capture(build(REGISTRY["llava"], 1).model, images=[object()])


def test_chunked_attention_is_refused():
    from transformers.masking_utils import chunked_causal_mask_function
    with pytest.raises(GraphError, match=r"chunked attention"):
        _mask(1, 4, 4, mask_function=chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.int64)))


def test_layers_that_share_a_cache_are_refused():
    model = build(REGISTRY["gemma4"], 2).model
    model.config.text_config.num_kv_shared_layers = 1
    with pytest.raises(GraphError, match=r"1 layers of this gemma4 read the cache of earlier layers"):
        capture(model)


def test_load_model_says_what_is_missing(tmp_path: Path):
    with pytest.raises(GraphError, match=r"is not a model folder"):
        load_model(tmp_path / "nowhere")
    text = tmp_path / "text"
    transformers.LlamaConfig(**llama_config(1)).save_pretrained(text)
    with pytest.raises(GraphError, match=r"holds 'llama', which is not a vision-language model"):
        load_model(text)
    bare = tmp_path / "bare"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        build(REGISTRY["llava"], 1).model.save_pretrained(bare)
    with pytest.raises(GraphError, match=r"has no processor|has no image processor"):
        load_model(bare)
    (bare / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(GraphError, match=r"the weights of .* cannot be read"):
        load_model(bare, processor=False)
    model, processor = load_model(bare, device="meta", processor=False)
    assert processor is None and next(model.parameters()).device.type == "meta"
