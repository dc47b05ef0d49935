"""Segmented exits: pieces of the prefill with a decision of the host between them."""

import helpers
import onnxruntime
import pytest
import torch

from foveate.export.to_onnx import to_onnx
from foveate.passes.base import PassError, make
from foveate.passes.segments import segments


@pytest.fixture(scope="module")
def pieces():
    return segments(helpers.toy(), [1, 2])


def feed(seed=0):
    return helpers.feeds([1, 2, 0], [5, 2, 3], seed=seed)


def test_staying_is_the_prefill_bit_for_bit(pieces):
    want, (got, left) = helpers.toy()["prefill"].run(feed()), pieces.run(feed(), lambda layer, looks: False)
    assert left is None and set(got) == set(want) and all(torch.equal(got[n], want[n]) for n in want)


@pytest.mark.parametrize("layer", [1, 2])
def test_leaving_is_exit_vision_at_that_layer(pieces, layer):
    program = helpers.toy()
    make("exit-vision", {"layer": layer}).run(program)
    want, (got, left) = program["prefill"].run(feed()), pieces.run(feed(), lambda at, looks: at == layer)
    assert left == layer and set(got) == set(want)
    for name in want:
        helpers.close(got[name], want[name])


def test_a_piece_that_is_not_run_costs_nothing(pieces):
    """What is called, in order, and that behind an exit there are no visual tokens: rows are computed for text alone."""
    called = []

    def call(name, stage, values):
        called.append(name)
        return stage.run(values)

    out, _ = pieces.run(feed(), lambda layer, looks: True, call)
    assert called == ["prefill.0", "prefill.0.exit"]
    assert out["k.1"].shape[2] == out["k.0"].shape[2] - 12 + 1  # one row is left over for a prompt that ends with an image
    assert out["kv_lengths"].T.tolist() == [[11, 5, 5], [14, 2, 2], [3, 3, 3]]


def test_looks_is_the_attention_on_the_picture_by_hand(pieces):
    seen = {}
    given = helpers.feeds([1], [4], seed=5)
    pieces.run(given, lambda layer, looks: seen.update({layer: looks}) or False)
    program = helpers.toy()
    hidden = program["prefill"].module.lm.embed.weight[given["input_ids"]].clone()
    visual = given["input_ids"][0] == helpers.IMAGE
    hidden[0, visual] = given["image_features"][0]
    cos = torch.cos(given["position_ids"][..., None] * torch.tensor([1.0, 0.3, 0.1, 0.03]))
    q, k, _ = (hidden @ program["prefill"].module.lm.layers.get_submodule("0").qkv.weight.T).chunk(3, -1)
    p = ((q * cos)[0, -1] @ (k * cos)[0].T * 0.5).softmax(-1)[visual].sum()
    helpers.close(seen[1], p.detach()[None])
    no_image = helpers.feeds([0], [4], seed=5)
    pieces.run(no_image, lambda layer, looks: seen.update({layer: looks}) or False)
    assert seen[1].item() == 0


def test_pieces_run_on_onnx_runtime(pieces):
    cpu = ["CPUExecutionProvider"]
    sessions = {n: onnxruntime.InferenceSession(to_onnx(s, "prefill").SerializeToString(), providers=cpu) for n, s in pieces.stages.items()}

    def call(name, stage, values):
        wanted = {i.name for i in sessions[name].get_inputs()}
        found = sessions[name].run([o.name for o in sessions[name].get_outputs()], {n: t.detach().numpy() for n, t in values.items() if n in wanted})
        return {n: torch.from_numpy(v) for n, v in zip(stage.outputs, found, strict=True)}

    for decide in (lambda layer, looks: False, lambda layer, looks: layer == 2):
        got, left = pieces.run(feed(3), decide, call)
        want, same = pieces.run(feed(3), decide)
        assert left == same
        for name in want:
            helpers.close(got[name], want[name].detach(), 1e-4)  # other kernels, float32


@pytest.mark.parametrize("layers", [[], [0], [2, 1], [3]])
def test_refuses_layers_that_are_none(layers):
    with pytest.raises(PassError, match=r"segments: layers must ascend within 1\.\.2, got"):
        segments(helpers.toy(), layers)
