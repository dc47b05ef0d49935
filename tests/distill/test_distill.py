"""Distillation: the training view, the teacher's cache, falling loss, one curve whatever interrupts or divides it, refusals by message."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkpoints
import helpers
import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.distill_data import Cache, Row, Segment, collate, digest, sources
from foveate.distill_loss import Target, hidden_error, kl
from foveate.distill_train import CURVE, STATE, Settings, Student, Trainer
from foveate.distill_view import trainable, training_view
from foveate.distillation import making_of, vision_changed
from foveate.graph.capture import capture
from foveate.graph.families import load_model
from foveate.passes import pipeline, recipe
from foveate.passes.base import PassError
from foveate.passes.insert import load_weights, read_weights, share

QUESTIONS = ["what is this ?", "what colour is the thing ?", "a b c ?", "is the image red ?"]
TRAINING = dict(steps=6, batch=2, held_out=2, evaluate_every=3, save_every=2, warmup=1, max_new_tokens=4, lr=1e-2)


@functools.cache
def captured():
    model, processor = load_model(str(checkpoints.tiny_llava()), dtype="auto", device="cpu")
    return capture(model, processor), processor


def pictures(count=8, seed=0):
    rng = np.random.default_rng(seed)
    return [(Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)), QUESTIONS) for _ in range(count)]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of the teacher's answers, shared by all runs of this module."""
    return tmp_path_factory.mktemp("teacher")


def train(teacher, output, text="victor{registers=4,layer=2}, lora{rank=2}", **options):
    program, processor = captured()
    return foveate.distill(program, pictures(), text, processor=processor, output=output, cache=teacher, **{**TRAINING, **options})


def curve(folder):
    return [(l["step"], l["loss"]) for l in map(json.loads, (folder / CURVE).read_text().splitlines()) if "loss" in l]


# ---- the view


@pytest.mark.parametrize("text", ["none", "victor{registers=2,layer=1}", "drop-random{layer=1,keep=2}", "victor{registers=2,layer=2,question_blind=true}"])
def test_the_view_says_what_the_program_says(text):
    """One question per row: the answer row's logits are the prefill's; packed, two questions say what each says alone."""
    toy = helpers.toy()
    feed = helpers.feeds([1, 1, 0], [4, 2, 3], seed=5)
    steps = recipe.load(None if text == "none" else text)
    program, view = pipeline.run(toy.clone(), steps), pipeline.run(training_view(toy, (1, 3)), steps)
    share([program, view])
    more = {"segment": torch.where(feed["attention_mask"] > 0, 0, -1), "answer_rows": torch.tensor([[3], [1], [2]]),
            "text_rows": torch.tensor([[0, 1, 2, 3], [0, 1, -1, -1], [0, 1, 2, -1]])}
    out = trainable(view["prefill"], ["logits", "hidden.1", "hidden.3"])(feed | more)
    helpers.close(out["logits"][:, 0], program["prefill"].run(feed)["logits"])
    assert out["hidden.1"].shape == out["hidden.3"].shape == (3, 4, helpers.WIDTH)


def test_packed_questions_do_not_see_each_other():
    """[image, q1, q2] in one row gives for each question what [image, q] gives alone; so does the view after a cut."""
    for text in (None, "victor{registers=2,layer=1}"):
        view = pipeline.run(training_view(helpers.toy(), (3,)), recipe.load(text))
        run = trainable(view["prefill"], ["logits", "hidden.3"])
        facts = {"image_token_id": helpers.IMAGE, "tokens_per_image": 6, "positions": {"kind": "linear"}, "features": ["image_features"], "eos_token_ids": [0],
                 "min_visual": 1}
        segments = [Segment(np.array([2, 3]), np.array([4, 0])), Segment(np.array([5]), np.array([6])), Segment(np.array([7, 1, 2]), np.array([8, 3, 0]))]
        row = Row(np.array([1, *[helpers.IMAGE] * 6]), tuple(segments), 1, {}, {"image_features": torch.randn(6, 4)})
        together = run(collate([row], facts))
        for number, segment in enumerate(segments):
            alone = run(collate([replace(row, segments=(segment,))], facts))
            begin = sum(len(s.answer) for s in segments[:number])
            helpers.close(together["logits"][0, begin : begin + len(segment.answer)], alone["logits"][0])


# ---- losses


def test_kl_and_hidden_error_by_another_route():
    torch.manual_seed(0)
    mine, theirs = torch.randn(1, 3, 7), torch.randn(1, 3, 7).log_softmax(-1)
    held = torch.tensor([[True, True, False]])
    to = Target(theirs, None, held, torch.zeros(1, 3, dtype=torch.long), {2: torch.ones(1, 2, 4)}, torch.tensor([[True, False]]), 2, 1)
    want = torch.nn.functional.kl_div(mine[0, :2].log_softmax(-1), theirs[0, :2], log_target=True, reduction="batchmean")
    helpers.close(kl(mine, to), want)
    half = (theirs / 2).log_softmax(-1), (mine / 2).log_softmax(-1)
    helpers.close(kl(mine, to, 2.0), 4 * torch.nn.functional.kl_div(half[1][0, :2], half[0][0, :2], log_target=True, reduction="batchmean"))
    values, index = theirs.topk(7, -1)
    helpers.close(kl(mine, replace(to, logits=values, index=index)), want, 1e-4)  # the seven best of seven leave a rest of 1e-6
    assert float(hidden_error({2: torch.full((1, 2, 4), 3.0)}, to)) == pytest.approx(4.0)


def test_gradients_equal_those_of_the_dialect():
    """The training module replaces dialect operators by plain ones; both give the same gradient of the same loss."""
    toy = helpers.toy()
    text = recipe.load("victor{registers=2,layer=1}, lora{rank=2}")
    program, view = pipeline.run(toy.clone(), text), pipeline.run(training_view(toy), text)
    tensors = share([program, view])
    feed = helpers.feeds([1, 1], [4, 2], seed=5)
    more = {"segment": torch.where(feed["attention_mask"] > 0, 0, -1), "answer_rows": torch.tensor([[3], [1]]), "text_rows": torch.tensor([[0], [0]])}
    weight = torch.randn(2, helpers.VOCAB, generator=torch.Generator().manual_seed(0))
    one = torch.autograd.grad((program["prefill"].run(feed)["logits"] * weight).sum(), list(tensors.values()))
    other = torch.autograd.grad((trainable(view["prefill"], ["logits"])(feed | more)["logits"][:, 0] * weight).sum(), list(tensors.values()))
    for a, b in zip(one, other, strict=True):
        helpers.close(a, b, 1e-4)


# ---- training


def test_the_loss_falls_and_the_weights_ship(teacher, tmp_path):
    done = train(teacher, tmp_path / "run", steps=24, lr=2e-2)
    losses = [loss for _, loss in curve(done.folder)]
    assert np.mean(losses[-4:]) < 0.8 * np.mean(losses[:4])
    assert done.report["rows"] == 6 and done.report["held_out_questions"] == 8
    assert {n.split(".")[1] for n in read_weights(done.weights)} == {"victor", "lora"}
    model = foveate.optimize_model(str(checkpoints.tiny_llava()), str(done.recipe), weights=done.weights, output=tmp_path / "artifact")
    assert (tmp_path / "artifact" / "learned.safetensors").is_file()
    said = model.generate(pictures(1)[0][0], messages=[{"role": "user", "content": QUESTIONS[0]}], max_new_tokens=4)
    student = pipeline.run(captured()[0].clone(), recipe.load(str(done.recipe)))
    load_weights(student, done.weights)
    asked = model.session.prepare(pictures(1)[0][0], None, [{"role": "user", "content": QUESTIONS[0]}])
    feed = {n: torch.from_numpy(a) for n, a in model.session.encode(asked).batch.feeds.items()}
    assert int(student["prefill"].run(feed)["logits"].argmax()) == said.tokens[0][0]  # the engine says what was trained


def test_only_inserted_tensors_move(teacher, tmp_path):
    program, _ = captured()
    before = digest(program)
    train(teacher, tmp_path / "run")
    assert digest(program) == before
    assert not any(t.requires_grad for _, t in program.parameters())


class Killed(Exception):
    pass


def kill_after(step):
    def progress(stage, line):
        if stage == "train" and line.get("step") == step and "loss" in line:
            raise Killed

    return progress


def test_killed_and_resumed_gives_the_same_curve(teacher, tmp_path):
    whole = train(teacher, tmp_path / "whole", focus=0.5, elastic=[2, 4])
    program, processor = captured()
    with pytest.raises(Killed):  # after step 5; the checkpoint is of step 4, and the curve has a line too many
        foveate.distill(program, pictures(), "victor{registers=4,layer=2}, lora{rank=2}", processor=processor, output=tmp_path / "again", cache=teacher,
                        progress=kill_after(5), focus=0.5, elastic=[2, 4], **TRAINING)
    assert torch.load(tmp_path / "again" / STATE, weights_only=True)["step"] == 4
    again = train(teacher, tmp_path / "again", focus=0.5, elastic=[2, 4])
    assert curve(again.folder) == curve(whole.folder)  # to the last bit: what a step sees depends on the step and on the checkpoint
    for name, tensor in read_weights(whole.weights).items():
        assert torch.equal(tensor, read_weights(again.weights)[name])


def test_a_bfloat16_model_is_trained_in_float32(teacher, tmp_path):
    """Steps far below the resolution of bfloat16 add up; the curve is that of the float32 model but for roundings, and goes on after a kill."""
    model, processor = load_model(str(checkpoints.tiny_llava()), dtype=torch.bfloat16, device="cpu")
    program, options = capture(model, processor), {**TRAINING, "lr": 1e-3, "rates": {}}
    text = "victor{registers=4,layer=2}, lora{rank=2}"
    done = foveate.distill(program, pictures(), text, processor=processor, output=tmp_path / "half", **options)
    wide = train(teacher, tmp_path / "wide", text, lr=1e-3, rates={})
    for (_, a), (_, b) in zip(curve(done.folder), curve(wide.folder), strict=True):  # 2^-8 a rounding, over three layers and answers that may differ
        assert abs(a - b) < 0.1 * b
    found = read_weights(done.weights)
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert any((t.bfloat16().float() != t).any() for t in found.values())
    assert foveate.optimize_model(str(checkpoints.tiny_llava()), str(done.recipe), weights=done.weights, output=tmp_path / "artifact")
    with pytest.raises(Killed):
        foveate.distill(program, pictures(), text, processor=processor, output=tmp_path / "again", progress=kill_after(5), **options)
    again = foveate.distill(program, pictures(), text, processor=processor, output=tmp_path / "again", **options)
    assert curve(again.folder) == curve(done.folder)


def test_float16_is_refused_before_the_teacher_works(tmp_path):
    model, processor = load_model(str(checkpoints.tiny_llava()), dtype=torch.float16, device="cpu")
    with pytest.raises(foveate.DistillError, match="is float16, in which gradients vanish; load the model in float32 or bfloat16"):
        foveate.distill(capture(model, processor), pictures(), "lora{rank=2}", processor=processor, output=tmp_path / "run", **TRAINING)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", [
    "none", "victor{registers=4,layer=1,content=visual}", "victor{registers=2,layer=1,question_blind=true}, lora{rank=2}", "prefusion{registers=2,layer=1}",
    "layer-expert{layers=[1],keep=4}", "space-to-depth{side=2}", "matryoshka-mix{tokens=4,groups=2}", "conv-downsample{side=2}", "query-pool{side=2}",
    "meta-tokens{tokens=4,layer=0}"])
def test_a_student_computes_where_its_model_is(text):
    """On the meta device, where an operand from the CPU is an error: forward and backward of every insertion, features and feeds brought there."""
    model, _ = load_model(str(checkpoints.tiny_llava()), dtype="auto", device="meta")
    view = pipeline.run(training_view(capture(model), (1, 3)), recipe.load(None if text == "none" else text))
    tensors = share([view])
    student = Student.of("one", view, (1, 3), vision_changed(captured()[0], view))
    segments = tuple(Segment(np.array([5, 6, 7]), np.array([8, 2])) for _ in range(2))
    row = Row(np.array([1, *[4] * 16]), segments, 1, {"pixel_values": np.zeros((1, 3, 32, 32), np.float32)}, {"image_features": torch.zeros(16, 32)})
    out = student([row, row])
    assert {x.device.type for x in out.values()} == {"meta"} and out["logits"].shape == (2, 4, len(checkpoints.WORDS))
    if tensors:
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        sum(x.sum() for x in out.values()).backward()


def test_focus_draws_what_the_student_has_not_learned(teacher, tmp_path):
    """Half of a step in turn, so that all are seen; half by their gaps: a share of draws within four standard deviations of the share of the gap."""
    program, processor = captured()
    cache = Cache.build(program, processor, sources(pictures()), teacher, making_of(program, Settings(max_new_tokens=4)))
    trainer = Trainer([], lambda step: 0, {"learned.x": torch.nn.Parameter(torch.zeros(1))}, cache, Settings(batch=4, held_out=2, focus=0.5), tmp_path)
    count = len(trainer.train)
    assert sorted(n for step in range(count // 2) for n in trainer.draw(step)[:2]) == list(range(count))
    gap = np.arange(1.0, count + 1)
    trainer.gap[:] = gap
    share = gap / gap.sum()
    drawn = np.bincount([n for step in range(1000) for n in trainer.draw(step)[2:]], minlength=count)
    assert np.all(np.abs(drawn / 2000 - share) < 4 * np.sqrt(share * (1 - share) / 2000)), drawn
    trainer.gap[1:] = np.nan  # not seen yet: as far away as the others are on average
    assert np.ptp(np.bincount([n for step in range(1000) for n in trainer.draw(step)[2:]], minlength=count)) < 2000 / count


def test_focus_trains_the_student_that_is_furthest_most(teacher, tmp_path):
    """Half of the steps as planned, half by the gaps of the students, within four standard deviations; annealed steps always as planned."""
    program, processor = captured()
    cache = Cache.build(program, processor, sources(pictures()), teacher, making_of(program, Settings(max_new_tokens=4)))
    plan = lambda step: step % 3  # noqa: E731
    trainer = Trainer([], plan, {"learned.x": torch.nn.Parameter(torch.zeros(1))}, cache, Settings(batch=4, held_out=2, focus=0.5), tmp_path, served=2)
    trainer.far[:] = [0.1, 0.3]
    for turn, part in ((0, 0.5 + 0.5 * 0.25), (1, 0.5 * 0.25), (2, 0.0)):  # how often student 0 is trained where the plan says 0, 1, 2
        chosen = [trainer.choose(step) for step in range(turn, 6000, 3)]
        assert abs(chosen.count(0) / 2000 - part) <= 4 * np.sqrt(part * (1 - part) / 2000), (turn, chosen.count(0))
        assert turn < 2 or set(chosen) == {2}


@pytest.fixture(scope="module")
def batch_of_four(teacher, tmp_path_factory):
    """The curve of one process and one part."""
    return curve(train(teacher, tmp_path_factory.mktemp("one"), batch=4, focus=0.5).folder)


def test_accumulation_gives_the_same_curve(teacher, tmp_path, batch_of_four):
    """Parts are normalised by the whole batch; sums in another order differ by some 1e-7, six steps of Adam make that 1e-5."""
    two = train(teacher, tmp_path / "two", batch=4, accumulate=2, focus=0.5)
    np.testing.assert_allclose([l for _, l in batch_of_four], [l for _, l in curve(two.folder)], rtol=2e-4)


WORKER = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
import test_distill as T
T.train(sys.argv[1], __import__("pathlib").Path(sys.argv[2]), batch=4, focus=0.5)
"""


def test_two_processes_give_the_curve_of_one(teacher, tmp_path, batch_of_four):
    """Data parallel over accelerate (gloo on CPU). Tolerance 2e-4 of the loss: gradients are summed in another order, and Adam divides by their size."""
    here = Path(__file__).resolve()
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(paths=[str(here.parent), str(here.parents[1]), str(here.parents[2])]))
    port = 29500 + os.getpid() % 2000
    base = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    workers = [subprocess.Popen([sys.executable, str(script), str(teacher), str(tmp_path / "two")], env={**base, "RANK": str(r), "LOCAL_RANK": str(r)},
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for r in range(2)]
    said = [w.communicate(timeout=240)[0] for w in workers]
    assert [w.returncode for w in workers] == [0, 0], "\n".join(said)
    np.testing.assert_allclose([l for _, l in batch_of_four], [l for _, l in curve(tmp_path / "two")], rtol=2e-4)


def test_elastic_and_annealed_students_share_their_tensors(teacher, tmp_path):
    done = train(teacher, tmp_path / "run", "victor{registers=2,layer=1}", elastic=[2, 4], anneal=[2], steps=8)
    each = done.report["students"]
    assert set(each) == {"victor-2-1", "victor-4-1"} and done.report["agreement"] == pytest.approx(np.mean([*each.values()]))
    lines = [json.loads(l) for l in (done.folder / CURVE).read_text().splitlines()]
    names = [l["student"] for l in lines if "loss" in l]
    assert names[:3] == ["victor-2-2"] * 3 and set(names[3:]) == {"victor-2-1", "victor-4-1"}
    assert read_weights(done.weights)["learned.victor.registers"].shape == (4, 32)
    assert recipe.load(str(done.recipe)).steps[0].rewrite.table == 4


def test_vision_side_insertions_are_trained_through_their_own_encoder(tmp_path):
    """Fewer tokens per image than the teacher's, several numbers of them from one table; the loss falls and the engine takes the weights."""
    done = train(tmp_path / "teacher", tmp_path / "run", "matryoshka-mix{tokens=4}, lora{rank=2}", elastic=[4, 9], steps=16, lr=2e-2)
    losses = [loss for _, loss in curve(done.folder)]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    assert read_weights(done.weights)["learned.matryoshka-mix.weight"].shape == (1, 9, 16) and len(done.report["students"]) == 2
    model = foveate.optimize_model(str(checkpoints.tiny_llava()), str(done.recipe), weights=done.weights, output=tmp_path / "artifact")
    said = model.generate(pictures(1)[0][0], messages=[{"role": "user", "content": QUESTIONS[0]}], max_new_tokens=2)
    assert said.layouts[0].visual == 4


def test_stitching_runs_only_the_first_layers(teacher, tmp_path):
    """The first steps see hidden rows at layer 1 alone; the graph behind it is not run."""
    done = train(tmp_path / "teacher", tmp_path / "run", "victor{registers=4,layer=0}", stitch_layer=1, stitch_steps=3, steps=4)
    lines = [json.loads(l) for l in (done.folder / CURVE).read_text().splitlines()]
    assert [l["kl"] == 0 for l in lines if "loss" in l] == [True, True, True, False]
    view = training_view(captured()[0], (1,))
    short, full = (trainable(view["prefill"], [name]) for name in ("hidden.1", "logits"))
    assert len(short.module.graph.nodes) < 0.6 * len(full.module.graph.nodes)


def test_questions_alone_give_the_loss_of_packed_ones(teacher, tmp_path):
    packed, alone = train(teacher, tmp_path / "a", steps=2), train(teacher, tmp_path / "b", steps=2, packed=False)
    np.testing.assert_allclose([l for _, l in curve(packed.folder)], [l for _, l in curve(alone.folder)], rtol=2e-4)


def test_patience_stops_and_the_best_is_kept(teacher, tmp_path):
    done = train(teacher, tmp_path / "run", lr=0.0, rates={}, evaluate_every=1, patience=2, steps=6)
    assert done.report["steps"] == 3  # the first evaluation is the best; two more are not better


def test_exit_routers_learn_which_questions_need_their_image(teacher, tmp_path):
    """Separable labels are learned; the bias is set on held-out questions so that at least 95% of those that exit keep their answer."""
    from foveate.distill_exit import _fit, threshold

    done = train(teacher, tmp_path / "run", "exit-router{layers=[1,2],hidden=4}", steps=20)
    assert set(done.report["layers"]) == {1, 2} and done.report["questions"] == 24
    assert all(r["kept_answer"] is None or r["kept_answer"] >= 0.95 for r in done.report["layers"].values())
    assert {n.rsplit(".", 1)[1] for n in read_weights(done.weights)} == {"first", "second", "bias"}
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
    tensors = [torch.nn.Parameter(t) for t in (torch.randn(4, 6) * 0.4, torch.randn(1, 4) * 0.1, torch.zeros(1))]
    losses = _fit(x, x[:, 0] > 0, *tensors, Settings(steps=150, lr=3e-2))
    assert losses[-1] < 0.3 * losses[0]
    assert threshold(torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, True, False, True])) == 1.5
    assert threshold(torch.tensor([3.0, 2.0]), torch.tensor([False, True])) == 4.0


MARK = checkpoints.WORDS.index("p")


@pytest.mark.parametrize("until", ["image", MARK])
def test_a_context_is_compressed_where_its_rule_says(tmp_path, until):
    """The teacher reads the whole context, the student its latents: the loss falls, and the engine says what was trained."""
    program, processor = captured()
    end = "p " if until == MARK else ""
    data = [(p, q[:2], f"the image is red and blue . a b c the thing is a thing of colour {end}") for p, q in pictures(6)]
    done = foveate.distill(program, data, f"context-registers{{tokens=2,depth=1,until={until}}}", processor=processor, output=tmp_path / "run",
                           **{**TRAINING, "steps": 24, "lr": 2e-2, "rates": {}})
    losses = [loss for _, loss in curve(done.folder)]
    assert np.mean(losses[-4:]) < 0.9 * np.mean(losses[:4])
    model = foveate.optimize_model(str(checkpoints.tiny_llava()), str(done.recipe), weights=done.weights, output=tmp_path / "artifact")
    text = {"type": "text", "text": data[0][2]}
    chat = [{"role": "user", "content": [*[text] * (until == "image"), {"type": "image"}, *[text] * (until == MARK), {"type": "text", "text": QUESTIONS[0]}]}]
    said = model.generate(data[0][0], messages=chat, max_new_tokens=4)
    assert len(said.layouts[0].context) > 10
    student = pipeline.run(program.clone(), recipe.load(str(done.recipe)))
    load_weights(student, done.weights)
    feed = {n: torch.from_numpy(a) for n, a in model.session.encode(model.session.prepare(data[0][0], None, chat)).batch.feeds.items()}
    out = student["prefill"].run(feed)
    assert int(out["logits"].argmax()) == said.tokens[0][0]
    assert out["kv_lengths"][0].tolist() == [len(said.layouts[0].tokens)]  # what the cache holds: no token of the context


# ---- the cache


def test_the_cache_goes_on_and_knows_its_teacher(tmp_path, monkeypatch):
    program, processor = captured()
    making = making_of(program, Settings(max_new_tokens=4))
    data = sources(pictures(3))
    monkeypatch.setattr("foveate.distill_data.SHARD", 2)
    Cache.build(program, processor, data, tmp_path, making)
    kept = (tmp_path / "rows-00000.safetensors").stat().st_mtime_ns
    (tmp_path / "rows-00001.safetensors").unlink()
    cache = Cache.build(program, processor, data, tmp_path, making)
    assert (tmp_path / "rows-00000.safetensors").stat().st_mtime_ns == kept
    (row,) = cache.rows(2)
    assert [len(s.answer) <= 4 for s in row.segments] == [True] * 4
    row.logits[:, 4] = float("-inf")  # no answer brings an image
    assert torch.equal(row.logits.argmax(-1), torch.from_numpy(row.wanted))  # packed distributions agree with greedy decoding in the engine
    with pytest.raises(foveate.DistillError, match="was made with another making; choose another folder"):
        Cache.build(program, processor, data, tmp_path, replace(making, max_new_tokens=5))
    other = [*data[:2], replace(data[2], questions=tuple(QUESTIONS[::-1]))]
    with pytest.raises(foveate.DistillError, match="was made with another data; choose another folder"):
        Cache.build(program, processor, other, tmp_path, making)


def test_items_about_one_picture_are_one_source_and_pictures_stay_on_disk(tmp_path, monkeypatch):
    """So no picture is held out and trained on; memory holds neither the pictures of a data set nor the teacher's rows about them."""
    from foveate.runtime.datasets import Item, Turn

    opened = []
    real = Image.open
    monkeypatch.setattr("PIL.Image.open", lambda source, *a: opened.append(Path(source).name) or real(source, *a))
    for i, (picture, _) in enumerate(pictures(4)):
        picture.save(tmp_path / f"{i}.png")
    items = [Item(f"{i}-{q}", (tmp_path / f"{i}.png",), (Turn(q), Turn("never alone ?"))) for q in QUESTIONS[:3] for i in range(4)]
    data = sources(items)
    assert [s.questions for s in data] == [tuple(QUESTIONS[:3])] * 4 and not opened
    program, processor = captured()
    monkeypatch.setattr("foveate.distill_data.SHARD", 1)
    monkeypatch.setattr("foveate.distill_data.OPEN", 2)
    cache = Cache.build(program, processor, data, tmp_path / "cache", making_of(program, Settings(max_new_tokens=4)))
    assert opened == [f"{i}.png" for i in range(4)]  # once each, for all questions
    for i in (0, 3, 1, 2, 0):
        again = Cache(cache.folder, cache.making, cache.count)
        for mine, fresh in zip(cache.rows(i), again.rows(i), strict=True):
            assert torch.equal(mine.logits, fresh.logits) and all(torch.equal(f, fresh.features[n]) for n, f in mine.features.items())
            assert len(mine.segments) == 3
    assert cache._shard.cache_info().currsize == 2


# ---- refusals


@pytest.mark.parametrize(("text", "options", "error", "message"), [
    ("drop-random{layer=1,keep=4}", {}, foveate.DistillError, "recipe 'inline' inserts no trainable tensors; insertions are e.g. victor, lora"),
    ("victor{registers=17,layer=1}", {}, PassError, "victor: 17 registers are more than the 16 visual tokens of an image"),
    ("victor{registers=2,layer=1}", {"batch": 3, "accumulate": 2}, foveate.DistillError, "a batch of 3 cannot be divided into 2 parts on each of 1 processes"),
    ("victor{registers=2,layer=1}", {"stepz": 3}, foveate.DistillError, "no setting 'stepz', did you mean 'steps'"),
    ("victor{registers=2,layer=1}", {"steps": "many"}, foveate.DistillError, "distill: steps: input should be a valid integer.*got 'many'"),
    ("victor{registers=2,layer=1}", {"steps": 0}, foveate.DistillError, "steps is 0; it must be at least 1"),
    ("victor{registers=2,layer=1}", {"focus": 1.0}, foveate.DistillError, "focus is 1.0; it is a share of a step's rows, at least 0 and below 1"),
    ("victor{registers=2,layer=1}", {"precision": "int8"}, foveate.DistillError, "precision 'int8' is none of"),
    ("victor{registers=2,layer=1}", {"hidden_layers": [9]}, foveate.DistillError, r"no hidden states at layers \[9\]; this model has 0..2, and 3 for the end"),
    ("lora{rank=2}", {"elastic": [2]}, foveate.DistillError, "elastic needs a recipe with exactly one pass that has the parameter 'registers'; 'inline' has 0"),
])
def test_refuses_before_the_teacher_works(tmp_path, text, options, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "teacher", tmp_path / "run", text, **options)
    assert not (tmp_path / "teacher").exists()


@pytest.mark.parametrize(("data", "message"), [
    ([], "the data are empty"),
    ([((), ["what ?"])], r"1 of 1 entries have no picture \(first: number 0\)"),
    ([(Image.new("RGB", (8, 8)), ["a"]), (Image.new("RGB", (8, 8)), [])], r"1 of 2 entries have no question \(first: number 1\)"),
])
def test_data_that_cannot_teach(tmp_path, data, message):
    program, processor = captured()
    with pytest.raises(foveate.DistillError, match=message):
        foveate.distill(program, data, "victor{registers=2,layer=1}", processor=processor, output=tmp_path)


@pytest.mark.parametrize(("text", "context", "message"), [
    ("context-registers{tokens=2,depth=1}", [], r"2 of 2 entries have no context \(first: number 0\), and this recipe compresses one"),
    ("victor{registers=2,layer=1}", ["a b c"], r"2 of 2 entries have a context \(first: number 0\), and this recipe compresses none"),
    ("context-registers{tokens=2,depth=1,until=300}", ["a b c"], r"until=300 is no token that could end a text"),
    (f"context-registers{{tokens=2,depth=1,until={MARK}}}", ["a b c"], f"no token {MARK} ends the prefix of a prompt"),
])
def test_contexts_that_a_recipe_cannot_use(tmp_path, text, context, message):
    program, processor = captured()
    with pytest.raises((foveate.DistillError, PassError), match=message):
        foveate.distill(program, [(p, q, *context) for p, q in pictures(2)], text, processor=processor, output=tmp_path, **TRAINING)


def test_teacher_and_student_of_different_models(tmp_path):
    program, processor = captured()
    model, _ = load_model(str(checkpoints.tiny_llava()), dtype="auto", device="cpu")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    with pytest.raises(foveate.DistillError, match=r"teacher and student are different models \(llava with 3 layers of width 32 and llava"):
        foveate.distill(program, pictures(), "victor{registers=2,layer=1}", processor=processor, output=tmp_path, student=capture(model, processor))


def test_a_rewritten_teacher_is_refused(tmp_path):
    program, processor = captured()
    rewritten = pipeline.run(program.clone(), recipe.load("drop-random{layer=1,keep=4}"))
    with pytest.raises(foveate.DistillError, match="the teacher was rewritten by drop-random"):
        foveate.distill(rewritten, pictures(), "victor{registers=2,layer=2}", processor=processor, output=tmp_path)


def test_a_loss_that_is_not_a_number_stops_and_keeps_the_checkpoint(teacher, tmp_path, monkeypatch):
    real, count = Trainer._one, []

    def poisoned(self):
        count.append(1)
        if len(count) == 4:
            with torch.no_grad():
                next(iter(self.tensors.values())).fill_(float("nan"))
        return real(self)

    monkeypatch.setattr(Trainer, "_one", poisoned)
    with pytest.raises(foveate.DistillError, match=r"the loss is nan at step 4; training stopped and the last good checkpoint is .*state.pt; try a smaller lr"):
        train(teacher, tmp_path / "run")
    state = torch.load(tmp_path / "run" / STATE, weights_only=True)
    assert state["step"] == 2 and all(torch.isfinite(t).all() for t in state["tensors"].values())
    assert all(torch.isfinite(t).all() for t in read_weights(tmp_path / "run" / "weights.safetensors").values())  # of the evaluation after step 3


def test_an_optimized_model_needs_its_weights(tmp_path):
    with pytest.raises(PassError, match=r"recipe 'inline' inserts 1 learned tensors \(victor.registers, ...\) and no weights were given"):
        foveate.optimize_model(str(checkpoints.tiny_llava()), "victor{registers=2,layer=1}", output=tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_the_command_line(tmp_path, capsys, monkeypatch):
    """distill on a data set's folder, then exits; a wrong setting is one sentence and exit code 2."""
    from foveate.cli import execute

    data = tmp_path / "data"
    data.mkdir()
    lines = []
    for i, (picture, questions) in enumerate(pictures(4)):
        picture.save(data / f"{i}.png")
        lines.append(json.dumps({"number": i, "picture": f"{i}.png", "asked": questions[i], "answer": "never read"}))
    (data / "rows.jsonl").write_text("\n".join(lines))
    mapping = tmp_path / "mapping.yaml"
    mapping.write_text("{id: number, image: picture, question: asked, answer: answer}")
    data = ["-d", str(data / "rows.jsonl"), "--mapping", str(mapping)]
    options = [x for k, v in TRAINING.items() for x in ("--option", f"{k}={v}")]
    command = ["distill", str(checkpoints.tiny_llava()), "-r", "victor{registers=2,layer=1}", "--set", "layer=2", *data, "-o", str(tmp_path / "run")]
    assert execute([*command, *options, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["steps"] == 6 and Path(said["weights"]).is_file() and "layer: 2" in Path(said["recipe"]).read_text()
    assert execute([*command, "--option", "stepz=1"]) == 2
    assert "no setting 'stepz'" in capsys.readouterr().err
    assert execute([*command, "--dtype", "float16"]) == 2
    assert "--dtype float16: it is none of float32, bfloat16" in capsys.readouterr().err
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert execute([*command, "--device", "cuda"]) == 2
    assert "--device cuda: possible are cpu; torch sees no CUDA devices here" in capsys.readouterr().err
    assert execute(["exits", str(checkpoints.tiny_llava()), *data, "--limit", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["questions"] == 2


def test_calibration_recommends_a_layer():
    from foveate.distill_calibrate import calibrate

    program, processor = captured()
    found = calibrate(program, processor, pictures(4), settings=Settings(max_new_tokens=4), task="reading", share=0.01)
    assert list(found.agreement) == [0, 1, 2] and found.questions == 16 and found.budget == 8
    assert found.untrained == next((l for l in found.agreement if all(found.agreement[m] >= 0.01 for m in found.agreement if m >= l)), None)
    assert found.kl[0] > found.kl[2] > 0 and "layer  agreement" in str(found)
    with pytest.raises(foveate.DistillError, match="no task class 'cooking'; there are reasoning"):
        calibrate(program, processor, pictures(1), task="cooking")
