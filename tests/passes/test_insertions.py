"""Every insertion: it starts as what its docstring says, its gradient is right, its loss falls, and it lowers to ONNX Runtime."""

from __future__ import annotations

import functools

import checkpoints
import numpy as np
import onnxruntime
import pytest
import torch

from foveate.export.to_onnx import to_onnx
from foveate.graph.capture import capture
from foveate.graph.families import load_model
from foveate.graph.probe import probe
from foveate.graph.verify import verify
from foveate.passes import pipeline, recipe
from foveate.passes.base import PassError, discover
from foveate.passes.insert import Insertion, learned, settle, share

CASES = {  # on a tiny LLaVA: 4 x 4 patches of 32 channels, 3 decoder layers of width 32, 2 vision layers
    "victor": "victor{registers=4,layer=1}",
    "lora": "lora{rank=2}",
    "space-to-depth": "space-to-depth{side=2}",
    "matryoshka-mix": "matryoshka-mix{tokens=4,groups=2}",
    "conv-downsample": "conv-downsample{side=2}",
    "query-pool": "query-pool{side=2}",
    "meta-tokens": "meta-tokens{tokens=4,layer=0}",
    "prefusion": "prefusion{registers=2,layer=1}",
    "exit-router": "exit-router{layers=[1,2],hidden=4}",
    "layer-expert": "layer-expert{layers=[1],keep=4}",
    "context-registers": "context-registers{tokens=2,depth=1}",
}
ALL = [n for n, p in discover().items() if issubclass(p, Insertion)]


@functools.cache
def model():
    loaded, processor = load_model(str(checkpoints.tiny_llava()), dtype="auto", device="cpu")
    program = capture(loaded, processor)
    for _, tensor in program.parameters():
        tensor.requires_grad_(False) if tensor.is_floating_point() else None
    return program


@functools.cache
def _built(name):
    return pipeline.run(model().clone(), recipe.load(CASES[name]))


@pytest.fixture(params=ALL)
def method(request):
    assert request.param in CASES, f"{request.param} has no case here: one line in CASES"
    return request.param


def pixels(seed=0):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def run(program, seed=0):
    """Both stages on random pictures and prompts -> logits[2, V]"""
    each = program.facts.visual_per_image
    feed = probe(program, text=(5, 7), images=(1, 1), seed=seed)
    seen = program["vision"].run({"pixel_values": pixels(seed)})["image_features"]
    return program["prefill"].run(feed | {"image_features": seen.view(2, each, -1)})["logits"]


def scores(program):
    """What the exit routers say, by layer."""
    feed = probe(program, text=(5, 7), images=(1, 1))
    return {n: x for n, x in program["prefill"].run(feed).items() if n.startswith("exit.")}


def test_is_verified_and_learns_something(method):
    program = _built(method)
    verify(program)
    assert learned(program) and all(n.startswith(f"learned.{method}.") for n in learned(program))


def test_loss_falls_in_a_few_steps(method):
    """Against what the model says with all its tokens: 8 steps of Adam on one batch take off at least 3%."""
    if method == "exit-router":
        pytest.skip("an exit router decides, it does not mix; tests/distill trains it by its own objective")
    program, teacher = _built(method).clone(), model()
    tensors = {n: t for n, t in learned(program).items()}
    saved = {n: t.detach().clone() for n, t in tensors.items()}
    with torch.no_grad():
        want = run(teacher).log_softmax(-1)
        if method == "lora":
            want = want.roll(1, -1)  # it starts as the model itself, so give it something to do
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam(list(tensors.values()), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        got = run(program).log_softmax(-1)
        loss = (want.exp() * (want - got)).sum(-1).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        for n, t in tensors.items():
            t.copy_(saved[n])
            t.requires_grad_(False)
    assert min(losses[-3:]) < 0.97 * losses[0], losses


def test_gradient_equals_a_finite_difference(method):
    """Along the gradient itself, the steepest direction: float32 sums leave about 1e-3 of it."""
    program = _built(method).clone()
    tensors = learned(program)
    saved = {n: t.detach().clone() for n, t in tensors.items()}
    weight = torch.randn(2, model().facts.vocab_size, generator=torch.Generator().manual_seed(3))
    value = (lambda: sum(scores(program).values()).double().sum()) if method == "exit-router" else (lambda: (run(program).double() * weight).sum())
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    grads = torch.autograd.grad(value(), list(tensors.values()), allow_unused=True)
    assert any(g is not None and g.abs().max() > 0 for g in grads)
    size = torch.sqrt(sum(g.square().sum() for g in grads if g is not None))
    found = []
    with torch.no_grad():
        for step in (1e-3, -1e-3):
            for (n, t), g in zip(tensors.items(), grads, strict=True):
                t.copy_(saved[n] if g is None else saved[n] + step * g / size)
            found.append(float(value()))
        for n, t in tensors.items():
            t.copy_(saved[n])
            t.requires_grad_(False)
    assert (found[0] - found[1]) / 2e-3 == pytest.approx(float(size), rel=2e-2)


def test_lowers_to_onnxruntime(method, tmp_path):
    """Both stages that it touches, folded, equal to torch; ONNX Runtime sums in another order: 2e-5 of the largest value."""
    program = _built(method).clone()
    settle(program)
    each = program.facts.visual_per_image
    with torch.no_grad():
        seen = program["vision"].run({"pixel_values": pixels()})
        feed = probe(program, text=(5, 7), images=(1, 1)) | {"image_features": seen["image_features"].view(2, each, -1)}
        want = {"vision": seen, "prefill": program["prefill"].run(feed)}
    for name, feeds in (("vision", {"pixel_values": pixels()}), ("prefill", feed)):
        proto = to_onnx(program[name], name)
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        wanted = {i.name for i in session.get_inputs()}
        got = session.run(None, {n: t.numpy() for n, t in feeds.items() if n in wanted})[0]
        first = want[name][program[name].outputs[0]].numpy()
        np.testing.assert_allclose(got, first, rtol=0, atol=2e-5 * max(1, np.abs(first).max()))


# ---- what they start as


@pytest.mark.parametrize("name", ["space-to-depth", "conv-downsample", "query-pool"])
def test_starts_as_average_pooling(name):
    stage = model()["vision"]
    features = _built(name)["vision"].run({"pixel_values": pixels()})["image_features"]
    linear = [n for n in stage.graph.nodes if n.target is torch.ops.aten.linear.default and "projector" in str(n.args[1].target)]
    patches = stage.clone()
    patches.add_output("patches", next(n for n in patches.graph.nodes if n.name == linear[0].args[0].name))
    patches.module.recompile()
    x = patches.run({"pixel_values": pixels()})["patches"].view(2, 2, 2, 2, 2, 32).mean((2, 4)).flatten(1, 2)
    module = model()["vision"].module.model.multi_modal_projector
    want = torch.nn.functional.linear(x, module.linear_1.weight, module.linear_1.bias)
    want = torch.nn.functional.linear(torch.nn.functional.gelu(want), module.linear_2.weight, module.linear_2.bias)
    torch.testing.assert_close(features.view(2, 4, -1), want, rtol=1e-4, atol=1e-4)


def test_matryoshka_rows_are_averages_of_regions():
    features = _built("matryoshka-mix")["vision"].run({"pixel_values": pixels()})["image_features"].view(2, 4, -1)
    want = model()["vision"].run({"pixel_values": pixels()})["image_features"].view(2, 2, 2, 2, 2, -1).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(features, want, rtol=1e-4, atol=1e-4)
    table = pipeline.run(model().clone(), recipe.load("matryoshka-mix{tokens=3,table=5}"))
    rows = learned(table)["learned.matryoshka-mix.weight"][0]
    assert rows.shape == (5, 16) and torch.allclose(rows[0], torch.full((16,), 1 / 16)) and torch.allclose(rows.sum(1), torch.ones(5))


def test_prefusion_starts_as_victor():
    """Exactly: the copies are the model's own layers, in prefill and in decode."""
    victor, fused = (pipeline.run(model().clone(), recipe.load(f"{n}{{registers=2,layer=1}}")) for n in ("victor", "prefusion"))
    with torch.no_grad():
        learned(victor)["learned.victor.registers"].copy_(learned(fused)["learned.prefusion.registers"])
    assert torch.equal(run(victor), run(fused))
    copied = [n for n in learned(fused) if ".layers.0." in n]
    assert len(copied) == 9 and not [n for n in learned(fused) if ".layers.1." in n]
    reads = {str(n.target) for n in fused["decode"].graph.nodes if n.op == "get_attr"}
    assert set(copied) <= reads and not [r for r in reads if not r.startswith("learned") and ".layers.0." in r]
    with torch.no_grad():
        for n in copied:
            learned(fused)[n].mul_(1.1)
    assert not torch.equal(run(victor), run(fused))
    assert torch.equal(run(model()), run(model().clone()))  # the model's own weights are as they were


def test_meta_tokens_are_all_that_is_left():
    """With the patches gone at layer 1 they were read in layer 0 only; the features still depend on the picture."""
    program = pipeline.run(model().clone(), recipe.load("meta-tokens{tokens=4,layer=0,drop=1}"))
    seen = program["vision"].run({"pixel_values": pixels()})["image_features"]
    assert seen.shape == (8, 32)
    assert (seen - program["vision"].run({"pixel_values": pixels() + 1})["image_features"]).abs().max() > 1e-3


def test_a_router_that_keeps_everything_bypasses_nothing():
    program = pipeline.run(model().clone(), recipe.load("layer-expert{layers=[1],keep=16}"))
    with torch.no_grad():
        learned(program)["learned.layer-expert.layer1.router"].zero_()  # a factor of exactly 1
    torch.testing.assert_close(run(program), run(model()), rtol=1e-4, atol=1e-4)


def test_a_router_lets_each_sample_go_or_stay():
    """At the bias it starts with nothing happens; where one sample's score is above 0, its visual rows leave the cache, and the answer is that of
    dropping them."""
    program = _built("exit-router").clone()
    feed = probe(program, text=(5, 7), images=(1, 1))
    with torch.no_grad():
        before = program["prefill"].run(feed)
        plain = model()["prefill"].run(feed)
        assert before["kv_lengths"].tolist() == plain["kv_lengths"].tolist()
        torch.testing.assert_close(before["logits"], plain["logits"], rtol=1e-5, atol=1e-5)
        bias, old = learned(program)["learned.exit-router.layer1.bias"], float(learned(program)["learned.exit-router.layer1.bias"])
        low, high = sorted(before["exit.1"].tolist())
        bias.sub_((low + high) / 2)
        after = program["prefill"].run(feed)
        bias.fill_(old)
    gone = int(before["exit.1"].argmax())
    assert after["kv_lengths"][1].tolist() == [n - (16 if b == gone else 0) for b, n in enumerate(plain["kv_lengths"][1].tolist())]
    dropped = pipeline.run(model().clone(), recipe.load("exit-vision{layer=1}"))["prefill"].run(feed)
    torch.testing.assert_close(after["logits"][gone], dropped["logits"][gone], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after["logits"][1 - gone], plain["logits"][1 - gone], rtol=1e-4, atol=1e-4)


def test_insertions_share_tensors_between_programs():
    one, two = (pipeline.run(model().clone(), recipe.load(f"victor{{registers=2,layer={k}}}")) for k in (1, 2))
    tensors = share([one, two])
    assert learned(one)["learned.victor.registers"] is learned(two)["learned.victor.registers"] is tensors["learned.victor.registers"]


@pytest.mark.parametrize(("text", "message"), [
    ("space-to-depth{side=3}", r"space-to-depth: takes blocks of 3 x 3, which do not divide the grid of 4 x 4"),
    ("matryoshka-mix{tokens=16}", r"matryoshka-mix: would make 16 tokens of the 16 of an image; it must be fewer"),
    ("matryoshka-mix{tokens=4,groups=3}", r"matryoshka-mix: groups=3 do not divide the width 32"),
    ("matryoshka-mix{tokens=4,table=2}", r"matryoshka-mix: tokens=4 is more than the table of 2"),
    ("conv-downsample{kernel=2}", r"conv-downsample: kernel=2 has no middle; it must be odd"),
    ("meta-tokens{tokens=16}", r"meta-tokens: 16 meta tokens are not fewer than the 16 visual tokens of an image"),
    ("meta-tokens{tokens=4,layer=1,drop=1}", r"meta-tokens: patches leave at layer 1, and the meta tokens join at layer 1"),
    ("prefusion{layer=0}", r"prefusion: layer=0 leaves no layer to fuse image and text in"),
    ("layer-expert{layers=[2]}", r"layer-expert: layer 2 cannot be bypassed; this program has 0..2"),
    ("space-to-depth{side=2}, query-pool{side=2}", r"query-pool: reads the grid of patches, and an earlier pass left 4 of 16 tokens per image"),
])
def test_refusals(text, message):
    with pytest.raises(PassError, match=message):
        pipeline.run(model().clone(), recipe.load(text))
