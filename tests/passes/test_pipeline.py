"""The debug ladder."""

import pytest
import torch

from foveate.graph.probe import probe
from foveate.passes import pipeline, recipe
from foveate.passes.base import PassError


def test_level_1_prints_a_line_per_pass_and_3_writes_dumps(toy, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FOVEATE_DEBUG", "3")
    pipeline.run(toy, recipe.load("drop-uniform{layer=1,keep=2}, clean-up"))
    assert [line[:16] for line in capsys.readouterr().out.splitlines()] == ["00 drop-uniform:", "01 clean-up: cha"]
    assert sorted(f.name for f in (tmp_path / "dump").iterdir()) == ["00-drop-uniform.txt", "01-clean-up.txt"]


def test_level_2_says_why_an_optional_pass_did_not_apply(toy, monkeypatch, capsys):
    monkeypatch.setenv("FOVEATE_DEBUG", "2")
    pipeline.run(toy, recipe.load([{"drop-fastv": {"layer": 7, "keep": 2, "optional": True}}]))
    assert "drop-fastv did not apply: drop-fastv: no layer 7" in capsys.readouterr().out


def test_level_4_measures_a_cut_against_its_oracle(toy, monkeypatch, capsys):
    monkeypatch.setenv("FOVEATE_DEBUG", "4")
    pipeline.run(toy, recipe.load("drop-fastv{layer=1,keep=2}"))
    assert "from its mask-only oracle" in capsys.readouterr().out


def test_level_4_catches_numbers_that_are_not_finite(toy, monkeypatch):
    monkeypatch.setenv("FOVEATE_DEBUG", "4")
    toy["prefill"].module.lm.head.weight = torch.nn.Parameter(torch.full_like(toy["prefill"].module.lm.head.weight, float("inf")))
    with pytest.raises(PassError, match=r"drop-uniform: outputs \['logits'\] are not finite"):
        pipeline.run(toy, recipe.load("drop-uniform{layer=1,keep=2}"))


def test_probe_makes_valid_prompts(toy):
    feed = probe(toy, text=(3, 5, 2), images=(1, 2, 0), left=True)
    assert feed["input_ids"].shape == (3, 5 + 12)
    assert (feed["input_ids"] == toy.facts.image_token_id).sum(1).tolist() == [6, 12, 0]
    assert feed["attention_mask"].sum(1).tolist() == [9, 17, 2] and bool(feed["attention_mask"][:, -1].all())
    toy["prefill"].run(feed)
