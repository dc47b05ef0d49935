"""The committed checkpoint is an ordinary transformers model, and it reads the picture."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pytest
import torch

from examples.testbed import ablate, evaluate, make_data, scenes
from examples.testbed.text_tower import TextTower

pytestmark = pytest.mark.skipif(not (evaluate.CHECKPOINT / "config.json").exists(), reason="no trained checkpoint in this checkout")


@pytest.fixture(scope="module")
def loaded():
    return evaluate.load(evaluate.CHECKPOINT)


def test_it_is_a_small_llava_with_grouped_queries(loaded):
    model, processor = loaded
    vision, text = model.config.vision_config, model.config.text_config
    assert type(model).__name__ == "LlavaForConditionalGeneration" and type(processor).__name__ == "LlavaProcessor"
    assert text.num_hidden_layers >= 8 and vision.num_hidden_layers >= 4
    assert text.num_key_value_heads < text.num_attention_heads
    assert model.config.vision_feature_layer == -2 and model.config.vision_feature_select_strategy == "default"
    assert sum(f.stat().st_size for f in evaluate.CHECKPOINT.rglob("*.safetensors")) <= 16e6


def test_the_chat_template_round_trips(loaded):
    _, processor = loaded
    item = next(i for i in make_data.items("val") if i.slice == "two_turn")
    text = processor.apply_chat_template(evaluate.messages(item, [item.turns[0].answer]), tokenize=False, add_generation_prompt=True)
    first, second = item.turns
    assert text == f"<image> {first.question} {first.answer} </s> {second.question}"
    ids = processor(images=item.images, text=text, return_tensors="pt")["input_ids"][0]
    assert (ids == processor.image_token_id).sum() == 144 and ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.unk_token_id not in ids
    rest = processor.tokenizer.decode(ids[145:])
    assert rest.split() == text.removeprefix("<image> ").split()


def test_two_pictures_are_joined_by_and(loaded):
    _, processor = loaded
    item = next(i for i in make_data.items("val") if i.slice == "multi_image")
    text = processor.apply_chat_template(evaluate.messages(item, []), tokenize=False)
    assert text == f"<image> and <image> {item.turns[0].question}"
    assert (processor(images=item.images, text=text, return_tensors="pt")["input_ids"] == processor.image_token_id).sum() == 288


def test_it_answers_and_is_blind_without_the_picture(loaded):
    items = list(make_data.items("val", 54))
    right, blind = (evaluate.summary(evaluate.mark(items, evaluate.answer(*loaded, items, blank=blank)))["overall"]
                    for blank in (None, evaluate.mean_image()))
    assert right >= 0.85                                # the card says 95%; four standard errors of 54 items below
    assert blind <= 0.45


def test_teacher_forcing_agrees_with_generate(loaded):
    model, processor = loaded
    items = list(make_data.items("val", 36))
    said = evaluate.mark(items, evaluate.answer(model, processor, items))
    forced = {}
    with torch.no_grad():
        for batch in ablate.batches(items, processor, 19):
            forced |= zip([i.id for i in batch.items], batch.marks(model(**batch.inputs).logits), strict=True)
    for name, scores in said.items():
        if name != "two_turn":                          # there the second turn follows the true first answer
            assert scores == [forced[i.id] for i in items if i.slice == name], name


def test_keeping_everything_changes_nothing(loaded):
    model, processor = loaded
    batch = next(ablate.batches(list(make_data.items("val", 8)), processor, 8))
    with torch.no_grad():
        want = model(**batch.inputs).logits
        with ablate.selecting(model, batch, 2, lambda scores: torch.ones_like(batch.visual)):
            got = model(**batch.inputs).logits
    real = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-4, rtol=1e-4)     # f32 through 8 layers, another attention kernel


def test_the_text_tower_finds_what_a_question_is_about(loaded):
    _, processor = loaded
    tower, hits = TextTower.load(evaluate.CHECKPOINT), []
    for i in range(24):
        picture = scenes.scene(np.random.default_rng([8, i]), "val")
        thing = picture.things[i % len(picture.things)]
        pixels = processor.image_processor(images=picture.pixels, return_tensors="pt")["pixel_values"]
        said = f"what is below the {scenes.COLORS[thing.color]} {scenes.KINDS[thing.kind]} ?"
        best = int(tower.patches(pixels, [said])[0].argmax())
        hits.append(picture.labels[0].flatten()[best] == thing.kind + 1 and picture.labels[1].flatten()[best] == thing.color + 1)
    assert sum(hits) >= 18
