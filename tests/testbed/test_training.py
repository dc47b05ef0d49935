"""The lean training pass is the model transformers runs, and a killed run goes on from its last save."""

import numpy as np
import pytest
import torch

from examples.testbed import batches, export, model, train, words
from examples.testbed.questions import TYPES
from examples.testbed.workers import Layout, Shared, orthogonal


@pytest.fixture(scope="module")
def bed():
    return model.Testbed().eval()


def torches(batch):
    return {k: torch.from_numpy(v) for k, v in batch.items()}


@pytest.mark.parametrize("images", [1, 2])
@torch.no_grad()
def test_the_lean_pass_is_the_hugging_face_pass(bed, images):
    b = torches(batches.joint_batch(np.random.default_rng(1), 1, batches.weights(np.zeros(len(TYPES))), images=images, room=60))
    n = int((b["segment"][0] == 0).sum())               # the first conversation: the others must not touch it
    features, _, _ = model.look(bed, b["pixels"])
    lean = bed.vlm.lm_head(model.talk(bed, features[:, 1:], images, b["ids"], b["segment"], b["offset"]))[:, :n]
    picture = [words.IMAGE] * 144
    prefix = [words.BOS, *picture, *([words.ID["and"], *picture] if images == 2 else [])]
    ids = torch.tensor([prefix + b["ids"][0, :n].tolist()])
    pixels = b["pixels"].permute(0, 3, 1, 2).float() / 127.5 - 1
    full = bed.vlm(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids)).logits[:, -n:]
    torch.testing.assert_close(lean, full, atol=1e-5, rtol=1e-4)        # f32, another order of sums


@torch.no_grad()
def test_the_last_vision_layer_is_clips(bed):
    pixels = torches(batches.vision_batch(np.random.default_rng(1), 2))["pixels"]
    penultimate, last, _ = model.look(bed, pixels, last=True)
    states = bed.vision(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1, output_hidden_states=True).hidden_states
    torch.testing.assert_close(penultimate, states[-2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last, states[-1], atol=1e-5, rtol=1e-4)


def test_orthogonal_has_singular_values_near_one():
    for shape in ((2, 64, 128), (2, 128, 64)):
        s = torch.linalg.svdvals(orthogonal(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert s.min() > 0.5 and s.max() < 1.3          # five Newton-Schulz steps with these coefficients reach 0.7 to 1.2


def test_the_layout_covers_every_parameter_once(bed):
    layout = Layout(bed)
    assert sorted(layout.names) == sorted(n for n, _ in bed.named_parameters())
    assert layout.size == sum(p.numel() for p in bed.parameters())


def run(tmp_path, *options):
    args = train.arguments(["--out", str(tmp_path), "--device", "cpu", "--vision-batch", "2", "--vision-micros", "1", "--joint-batch", "1",
                            "--joint-micros", "2", "--keep-batch", "2", "--log", "1", "--save", "1", "--evaluate", "1000", *options])
    trainer = train.Trainer(args, Shared(Layout(model.Testbed()).size, 1), 0)
    return trainer


def test_training_resumes_at_its_last_save_and_exports(tmp_path):
    first = run(tmp_path, "--vision-steps", "2", "--joint-steps", "2")
    first.after, saved = stop_after(first, 1), tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert saved.exists()
    again = run(tmp_path, "--vision-steps", "2", "--joint-steps", "2")
    assert again.phase == "vision" and int(again.shared.state[2]) == 1
    torch.testing.assert_close(again.shared.param, first.shared.param, atol=0, rtol=0)
    again.evaluate = lambda phase: None                 # 192 pictures: not the point here
    again.run()
    assert (tmp_path / "checkpoint" / "model.safetensors").exists()
    restored = export.restore(saved, "small")
    torch.testing.assert_close(restored.vlm.lm_head.weight, again.bed.vlm.lm_head.weight, atol=0, rtol=0)


def stop_after(trainer, step):
    def after(phase, now, steps, norm):
        type(trainer).after(trainer, phase, now, steps, norm)
        if now == step:
            raise KeyboardInterrupt
    return after
