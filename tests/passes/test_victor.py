"""Victor and its adapters: the unit truths of registers, gradients against finite differences, refusals by message."""

from __future__ import annotations

import functools

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.graph.dump import dump
from foveate.graph.verify import verify
from foveate.passes import pipeline, recipe
from foveate.passes.base import PassError, make
from foveate.passes.insert import learned, load_weights, save_weights, settle, share
from foveate.passes.registers import scattered

N = 6  # visual tokens per image of the toy


@functools.cache
def _built(text):
    return pipeline.run(helpers.toy(), recipe.load(text))


def built(text):
    """The toy after a recipe: graphs of its own, tensors of its own."""
    program = _built(text).clone()
    for name, tensor in learned(program).items():
        fresh = torch.nn.Parameter(tensor.detach().clone())
        for stage in program.stages.values():
            owner = stage.module
            *parents, leaf = name.split(".")
            for part in parents:
                owner = getattr(owner, part, None)
            if owner is not None and leaf in owner._parameters:
                owner.register_parameter(leaf, fresh)
    return program


def test_no_registers_and_no_cut_change_no_bit(toy):
    before = dump(toy)
    assert not make("victor", {"registers": 0, "layer": 3}).run(toy)
    assert dump(toy) == before


@pytest.mark.parametrize("left", [False, True])
def test_registers_that_nobody_sees_leave_the_logits_alone(toy, left):
    """Text keeps its positions, so only attention to registers could matter: let their keys be masked."""
    feed = helpers.feeds([1, 2, 0], [4, 3, 5], seed=3, left=left)
    want = toy["prefill"].run(feed)["logits"]
    program = built("victor{registers=3,layer=3}")
    stage = program["prefill"]
    for node in list(stage.graph.nodes):
        if node.target is torch.ops.foveate.attention.default:
            index = next(n for n in stage.graph.nodes if n.meta.get("role") == "visual_index" and str(n.meta["val"].shape[1]).endswith("+ 3"))
            with stage.graph.inserting_before(node):
                shown = stage.graph.call_function(torch.ops.aten.ge.Scalar, (index, -1))
                mask = stage.graph.call_function(torch.ops.aten.logical_and.default, (node.args[3], shown))
            node.args = (*node.args[:3], mask, *node.args[4:])
    stage.module.recompile()
    helpers.close(stage.run(feed)["logits"], want, 3e-6)  # the sums run over more keys: another order


def test_registers_in_place_of_the_visual_tokens_are_the_original(toy):
    """k = 0, M = N, R = the image's own features: every register stands where a visual token stood."""
    feed = helpers.feeds([1], [4], seed=1)
    program = built(f"victor{{registers={N},layer=0,order=even}}")
    with torch.no_grad():
        learned(program)["learned.victor.registers"].copy_(feed["image_features"][0])
    helpers.close(program["prefill"].run(feed)["logits"], toy["prefill"].run(feed)["logits"], 3e-6)


def test_registers_that_hold_the_visual_tokens_start_as_the_original(toy):
    """k = 0, M = N, content from the image and nothing learned yet, whatever the images: batch, several per prompt, padding."""
    for images, text in (([1], [4]), ([1, 1], [3, 5])):
        feed = helpers.feeds(images, text, seed=2)
        program = built(f"victor{{registers={N},layer=0,order=even,content=visual}}")
        helpers.close(program["prefill"].run(feed)["logits"], toy["prefill"].run(feed)["logits"], 3e-6)


def test_content_is_the_visual_token_whose_position_a_register_takes():
    """What the registers of `content` hold at first: rows of image_features, in the order of `scattered`; a learned row is added to them."""
    program, feed = built("victor{registers=3,layer=2,content=visual}"), helpers.feeds([1], [4], seed=2)
    plain = built("victor{registers=3,layer=2}")
    with torch.no_grad():
        row = torch.randn(4, generator=torch.Generator().manual_seed(1))
        learned(program)["learned.victor.registers"].copy_(row.expand(3, 4))
        learned(plain)["learned.victor.registers"].copy_(feed["image_features"][0, [int(f * N) for f in scattered(3)]] + row)
    helpers.close(program["prefill"].run(feed)["logits"], plain["prefill"].run(feed)["logits"], 3e-6)


@pytest.mark.parametrize("text", ["victor{registers=2,layer=1}", "victor{registers=2,layer=2,question_blind=true}", "victor{registers=0,layer=1}"])
def test_registers_see_the_image_and_the_cut_removes_it(text):
    """What the last layer returns has no visual row; the logits still depend on the image."""
    program, feed = built(text), helpers.feeds([1, 1], [4, 2], seed=5)
    verify(program)
    out = program["prefill"].run(feed)
    other = program["prefill"].run(feed | {"image_features": feed["image_features"] + 1})
    spare = 0 if "registers=0" in text else 2
    assert out["kv_lengths"][-1].tolist() == [4 + spare, 2 + spare]
    assert (out["logits"] - other["logits"]).abs().max() > 1e-3


def test_decode_after_prefill_equals_prefill_of_the_longer_prompt():
    """In every cache variant; the visual rows of the layers before the cut are read by decode, evicted, or were never seen."""
    for text in ("victor{registers=2,layer=1}", "victor{registers=3,layer=2,question_blind=true}", "victor{registers=2,layer=1}, lora{rank=2}"):
        program, feed = built(text), helpers.feeds([1, 1], [4, 4], seed=2)
        for name, tensor in learned(program).items():
            with torch.no_grad():  # adapters start at zero and would not be tested
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) * 0.1)
        out = program["prefill"].run(feed)
        lengths, past, logits = out["kv_lengths"].clone(), {f"past_{n}": out[n] for n in program["decode"].outputs if n != "logits"}, out["logits"]
        for _ in range(4):
            token = torch.where(logits.argmax(-1, keepdim=True) == helpers.IMAGE, 1, logits.argmax(-1, keepdim=True))
            position = feed["attention_mask"].sum(1, keepdim=True)
            step = program["decode"].run({"input_ids": token, "position_ids": position, "lengths": lengths, **past})
            new = [n for n in program["decode"].outputs if n != "logits"]
            past = {f"past_{n}": torch.cat([past[f"past_{n}"][:, :, : int(lengths[int(n[2:]), 0])], step[n]], 2) for n in new}
            lengths, logits, one = lengths + 1, step["logits"], torch.ones_like(token)
            feed = feed | {"input_ids": torch.cat([feed["input_ids"], token], 1), "attention_mask": torch.cat([feed["attention_mask"], one], 1),
                           "position_ids": torch.cat([feed["position_ids"], position], 1)}
            helpers.close(logits, program["prefill"].run(feed)["logits"], 3e-5)


def test_a_blind_summary_does_not_depend_on_the_question():
    """The registers' rows in the cache of every layer are the same whatever is asked; with eyes open they are, too, but text rows are not blind."""
    program, feed = built("victor{registers=3,layer=2,question_blind=true}"), helpers.feeds([1], [5], seed=4)
    ids = feed["input_ids"].clone()
    last = int((ids[0] == helpers.IMAGE).nonzero().max())
    ids[0, last + 1 :] = 1 + (ids[0, last + 1 :] + 3) % 7
    a, b = program["prefill"].run(feed), program["prefill"].run(feed | {"input_ids": ids})
    before = int((feed["input_ids"][0, :last] != helpers.IMAGE).sum())
    for name in ("k.0", "v.1", "k.2"):
        torch.testing.assert_close(a[name][:, :, : before + 3], b[name][:, :, : before + 3], rtol=0, atol=0)
    moved = program["prefill"].run(feed | {"image_features": feed["image_features"].flip(1)})
    text = [(a[name][:, :, before + 3 :], moved[name][:, :, before + 3 :]) for name in ("v.0", "v.1", "v.2")]
    assert torch.equal(*text[0]) and torch.equal(*text[1])  # the registers know nothing yet in layer 0
    assert not torch.equal(*text[2])  # what they read there, text reads from them in layer 1


def test_a_blind_summary_serves_many_questions():
    """Prefill of picture and registers once; every question then goes through decode, token by token, and gives what a prefill of all gives."""
    program = built("victor{registers=3,layer=2,question_blind=true}")
    features = torch.randn(1, N, 4, generator=torch.Generator().manual_seed(7))
    begin = [1, *[helpers.IMAGE] * N]

    def prompt(tokens):
        ids = torch.tensor([tokens])
        return {"input_ids": ids, "image_features": features, "position_ids": torch.arange(len(tokens))[None], "attention_mask": torch.ones_like(ids)}

    summary = program["prefill"].run(prompt(begin))
    assert summary["kv_lengths"].tolist() == [[4]] * 3  # one text token, three registers, no visual row in any layer
    new = [n for n in program["decode"].outputs if n != "logits"]
    for question in ([2, 3, 4], [5], [7, 7, 1, 2]):
        past, lengths = {f"past_{n}": summary[n] for n in new}, summary["kv_lengths"].clone()
        for i, token in enumerate(question):
            at = torch.tensor([[len(begin) + i]])
            step = program["decode"].run({"input_ids": torch.tensor([[token]]), "position_ids": at, "lengths": lengths, **past})
            past, lengths = {f"past_{n}": torch.cat([past[f"past_{n}"], step[n]], 2) for n in new}, lengths + 1
        helpers.close(step["logits"], program["prefill"].run(prompt([*begin, *question]))["logits"], 3e-5)


def test_eviction_changes_the_cache_and_not_the_answer():
    feed = helpers.feeds([1, 2, 0], [4, 3, 5], seed=6)
    kept, gone = (built(f"victor{{registers=2,layer=2,evict_summarised_kv={e}}}")["prefill"].run(feed) for e in ("false", "true"))
    assert torch.equal(kept["logits"], gone["logits"])
    assert kept["kv_lengths"].tolist() == [[12, 17, 5], [12, 17, 5], [6, 5, 5]]
    assert gone["kv_lengths"].tolist() == [[6, 5, 5]] * 3


def test_fewer_registers_of_a_table_are_its_first():
    """Elastic M: the first m of M rows stand where m rows alone would, so one training serves all m."""
    feed = helpers.feeds([1, 1], [4, 2], seed=5)
    large, small = built("victor{registers=2,layer=1,table=4}"), built("victor{registers=2,layer=1}")
    with torch.no_grad():
        learned(small)["learned.victor.registers"].copy_(learned(large)["learned.victor.registers"][:2])
    helpers.close(large["prefill"].run(feed)["logits"], small["prefill"].run(feed)["logits"], 1e-6)
    assert scattered(7)[:3] == scattered(3) == [0.5, 0.25, 0.75]


@pytest.mark.parametrize(("text", "stages"), [("lora{rank=2}", 1), ("lora{rank=2,targets=[mlp],layers=[1,3]}", 1),
                                               ("victor{registers=2,layer=1}, lora{rank=2,rows=registers}", 0)])
def test_adapters_start_at_zero_and_fold_away(toy, text, stages):
    feed = helpers.feeds([1, 1], [4, 2], seed=5)
    program = built(text)
    base = built(text.partition(", lora")[0]) if "victor" in text else toy
    if "victor" in text:
        share([program, base])
    assert torch.equal(program["prefill"].run(feed)["logits"], base["prefill"].run(feed)["logits"])
    with torch.no_grad():
        for name, tensor in learned(program).items():
            if name.endswith(".b"):
                tensor.normal_(generator=torch.Generator().manual_seed(1))
    want = program["prefill"].run(feed)["logits"]
    assert (want - base["prefill"].run(feed)["logits"]).abs().max() > 1e-3
    nodes = sum(len(s.graph.nodes) for s in base.stages.values())
    made = settle(program)
    verify(program)
    helpers.close(program["prefill"].run(feed)["logits"], want, 3e-6)
    if stages:
        assert made and not learned(program) and sum(len(s.graph.nodes) for s in program.stages.values()) == nodes
        shared = {id(getattr(program[s].module.merged.lm.layers, "1").mlp.weight) for s in ("prefill", "decode")}
        assert len(shared) == 1  # one folded weight for both stages


def test_adapters_of_registers_leave_the_other_rows_alone():
    """The path of text and image is bit-exact: before the cut, only registers' rows of the cache move."""
    program, feed = built("victor{registers=2,layer=3}, lora{rank=2,rows=registers,layers=[0,1]}"), helpers.feeds([1], [4], seed=5)
    before = program["prefill"].run(feed)
    with torch.no_grad():
        for tensor in learned(program).values():
            tensor.add_(0.3)
    after = program["prefill"].run(feed)
    start = int((feed["input_ids"][0] == helpers.IMAGE).nonzero().max()) + 1
    moved = (before["k.0"] - after["k.0"]).abs().amax((0, 1, 3)) > 0
    assert moved.nonzero()[:, 0].tolist() == [start, start + 1]


# ---- gradients


def numeric(function, tensor, places, step=1e-3):
    found = []
    for i in places:
        with torch.no_grad():
            flat = tensor.view(-1)
            old = float(flat[i])
            flat[i] = old + step
            high = float(function())
            flat[i] = old - step
            low = float(function())
            flat[i] = old
        found.append((high - low) / (2 * step))
    return torch.tensor(found)


@pytest.mark.parametrize("text", ["victor{registers=2,layer=1,content=visual}", "victor{registers=2,layer=2,question_blind=true}", "lora{rank=2}",
                                  "victor{registers=2,layer=1}, lora{rank=2,rows=registers}"])
def test_gradients_equal_finite_differences(text, request):
    """Through the dialect's own operators. Attention computes in float32 whatever the inputs, so a difference of two losses over 2e-3 is right to
    about 1e-7 of the loss / 1e-3; besides, a step may cross a kink of the toy's ReLU."""
    program = built(text)
    stage = program["prefill"]
    stage.module.double()
    request.addfinalizer(stage.module.float)  # the parameters are those of every toy in this process
    with torch.no_grad():
        for tensor in learned(program).values():
            tensor.add_(0.05)
    feed = helpers.feeds([1, 1], [4, 2], seed=5)
    feed["image_features"] = feed["image_features"].double()
    weight = torch.randn(2, helpers.VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss():
        return (stage.run(feed)["logits"] * weight).sum()

    names = list(learned(program))[:4]
    tensors = [learned(program)[n] for n in names]
    grads = torch.autograd.grad(loss(), tensors)
    for name, tensor, grad in zip(names, tensors, grads, strict=True):
        places = grad.abs().view(-1).topk(min(3, grad.numel())).indices.tolist()
        want = numeric(loss, tensor, places)
        noise = 1e-4 * float(loss().detach().abs()) + 1e-3 * float(grad.abs().max())
        torch.testing.assert_close(grad.view(-1)[places].float(), want.float(), rtol=2e-2, atol=noise, msg=lambda m, n=name: f"{n}: {m}")


# ---- files and refusals


def test_weights_survive_their_file(tmp_path):
    program, other = built("victor{registers=2,layer=1}"), built("victor{registers=2,layer=2}")
    with torch.no_grad():
        learned(program)["learned.victor.registers"].normal_()
    save_weights(program, tmp_path / "w.safetensors")
    assert load_weights(other, tmp_path / "w.safetensors") == 1
    assert torch.equal(learned(other)["learned.victor.registers"], learned(program)["learned.victor.registers"])


def test_weights_of_another_recipe_are_refused(tmp_path, toy):
    save_weights(built("victor{registers=2,layer=1}"), tmp_path / "two.safetensors")
    save_weights(built("lora{rank=2}"), tmp_path / "lora.safetensors")
    with pytest.raises(PassError, match=r"weights: victor.registers is \[2, 4\] in .*two.safetensors and \[3, 4\] in this recipe and model"):
        load_weights(built("victor{registers=3,layer=1}"), tmp_path / "two.safetensors")
    with pytest.raises(PassError, match=r"it lacks 1 \(victor.registers\) and has unknown 12 \(lora.lm.layers.0.mlp.a, .*\); the recipe's tensors are victor"):
        load_weights(built("victor{registers=2,layer=1}"), tmp_path / "lora.safetensors")
    with pytest.raises(PassError, match="was given, and this recipe inserts no learned tensors"):
        load_weights(toy, tmp_path / "two.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    with pytest.raises(PassError, match=r"bad.safetensors is not a safetensors file"):
        load_weights(built("victor{registers=2,layer=1}"), tmp_path / "bad.safetensors")
    with pytest.raises(PassError, match=r"weights: no file .*gone"):
        load_weights(built("victor{registers=2,layer=1}"), tmp_path / "gone")
    with pytest.raises(PassError, match="this program has no learned tensors to save"):
        save_weights(toy, tmp_path / "x")


@pytest.mark.parametrize(("text", "message"), [
    ("victor{registers=7}", r"victor: 7 registers are more than the 6 visual tokens of an image"),
    ("victor{registers=2,layer=4}", r"victor: no layer 4 in prefill; this program has 0..2, and 3 stands for no cut"),
    ("victor{registers=4,table=2,layer=1}", r"victor: registers=4 is more than the table of 2"),
    ("victor{registers=0,layer=1,question_blind=true}", r"victor: question_blind without registers leaves nothing of the image"),
    ("victor{layer=1,registers=2}, victor{layer=2,registers=2}", r"victor: is in this program already"),
    ("lora{targets=[q_proj]}", r"lora: no linear layer ends with one of \['q_proj'\] in layers all; there are \['head', 'mlp', 'qkv'\]"),
])
def test_refusals(toy, text, message):
    with pytest.raises(PassError, match=message):
        pipeline.run(toy, recipe.load(text))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), min_size=1, max_size=4), st.integers(0, 3))
def test_any_prompts(samples, seed):
    """Lengths are those of text and registers; a sample alone gives what it gives in a batch."""
    program = _built("victor{registers=2,layer=1}")
    images, text = [i for i, _ in samples], [t for _, t in samples]
    out = program["prefill"].run(helpers.feeds(images, text, seed=seed))
    assert out["kv_lengths"][2].tolist() == [t + (2 if i else 0) for i, t in samples]
    assert torch.isfinite(out["logits"]).all()
