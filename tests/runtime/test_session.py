"""The session against an engine that can be followed by hand."""

import subprocess
import sys

import numpy as np
import pytest
from fakes import EOS, IMAGE, PER_IMAGE, Engine, Processor, manifest
from PIL import Image

from foveate.runtime.errors import NumberError, RunError
from foveate.runtime.result import cached_rows
from foveate.runtime.session import Session


def red(value: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    return Image.new("RGB", size, (value, 0, 0))


def session(engine: Engine | None = None, generation: dict | None = None, **facts: object) -> Session:
    return Session(engine or Engine(), Processor(), manifest(**facts), generation)


def test_one_picture_one_prompt():
    engine = Engine()
    result = session(engine).generate(red(10), "<image> what is this ?", max_new_tokens=8)
    # features: 6 rows of 10 / 10 -> 6, 6 % 5 + 5 = 6; decode counts 7, 8, 9, 10, end
    assert result.tokens[0].tolist() == [6, 7, 8, 9, 10, EOS]
    assert result.text == "is this and ? w10"
    assert [c[1] for c in engine.calls if c[0] == "decode"] == [[6], [7], [8], [9], [10]]


def test_positions_of_generated_tokens_follow_the_prompt():
    engine = Engine()
    result = session(engine).generate(red(10), "<image> what is this ?", max_new_tokens=3)
    prompt = len(result.layouts[0].tokens)
    assert prompt == 1 + PER_IMAGE + 4
    assert [c[2] for c in engine.calls if c[0] == "decode"] == [[prompt], [prompt + 1]]


def test_padding_is_on_the_right_and_length_is_text_plus_visual():
    engine = Engine()
    session(engine).generate([[red(10), red(20)], red(30)], ["<image> <image> what ?", "<image> what is this and this ?"], max_new_tokens=1)
    feeds = engine.calls[1][1]
    text, visual = 1 + 6, 2 * PER_IMAGE
    assert feeds["input_ids"].shape == (2, text + visual)
    assert feeds["image_features"].shape == (2, visual, 4)
    assert feeds["attention_mask"].sum(1).tolist() == [1 + 12 + 2, 1 + 6 + 6]
    assert (np.diff(feeds["attention_mask"], axis=1) <= 0).all(), "valid rows are a prefix"
    assert feeds["image_features"][0, :, 0].tolist() == [10.0] * 6 + [20.0] * 6
    assert feeds["image_features"][1, :, 0].tolist() == [30.0] * 6 + [0.0] * 6
    assert (feeds["input_ids"] == IMAGE).sum(1).tolist() == [12, 6]


def test_a_batch_answers_as_its_samples_do():
    prompts, pictures = ["<image> what ?", "<image> what is this ?", "what is this ?"], [red(10), red(30), None]
    batch = session().generate(pictures, prompts, max_new_tokens=6)
    single = [session().generate(i, p, max_new_tokens=6).tokens[0].tolist() for i, p in zip(pictures, prompts, strict=True)]
    assert [t.tolist() for t in batch.tokens] == single


def test_a_finished_sample_waits_for_the_others():
    engine = Engine()
    result = session(engine).generate([red(40), red(30)], ["<image> a", "<image> b"], max_new_tokens=9)
    assert [t.tolist() for t in result.tokens] == [[9, 10, EOS], [8, 9, 10, EOS]]
    assert engine.calls[-1][1] == [EOS, 10]  # no pad token is known here, so the end token fills


def test_empty_visual_rows_up_to_what_the_program_needs():
    engine = Engine()
    session(engine, min_visual=20).generate(red(10), "<image> what ?", max_new_tokens=1)
    feeds = engine.calls[1][1]
    assert feeds["image_features"].shape[1] == 20 and feeds["input_ids"].shape[1] == 3 + 20
    assert not feeds["image_features"][0, PER_IMAGE:].any()


def test_text_alone_skips_the_vision_stage():
    engine = Engine()
    result = session(engine).generate(None, "what is this ?", max_new_tokens=2)
    assert [c[0] for c in engine.calls] == ["prefill", "decode"]
    assert result.pictures == ((),)
    with pytest.raises(RunError, match="no picture"):
        result.overlay("x.png")


def test_a_reduction_before_the_prompt_shortens_it():
    engine = Engine(keep=2)
    result = session(engine, features_per_image=2).generate([red(10), red(20)], "<image> what <image> ?", max_new_tokens=1)
    layout = result.layouts[0]
    assert layout.tokens.tolist() == [1, IMAGE, IMAGE, 5, IMAGE, IMAGE, 9]
    assert layout.positions.tolist() == list(range(7))
    assert [p.kept["vision"].tolist() for p in result.pictures[0]] == [[4, 5], [4, 5]]
    assert engine.calls[1][1]["image_features"][0, :4, 0].tolist() == [10.0, 10.0, 20.0, 20.0]


def test_kept_tokens_belong_to_their_pictures():
    result = session(Engine(kept=True)).generate([red(10), red(20)], "<image> what <image> ?", max_new_tokens=1)
    first, second = result.pictures[0]
    assert first.kept["layer2"].tolist() == [0]
    assert second.kept["layer2"].tolist() == [1, 5]  # ranks 7 and 11 of 12
    assert result.kept["kept.layer2"].tolist() == [[0, 7, 11, -1]]


def test_kept_tokens_map_through_an_earlier_reduction():
    result = session(Engine(keep=4, kept=True), features_per_image=4).generate([red(10), red(20)], "<image> what <image> ?", max_new_tokens=1)
    first, second = result.pictures[0]
    assert first.kept["layer2"].tolist() == [2]  # rank 0 of the kept 2, 3, 4, 5
    assert second.kept["layer2"].tolist() == [5]  # rank 7 is the last of the second picture; 11 does not exist any more


def test_messages_go_through_the_chat_template():
    engine = Engine()
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this ?"}]}]
    a = session(engine).generate(red(10), messages=turns, max_new_tokens=2)
    content = [{"type": "image", "image": red(10)}, {"type": "text", "text": "what is this ?"}]
    b = session().generate(messages=[{"role": "user", "content": content}], max_new_tokens=2)
    c = session().generate(red(10), messages=[{"role": "user", "content": "what is this ?"}], max_new_tokens=2)
    assert a.layouts[0].tokens.tolist() == b.layouts[0].tokens.tolist() == c.layouts[0].tokens.tolist()
    assert a.layouts[0].visual == PER_IMAGE


def test_a_fixed_picture_count_runs_several_times():
    engine = Engine()
    s = session(engine)
    s.manifest["components"]["vision"]["inputs"][0]["shape"][0] = 1
    result = s.generate([red(10), red(20), red(30)], "<image> <image> <image> ?", max_new_tokens=1)
    assert [c[1]["pixel_values"] for c in engine.calls[:3]] == [(1, PER_IMAGE, 3)] * 3
    assert result.layouts[0].visual == 18


def test_streaming_gives_the_text_in_pieces():
    pieces: list[str] = []
    result = session().generate(red(10), "<image> what ?", max_new_tokens=4, streamer=pieces.append)
    assert len(pieces) == 4 and "".join(pieces) == result.text


def test_sampling_is_reproducible_and_greedy_is_its_limit():
    s = session()
    greedy = s.generate(red(10), "<image> what ?", max_new_tokens=6).tokens[0].tolist()
    cold = s.generate(red(10), "<image> what ?", max_new_tokens=6, do_sample=True, temperature=0.01, seed=1).tokens[0].tolist()
    hot = [s.generate(red(10), "<image> what ?", max_new_tokens=6, do_sample=True, temperature=5.0, seed=n).tokens[0].tolist() for n in (1, 1, 2)]
    assert cold == greedy
    assert hot[0] == hot[1] != hot[2]
    assert s.generate(red(10), "<image> what ?", max_new_tokens=6, do_sample=True, top_k=1, temperature=5.0).tokens[0].tolist() == greedy


def test_saved_generation_values_are_the_defaults():
    s = session(generation={"max_new_tokens": 2, "pad_token_id": 0, "suppress_tokens": [7]})
    result = s.generate(red(10), "<image> what ?")
    assert len(result.tokens[0]) == 2
    assert 7 not in result.tokens[0].tolist()


def test_timings_add_up():
    t = session().generate(red(10), "<image> what ?", max_new_tokens=4).timings
    assert len(t.decode_ms) == 3
    assert t.total_ms == pytest.approx(t.ttft_ms + sum(t.decode_ms))
    assert t.ttft_ms >= t.encoder_ms + t.prefill_ms > 0


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(images=red(1), prompt="what ?"), r"no image placeholder, but 1 image\(s\) were given; write '<image>'"),
    (dict(images=None, prompt="<image> what ?"), r"cannot take this prompt with 0 image"),
    (dict(images=[red(1)], prompt="<image> <image> ?"), r"2 placeholders, 1 pictures"),
    (dict(images=red(1)), "neither prompt and messages"),
    (dict(images=red(1), prompt="a", messages=[{"role": "user", "content": "a"}]), "both prompt and messages"),
    (dict(images=[red(1)], prompt=["<image> a", "<image> b"]), "2 prompts but 1 for images"),
    (dict(images="nowhere.png", prompt="<image> a"), "no file nowhere.png"),
    (dict(images="http://host/x.png", prompt="<image> a"), "is a URL"),
    (dict(images=Image.new("I;16", (4, 4)), prompt="<image> a"), r"mode 'I;16' cannot be taken; possible: 8-bit modes"),
    (dict(images=np.zeros((4, 4, 3)), prompt="<image> a"), r"array float64\[4, 4, 3\] cannot be taken"),
    (dict(images=np.zeros((0, 4, 3), np.uint8), prompt="<image> a"), "has no pixels"),
    (dict(images=7, prompt="<image> a"), "cannot take a int"),
    (dict(images=red(1), prompt="<image> a", max_new_tokens=0), "max_new_tokens is 0"),
    (dict(images=red(1), prompt="<image> a", temprature=2.0), "no option 'temprature', did you mean 'temperature'"),
    (dict(images=red(1), prompt="<image> a", do_sample=True, temperature=-1.0), "temperature=-1.0 is not possible"),
    (dict(images=[red(1), red(1)], prompt=["<image> a", "<image> b"], streamer=print), "one prompt at a time"),
])
def test_bad_requests_get_one_sentence(arguments, message):
    with pytest.raises(RunError, match=message) as caught:
        session().generate(**{"max_new_tokens": 1, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK", "LA"])
def test_eight_bit_modes_are_converted(mode):
    assert session().generate(Image.new(mode, (5, 7)), "<image> what ?", max_new_tokens=1).tokens


def test_a_damaged_picture(tmp_path):
    path = tmp_path / "x.png"
    red(5, (64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(RunError, match="cannot be read as a picture"):
        session().generate(path, "<image> a")
    path.write_text("no picture")
    with pytest.raises(RunError, match="cannot be read as a picture"):
        session().generate(path, "<image> a")


def test_a_picture_of_a_geometry_that_was_not_captured():
    s = session()
    s.manifest["components"]["vision"]["inputs"][0]["shape"][1] = 9
    with pytest.raises(RunError, match=r"pixel_values became \[1, 6, 3\], this artifact was built for \['images', 9, 3\]"):
        s.generate(red(1), "<image> a")


def test_importing_the_runtime_needs_no_torch():
    code = "import sys, foveate.runtime.session, foveate.runtime.overlay; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_picture_of_another_shape_with_as_many_patches():
    s = session(geometry={"image_sizes": [8, 12]})

    class Sizes(Processor):
        def __call__(self, text, images=None, return_tensors="np"):
            out = super().__call__(text, images, return_tensors)
            return {**out, "image_sizes": np.array([[p.height, p.width] for p in images[0]])}

    s.processor = Sizes()
    assert s.generate(red(10, (12, 8)), "<image> a", max_new_tokens=1).tokens
    with pytest.raises(RunError, match=r"a picture of size \(8, 12\) has image_sizes \[12, 8\], this artifact was captured for \[8, 12\]"):
        s.generate(red(10, (8, 12)), "<image> a", max_new_tokens=1)


class Broken(Engine):
    """Logits with `value` in them, from call `at` on (0 is the prefill)."""

    def __init__(self, at, value):
        super().__init__()
        self.at, self.value, self.step = at, value, 0

    def spoil(self, logits):
        if self.step >= self.at:
            logits[..., 3] = self.value
        self.step += 1
        return logits

    def prefill(self, feeds, capacity):
        out, cache = super().prefill(feeds, capacity)
        return {**out, "logits": self.spoil(out["logits"])}, cache

    def decode(self, cache, input_ids, position_ids):
        return self.spoil(super().decode(cache, input_ids, position_ids))


@pytest.mark.parametrize(("at", "stage"), [(0, "prefill"), (2, "decode step 2")])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(at, stage, value):
    with pytest.raises(NumberError, match=f"{stage}: 1 of 16 logits are NaN or infinite, so no token can be chosen; `foveate bisect`") as caught:
        session(Broken(at, value)).generate(red(10), "<image> what ?", max_new_tokens=5)
    assert caught.value.exit_code == 3


def test_a_banned_token_is_no_broken_number():
    assert session(Broken(0, -np.inf)).generate(red(10), "<image> what ?", max_new_tokens=5).text


class Steered(Engine):
    """A vision stage that takes a text vector and a saliency map and adds their sums to the features."""

    def vision(self, feeds):
        self.seen = {k: v for k, v in feeds.items() if k != "pixel_values"}
        return super().vision({"pixel_values": feeds["pixel_values"] + feeds["text"].sum(1)[:, None, None]})


def steered():
    s = session(Steered(), vision_extra=["text", "saliency"])
    s.manifest["components"]["vision"]["inputs"] += [
        {"name": "text", "dtype": "float32", "shape": ["images", 2]},
        {"name": "saliency", "dtype": "float32", "shape": ["images", PER_IMAGE]},
    ]
    return s


def test_extra_inputs_reach_the_vision_stage():
    s, saliency = steered(), np.arange(2 * PER_IMAGE).reshape(2, PER_IMAGE)
    plain = session().generate([red(10), red(30)], "<image> what <image> ?", max_new_tokens=1).tokens[0]
    made = s.generate([red(10), red(30)], "<image> what <image> ?", extra={"text": [1.0, 2.0], "saliency": saliency}, max_new_tokens=1)
    assert s.engine.seen["text"].tolist() == [[1, 2], [1, 2]] and s.engine.seen["text"].dtype == np.float32  # one row for both pictures
    assert s.engine.seen["saliency"].tolist() == saliency.tolist()
    assert made.tokens[0].tolist() != plain.tolist()
    s.generate([red(10), None], ["<image> what ?", "what ?"], extra={"text": np.ones((1, 2)), "saliency": saliency[0]}, max_new_tokens=1)
    assert s.generate(None, "what ?", max_new_tokens=1).tokens, "text alone needs no extra input"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, r"needs extra=\{'text': array of shape \['images', 2\]\}, which no processor makes"),
        ({"text": [1, 2]}, r"needs extra=\{'saliency'"),
        ({"txt": [1, 2]}, r"no extra inputs \['txt'\]; it takes \['text', 'saliency'\]"),
        ({"text": [1, 2, 3]}, r"extra\['text'\] is \[3\]; 1 picture\(s\) need \[1, 2\] or one row \[2\]"),
        ({"text": np.ones((3, 2))}, r"extra\['text'\] is \[3, 2\]"),
        ({"text": [1, np.nan]}, "must be finite numbers"),
        ({"text": ["a", "b"]}, "must be finite numbers"),
    ],
)
def test_extra_inputs_that_do_not_fit(extra, message):
    with pytest.raises(RunError, match=message):
        steered().generate(red(10), "<image> a", extra=extra, max_new_tokens=1)
    with pytest.raises(RunError, match=r"no extra inputs \['text'\]; it takes none"):
        session().generate(red(10), "<image> a", extra={"text": [1]}, max_new_tokens=1)


def test_cached_rows_are_those_of_all_partitions():
    lengths = {"kv_lengths": np.array([[1, 1], [5, 3]]), "kv_lengths.lo": np.array([[4, 2], [0, 0]]), "logits": np.zeros(3)}
    assert cached_rows(lengths).tolist() == [[5, 3], [5, 3]]
    assert cached_rows({"logits": np.zeros(3)}) is None
