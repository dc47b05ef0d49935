"""`make gpu-check` cannot run without a GPU; the same code runs here with a tiny geometry on the CPU."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import gpu_check


def test_the_whole_run_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "BOUNDS", {"float32": 1e-4, "bfloat16": 1e-1})
    arguments = ["--device", "cpu", "--geometry", "tiny", "--numbers", "tiny", "--no-compile", "--rounds", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    assert gpu_check.main() == 0
    record = json.loads((tmp_path / "gpu_check.json").read_text())
    assert {(r["program"], r["precision"]) for r in record["numbers"]} == {
        (p, t) for p in ("baseline", "drop-uniform", "drop-fastv") for t in ("float32", "bfloat16")
    }
    assert record["ok"] and record["speed"]["flop_ratio"] > 1
    assert record["speed"]["modes"]["sdpa"]["prefill_ms"]["baseline"] > 0 and "not_run" in record["speed"]["modes"]["compile"]
    training = record["training"]
    assert training["precisions"]["float32"]["losses"] == training["cpu"] and 0 < training["precisions"]["bfloat16"]["worst"] < 5e-2
    assert "| drop-fastv | bfloat16 |" in (tmp_path / "gpu_check.md").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(("change", "ok"), [(0.0, True), (0.05, True), (0.2, False)])
def test_a_broken_bound_is_seen(change, ok):
    reference = {n: np.ones((2, 3), np.float32) for n in ("vision", "prefill", "decode")} | {"kept.layer1": np.array([[0, 1], [2, 3]])}
    got = {**reference, "prefill": reference["prefill"] + change}
    assert gpu_check._judge("p", "bfloat16", 0.1, reference, got)["ok"] is ok


def test_other_tokens_are_seen():
    reference = {n: np.ones((1, 3), np.float32) for n in ("vision", "prefill", "decode")} | {"kept.layer1": np.arange(10)[None]}
    for shift, ok in ((1, True), (5, False)):
        got = {**reference, "kept.layer1": reference["kept.layer1"] + shift}
        assert gpu_check._judge("p", "bfloat16", 0.1, reference, got)["ok"] is ok
    assert not gpu_check._judge("p", "float32", 0.1, reference, {**reference, "kept.layer1": reference["kept.layer1"] + 1})["ok"]


def test_no_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 3
    assert "torch sees no CUDA device here" in capsys.readouterr().err
