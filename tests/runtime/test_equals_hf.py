"""An unreduced artifact answers token for token as Hugging Face `generate` does."""

import numpy as np
import pytest
import torch
from checkpoints import SIDE, tiny_llava
from PIL import Image

from foveate import load, optimize_model

PROMPTS = ["<image> what is this ?", "<image> red thing and <image> blue thing ?", "what is a thing ?", "<image> is this green ? <image> and <image> a b c ?"]


def pictures(count: int, seed: int) -> list[Image.Image]:
    """Structured noise: bright blobs at random places, sizes other than the model's own."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(count):
        small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        out.append(Image.fromarray(small).resize((int(rng.integers(20, 70)), SIDE), Image.Resampling.NEAREST))
    return out


@pytest.fixture(scope="module", params=["eager", "ort"])
def session(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "artifact"
    optimize_model(tiny_llava(), target=request.param, output=path)
    with load(path) as session:
        yield session


@pytest.fixture(scope="module")
def hf():
    import transformers as T

    folder = tiny_llava()
    return T.LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval(), T.AutoProcessor.from_pretrained(folder)


def reference(hf, batch: list[tuple[str, list[Image.Image]]], steps: int) -> list[list[int]]:
    """HF's tokens of each sample, cut behind the end token."""
    model, processor = hf
    images = [i for _, own in batch for i in own]
    inputs = processor(text=[p for p, _ in batch], images=images or None, return_tensors="pt", padding=True)
    with torch.no_grad():
        made = model.generate(**inputs, max_new_tokens=steps, do_sample=False)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(2) + 1] if 2 in row else row for row in made]


@pytest.mark.parametrize("chosen", [[0], [1], [2], [3], [0, 1], [3, 0, 1], [1, 2, 0]])
def test_tokens_equal_hf(session, hf, chosen):
    batch = [(PROMPTS[i], pictures(PROMPTS[i].count("<image>"), seed=10 * i + len(chosen))) for i in chosen]
    want = reference(hf, batch, 12)
    assert len({tuple(w) for w in want}) == len(want), "samples must differ, or the test proves nothing"
    result = session.generate([own for _, own in batch], [p for p, _ in batch], max_new_tokens=12)
    assert [t.tolist() for t in result.tokens] == want


def test_the_picture_decides(session):
    a, b = (session.generate(pictures(1, seed), PROMPTS[0], max_new_tokens=12).tokens[0].tolist() for seed in (1, 2))
    assert a != b


def test_penalties_equal_hf(session, hf):
    model, processor = hf
    (picture,) = pictures(1, 5)
    inputs = processor(text=PROMPTS[0], images=picture, return_tensors="pt")
    with torch.no_grad():
        want = model.generate(**inputs, max_new_tokens=12, do_sample=False, repetition_penalty=1.8, no_repeat_ngram_size=2)
    got = session.generate(picture, PROMPTS[0], max_new_tokens=12, repetition_penalty=1.8, no_repeat_ngram_size=2)
    made = want[0, inputs["input_ids"].shape[1] :].tolist()
    assert got.tokens[0].tolist() == (made[: made.index(2) + 1] if 2 in made else made)


def test_a_reduced_artifact_reports_what_it_kept(tmp_path):
    done = optimize_model(tiny_llava(), recipe="drop-uniform{layer=1,keep=4}", target="ort", output=tmp_path / "artifact")
    result = done.generate(pictures(2, 3), PROMPTS[1], max_new_tokens=3)
    kept = result.kept["kept.layer1"]
    assert kept.shape == (1, 4) and (kept >= 0).all()
    assert result.kv_rows[:, 0].tolist() == [len(result.layouts[0].tokens)] + [len(result.layouts[0].tokens) - 32 + 4] * 2
    assert sum(len(p.kept["layer1"]) for p in result.pictures[0]) == 4
    assert done.report.after.prefill_flops < done.report.before.prefill_flops
