"""The backends: found by file, equal to each other, honest about limits; every fused spelling against the portable one."""

from __future__ import annotations

import functools
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from helpers import toy
from lowering import distance, engine, prompt, rollout

import foveate
from foveate.export.artifact import Artifact
from foveate.export.backends import backends, find
from foveate.export.errors import LowerError
from foveate.export.sizes import evaluate
from foveate.graph.capture import capture
from foveate.graph.families import REGISTRY
from foveate.graph.families._tiny import build
from foveate.graph.kv_table import derive_kv
from foveate.passes.methods.drop_fastv import DropFastV

EXACT = 2e-5  # relative to the logit scale: float32, the same sums in another order through three layers


@functools.lru_cache
def _llava(text_width: int = 64):
    return capture(build(REGISTRY["llava"]).model)


@pytest.fixture
def llava():
    return _llava().clone()


def kinds(folder, stage: str) -> set[str]:
    return {n.op_type for n in onnx.load(folder / "ort" / "components" / f"{stage}.onnx", load_external_data=False).graph.node}


def test_toy_on_ort_equals_eager(tmp_path):
    """Head width 4: too narrow for the fused attention, so the cache is kept by the engine."""
    program = toy()
    feeds = prompt(program, batch=2, visual=6, text=4, padding=2)
    want, eager = rollout(program, engine(program, tmp_path, "eager"), feeds, steps=4)
    have, ort = rollout(program, engine(program, tmp_path, "ort", threads=1), feeds, steps=4)
    assert distance(have, want) < EXACT
    np.testing.assert_array_equal(ort.lengths, eager.lengths)


def test_llava_on_ort_equals_eager_with_everything_fused(llava, tmp_path):
    feeds = prompt(llava, batch=3, visual=5, text=6, padding=4)
    want, _ = rollout(llava, engine(llava, tmp_path, "eager"), feeds, steps=5)
    ort = engine(llava, tmp_path, "ort", threads=1)
    have, cache = rollout(llava, ort, feeds, steps=5)
    assert distance(have, want) < EXACT
    assert {"GroupQueryAttention", "RotaryEmbedding", "SkipSimplifiedLayerNormalization", "QuickGelu"} <= kinds(
        tmp_path, "prefill"
    ) & kinds(tmp_path, "decode")
    assert not {"Softmax", "Attention", "Transpose"} & kinds(tmp_path, "decode")
    assert ort.manifest["decode"]["in_place"] == ort.manifest["prefill"]["in_place"] == [f"{w}.{l}" for l in cache.layers for w in "kv"]


def test_the_fused_graph_equals_the_portable_one(llava, tmp_path):
    feeds = prompt(llava, batch=2, visual=5, text=6, padding=3)
    fused, _ = rollout(llava, engine(llava, tmp_path / "a", "ort", threads=1), feeds, steps=3)
    plain, _ = rollout(llava, engine(llava, tmp_path / "b", "ort", threads=1, fuse=False), feeds, steps=3)
    assert distance(fused, plain) < EXACT
    assert {n.domain for n in onnx.load(tmp_path / "b" / "ort" / "components" / "prefill.onnx", load_external_data=False).graph.node} == {
        ""
    }


def test_vision_on_ort_equals_eager(llava, tmp_path):
    stage = llava["vision"].placeholder("pixel_values").meta["val"]
    pixels = {"pixel_values": torch.randn(3, *stage.shape[1:], generator=torch.Generator().manual_seed(0)).numpy()}
    want = engine(llava, tmp_path, "eager").vision(pixels)["image_features"]
    have = engine(llava, tmp_path, "ort", threads=1).vision(pixels)["image_features"]
    assert distance([have], [want]) < EXACT
    assert "MultiHeadAttention" in kinds(tmp_path, "vision")


def test_after_a_drop_every_layer_has_its_own_length(llava, tmp_path):
    DropFastV(layer=1, keep=3).run(llava)
    llava.kv = derive_kv(llava)
    feeds = prompt(llava, batch=2, visual=8, text=6, padding=3)
    want, eager = rollout(llava, engine(llava, tmp_path, "eager"), feeds, steps=4)
    have, ort = rollout(llava, engine(llava, tmp_path, "ort", threads=1), feeds, steps=4)
    assert distance(have, want) < EXACT
    np.testing.assert_array_equal(ort.lengths, eager.lengths)
    assert ort.lengths.tolist() == [[18, 15], [13, 10], [13, 10]]  # 14 and 11 valid tokens, 5 visual ones dropped after layer 0, 4 steps


def test_caches_grow(llava, tmp_path):
    """A capacity that is too small costs time, not correctness."""
    feeds = prompt(llava, batch=2, visual=5, text=4)
    ort = engine(llava, tmp_path, "ort", threads=1)
    roomy, _ = rollout(llava, ort, feeds, steps=14, capacity=64)
    tight, cache = rollout(llava, ort, feeds, steps=14, capacity=1)
    assert cache.rows(0) < 64
    assert distance(tight, roomy) == 0


def test_rows_of_a_batch_do_not_touch(llava, tmp_path):
    """A padded row alone gives what it gives beside a longer one."""
    feeds = prompt(llava, batch=2, visual=5, text=6, padding=3)
    ort = engine(llava, tmp_path, "ort", threads=1)
    both, _ = rollout(llava, ort, feeds, steps=3)
    alone, _ = rollout(llava, ort, {n: a[1:, :8] if a.shape[1] == 11 else a[1:] for n, a in feeds.items()}, steps=3)
    assert distance([b[1:] for b in both], alone) < EXACT


def test_the_weights_are_shared_between_prefill_and_decode(llava, tmp_path):
    """One file, hardly larger than the parameters."""
    engine(llava, tmp_path, "ort", threads=1)
    size = (tmp_path / "ort" / "components" / "weights.bin").stat().st_size
    parameters = sum(p.numel() * p.element_size() for _, p in llava.parameters())
    assert size < 1.05 * parameters + 4096 * 8


def test_left_padding_is_refused(llava, tmp_path):
    feeds = prompt(llava, batch=2, visual=5, text=6)
    feeds["attention_mask"][1, 0] = 0
    for target in ("ort", "eager"):
        with pytest.raises(LowerError, match="padding on the left or in between; pad on the right"):
            engine(llava, tmp_path, target).prefill(feeds, 20)


def test_eager_with_sdpa_and_half_precision(llava, tmp_path):
    """sdpa: float32 in another order. bfloat16 has 8 bits of mantissa: a few percent after three layers."""
    feeds = prompt(llava, batch=2, visual=5, text=6, padding=3)
    want, _ = rollout(llava, engine(llava, tmp_path / "a", "eager"), feeds, steps=3)
    sdpa, _ = rollout(llava, engine(llava, tmp_path / "b", "eager", attention="sdpa"), feeds, steps=3)
    half, _ = rollout(llava, engine(llava, tmp_path / "c", "eager", precision="bfloat16"), feeds, steps=3)
    assert distance(sdpa, want) < EXACT
    assert 1e-5 < distance(half, want) < 0.1


def test_a_stored_graph_can_only_compute(tmp_path):
    """A graph that names anything but an operator is refused before it runs."""
    program = toy()
    engine(program, tmp_path, "eager")
    artifact = Artifact.load(tmp_path / "eager")
    path = artifact.file("components/vision.json")
    stored = json.loads(path.read_text())
    next(n for n in stored["nodes"] if n["op"] == "call_function")["target"] = "os.system"
    path.write_text(json.dumps(stored))
    with pytest.raises(LowerError, match=r"names 'os\.system'; possible are operators of"):
        find("eager").open(artifact)


def test_unknown_target_and_option(tmp_path):
    with pytest.raises(LowerError, match="no target 'orrt'; did you mean 'ort'"):
        find("orrt")
    with pytest.raises(LowerError, match="ort: no option 'thread'; did you mean 'threads'"):
        find("ort").lower(toy(), tmp_path, {"thread": 2})


def test_limits_are_said_before_anything_is_built(tmp_path):
    from dataclasses import replace

    program = toy()
    program.facts = replace(program.facts, dtype="bfloat16")
    assert find("ort").check(program, {}) == [
        "ort: the weights are bfloat16, for which the CPU provider has no kernels; load the model in float32"
    ]
    with pytest.raises(LowerError, match="bfloat16"):
        find("ort").lower(program, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_a_backend_is_one_file(tmp_path):
    """A toy target from a temporary folder: it lowers, is stored, opened and run like the others."""
    file = tmp_path / "count.py"
    file.write_text('''
"""A target that counts nodes."""
from foveate.export.backends import Backend, Engine


class Count(Backend):
    name = "count"

    def lower(self, program, folder, options):
        for stage in program.stages:
            (folder / stage).write_text(str(len(program[stage].graph.nodes)))
        return {stage: {"file": stage} for stage in program.stages}

    def open(self, artifact):
        return Counted(artifact)


class Counted(Engine):
    def __init__(self, artifact):
        self.nodes = int(artifact.file("vision").read_text())

    def vision(self, feeds):
        return {"nodes": self.nodes}

    prefill = decode = None
''')
    assert foveate.load_plugin(file)["targets"] == ["count"]
    assert "count" in backends()
    program = toy()
    assert engine(program, tmp_path, "count").vision({}) == {"nodes": len(program["vision"].graph.nodes)}
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(foveate.FoveateError, match=r"empty\.py added nothing; it needs .* a Backend with a name"):
        foveate.load_plugin(tmp_path / "empty.py")


def test_the_run_time_does_without_torch():
    code = "import sys, foveate.export.artifact, foveate.export.backends.ort; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_size_expressions():
    assert evaluate("-N + S + 64", {"S": 700, "N": 576}) == 188
    assert evaluate("Max(1, S//2) * 3", {"S": 9}) == 12
    with pytest.raises(LowerError, match="needs K0; known are"):
        evaluate("S - K0", {"S": 1})
    with pytest.raises(LowerError, match="is no size expression"):
        evaluate("__import__('os')", {})
