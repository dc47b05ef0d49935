"""Planted bugs are found and named: positions, a cache scale, an overflow in the encoder; and an honest walk finds nothing."""

from contextlib import contextmanager

import numpy as np
import pytest
from fakes import EOS, Engine, Processor, manifest
from PIL import Image

from foveate.export.errors import LowerError
from foveate.runtime.bisect import Limits, Step, bisect
from foveate.runtime.datasets import Item, Turn
from foveate.runtime.errors import RunError
from foveate.runtime.session import Session


class Cache:
    def __init__(self, value):
        self.value, self.lengths, self.nbytes = value, np.zeros((1, 1), int), 0


class Model(Engine):
    """Says the picture's number, then counts on by the position and by what the cache holds, so that wrong ones are heard."""

    shift, scale, half = 0, 1.0, False

    def vision(self, feeds):
        out = super().vision(feeds)
        if self.half:
            with np.errstate(over="ignore"):
                out["image_features"] = (out["image_features"] * 3000).astype(np.float16).astype(np.float32) / 3000
        return out

    def prefill(self, feeds, capacity):
        value = feeds["image_features"][:, 0, 0]
        self.prompt = int(feeds["attention_mask"].sum())
        return {"logits": self._say(value), "kv_lengths": np.ones((1, 1), int)}, Cache(value * self.scale)

    def decode(self, cache, input_ids, position_ids):
        return self._say(cache.value + position_ids[:, 0] + self.shift - self.prompt + 1)

    @staticmethod
    def _say(value):
        if not np.isfinite(value).all():
            return np.full((len(value), 16), np.nan, np.float32)
        return np.eye(16, dtype=np.float32)[5 + (value.round().astype(int) % 10)] + 1e-4 * value[:, None].astype(np.float32)


def step(name, kind="pass", **planted):
    @contextmanager
    def open():
        engine = Model()
        for key, value in planted.items():
            setattr(engine, key, value)
        yield Session(engine, Processor(), {**manifest(), "name": name})

    return Step(name, kind, open)


@pytest.fixture
def items(tmp_path):
    out = []
    for i in range(6):
        Image.new("RGB", (8, 8), (12 + 3 * i, 0, 0)).save(tmp_path / f"{i}.png")
        out.append(Item(f"i{i}", (tmp_path / f"{i}.png",), (Turn("what is this ?"),)))
    return out


ORIGINAL = step("original", "lowering")


def test_an_honest_walk(items):
    found = bisect([ORIGINAL, step("1: drop"), step("2: quantize"), step("ort", "lowering")], items)
    assert found.culprit is None and [o.agreement for o in found.outcomes] == [1, 1, 1, 1]
    assert "no step breaks agreement" in str(found)


def test_wrong_positions_after_a_drop(items):
    """prefill is right, the first decode step is not"""
    found = bisect(
        [ORIGINAL, step("1: clean-up"), step("2: drop", shift=3), step("3: quantize", shift=3), step("ort", "lowering", shift=3)], items
    )
    bad = found.culprit
    assert (bad.name, bad.kind, bad.tensor, bad.item) == ("2: drop", "pass", "decode.1.logits", "i0")
    assert len(found.outcomes) == 3 and "equal tokens fell from 100.0% to" in str(found)


def test_a_wrong_cache_scale(items):
    found = bisect([ORIGINAL, step("1: drop"), step("2: quantize-kv", scale=1.5), step("ort", "lowering", scale=1.5)], items)
    assert found.culprit.name == "2: quantize-kv" and found.culprit.tensor == "decode.1.logits"


def test_a_wrong_cache_scale_that_only_the_backend_has(items):
    found = bisect([ORIGINAL, step("1: quantize-kv"), step("ort", "lowering", scale=1.5)], items)
    assert found.culprit.name == "ort" and found.culprit.kind == "lowering" and "of its largest value" in found.culprit.reason


def test_an_overflow_in_the_encoder(items):
    found = bisect([ORIGINAL, step("1: drop"), step("ort", "lowering"), step("half precision", "lowering", half=True)], items)
    bad = found.culprit
    assert bad.name == "half precision" and bad.tensor == "vision.image_features" and "NaN or infinite" in bad.reason
    assert bad.item == "i4"  # 22 * 3000 fits into half precision's 65504 no more: 24 does not, 21 does


def test_a_broken_original_is_said_at_once(items):
    found = bisect([step("original", "lowering", half=True), step("1: drop")], items)
    assert found.culprit.name == "original" and len(found.outcomes) == 1


def test_small_differences_of_a_pass_are_no_break(items):
    assert bisect([ORIGINAL, step("1: drop", scale=1.001)], items).culprit is None


def test_a_step_that_cannot_run_here_is_said_and_is_not_a_pass(items):
    def nowhere():
        raise LowerError("trt: no GPU here")

    found = bisect([ORIGINAL, step("1: drop"), Step("trt (the artifact)", "lowering", nowhere)], items)
    assert found.culprit is None and found.exit_code == 4 and [o.name for o in found.skipped] == ["trt (the artifact)"]
    assert "not run trt (the artifact)" in str(found) and "no GPU here" in str(found) and "not tried: trt (the artifact)" in str(found)
    assert bisect([ORIGINAL, Step("x", "lowering", nowhere), step("ort", "lowering", scale=1.5)], items).exit_code == 1


class Keeps(Model):
    """A drop whose kept tokens and numbers a lowering may move."""

    rows = (0, 1)
    nudge = 0.0

    def prefill(self, feeds, capacity):
        out, cache = super().prefill(feeds, capacity)
        return {**out, "logits": out["logits"] + np.float32(self.nudge) * np.arange(16, dtype=np.float32), "kept.a": np.array([list(self.rows)])}, cache


def keeps(name, kind, **planted):
    @contextmanager
    def open():
        engine = Keeps()
        for key, value in planted.items():
            setattr(engine, key, value)
        yield Session(engine, Processor(), manifest())

    return Step(name, kind, open)


def test_a_lowering_that_keeps_other_tokens_is_judged_by_what_it_says(items):
    honest = bisect([ORIGINAL, keeps("1: drop", "pass"), keeps("half", "lowering", rows=(0, 2), nudge=0.01)], items)
    assert honest.culprit is None and honest.outcomes[-1].moved == len(items) and "6 items kept other tokens" in str(honest)
    assert bisect([ORIGINAL, keeps("1: drop", "pass"), keeps("half", "lowering", nudge=0.01)], items).culprit.name == "half"
    worse = bisect([ORIGINAL, keeps("1: drop", "pass"), keeps("half", "lowering", rows=(0, 2), nudge=1.0)], items, Limits(floor=0.95, drop=0.05))
    assert worse.culprit.name == "half" and "equal tokens fell" in worse.culprit.reason


def test_refusals(items):
    with pytest.raises(RunError, match="at least one item"):
        bisect([ORIGINAL], [])
    with pytest.raises(RunError, match="floor is 2; it must lie between 0 and 1"):
        Limits(floor=2)
    assert EOS  # the fake's end token never occurs here: all answers have the full length


# -- a real captured family


@pytest.fixture(scope="module")
def overflowing(tmp_path_factory):
    """(checkpoint, its data): an encoder layer whose value matrix is 5e4 times as large and whose output matrix undoes it: the same model in
    float32, which half precision cannot hold.
    """
    import json
    import shutil

    from checkpoints import tiny_llava
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("overflow")
    model = shutil.copytree(tiny_llava(), folder / "model")
    weights = load_file(model / "model.safetensors")
    wide = next(n for n in weights if "vision" in n and "layers.1.self_attn.v_proj.weight" in n)
    narrow = wide.replace("v_proj", "out_proj")
    weights[wide] *= 5e4
    weights[wide.replace("weight", "bias")] *= 5e4
    weights[narrow] /= 5e4
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    lines = []
    for i in range(3):
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        lines.append(json.dumps({"id": f"i{i}", "images": [f"{i}.png"], "turns": [{"question": "what is this ?"}]}))
    (folder / "items.jsonl").write_text("\n".join(lines))
    return model, folder


def test_an_overflow_in_the_encoder_of_a_captured_family(overflowing, tmp_path, capsys):
    import json

    from foveate.cli import execute

    model, data = overflowing
    path = tmp_path / "half"
    recipe = "drop-fastv{layer=1,keep=15}"
    command = ["optimize", str(model), "-o", str(path), "-r", recipe, "-t", "eager", "--option", "precision=float16", "--no-golden", "-q"]
    assert execute(command) == 0
    capsys.readouterr()
    # the original's folder is in the manifest; a random model says other things as soon as one token is missing: that is no break here
    code = execute(["bisect", str(path), "-d", str(data), "--floor", "0.4", "--json", "-q"])
    found = json.loads(capsys.readouterr().out)
    bad = found["culprit"]
    assert code == 1 and [s["name"] for s in found["steps"]] == ["original", "1: drop-fastv", "float16 (torch)"]
    assert bad["name"] == "float16 (torch)" and bad["kind"] == "lowering" and bad["tensor"] == "vision.image_features" and bad["item"] == "i0"
    assert "NaN or infinite" in bad["reason"] and "of vision (reads " in bad["operation"] and "v_proj" in bad["operation"]
