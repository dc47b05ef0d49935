"""foveate gate and eval as a user runs them, on sessions that can be followed by hand: verdicts, exit codes, files."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest
from fakes import EOS, Engine, Processor, manifest
from PIL import Image

from foveate.cli import execute
from foveate.runtime import session as session_module
from foveate.runtime.session import Session

SLICES = ("read", "count_kind", "where", "color")


class Toy(Engine):
    """Answers the picture's colour number; `wrong` of every 97 pictures of a slice are answered wrongly."""

    def __init__(self, wrong=0):
        super().__init__()
        self.wrong = wrong

    def prefill(self, feeds, capacity):
        out, cache = super().prefill(feeds, capacity)
        value = feeds["image_features"][:, 0, 0].round().astype(int)
        out["logits"] = np.eye(16, dtype=np.float32)[np.where(value % 97 < self.wrong, 8, 7)]
        return out, cache

    def decode(self, cache, input_ids, position_ids):
        return np.eye(16, dtype=np.float32)[np.full(len(input_ids), EOS)]


@pytest.fixture
def data(tmp_path):
    """388 items: 97 pictures, four questions about each as items of their own."""
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i in range(388):
        name = f"{i % 97}.png"
        if i < 97:
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name)
        lines.append(
            json.dumps({"id": f"i{i:03d}", "images": [name], "turns": [{"question": "what ?", "answer": "this"}], "slice": SLICES[i % 4]})
        )
    (folder / "items.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def artifacts(tmp_path, monkeypatch):
    """Folders that load as toys: base, same, bad."""
    wrong = {"base": 3, "same": 3, "mild": 4, "bad": 40}
    for name in wrong:
        (tmp_path / name).mkdir()

    def load(path, verify=True):
        return Session(Toy(wrong[path.name]), Processor(), {**manifest(), "name": path.name})

    monkeypatch.setattr(session_module, "load", load)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    many = ["--batch", "32"] if arguments[0] in ("gate", "eval", "report") and "--plan" not in arguments else []
    return execute([str(a) for a in (*arguments, *many)])


def test_pass_fail_inconclusive_and_their_codes(artifacts, data, capsys):
    assert run("gate", "same", "-b", "base", "-d", data, "-q") == 0
    assert "PASS (exit code 0)" in capsys.readouterr().out
    assert run("gate", "bad", "-b", "base", "-d", data, "-q") == 1
    assert "overall: worse by 38.14 points" in capsys.readouterr().out
    assert run("gate", "mild", "-b", "base", "-d", data, "-q") == 4
    assert "more items" in capsys.readouterr().out
    assert run("gate", "same", "-b", "base", "-d", data, "-q", "--limit", 50) == 4


def test_twice_the_same_numbers(artifacts, data, capsys):
    outputs = []
    for work in ("w1", "w2"):
        run("gate", "mild", "-b", "base", "-d", data, "-q", "--json", "--work", work)
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] and json.loads(outputs[0])["status"] == "INCONCLUSIVE"


def test_sequential_stops_early(artifacts, data, capsys):
    assert run("gate", "bad", "-b", "base", "-d", data, "-q", "--looks", 4, "--json") == 1
    verdict = json.loads(capsys.readouterr().out)
    assert verdict["stopped_early"] and verdict["rows"][0]["n"] == 128
    assert sum(len(p.read_text().splitlines()) for p in (artifacts / "foveate-results").glob("bad*")) == 129  # four whole batches of 32


def test_a_committed_baseline_file(artifacts, data, capsys):
    base = artifacts / "baselines" / "toy.jsonl"
    assert run("gate", "base", "-b", base, "-d", data, "-q") == 1
    assert "there was no baseline" in capsys.readouterr().err
    first = base.read_bytes()
    assert b'"ms"' not in first
    assert run("gate", "same", "-b", base, "-d", data, "-q") == 0
    assert run("gate", "bad", "-b", base, "-d", data, "-q") == 1
    assert base.read_bytes() == first
    assert run("gate", "bad", "-b", base, "-d", data, "-q", "--accept") == 0 and base.read_bytes() != first
    assert run("gate", "bad", "-b", base, "-d", data, "-q") == 0
    assert run("gate", "bad", "-b", "base", "-d", data, "-q", "--accept") == 2


def test_saved_results_on_both_sides(artifacts, data, capsys):
    for name in ("base", "bad"):
        assert run("eval", name, "-d", data, "-o", f"{name}.jsonl", "-q") == 0
    assert "overall" in capsys.readouterr().out
    assert run("gate", "bad.jsonl", "-b", "base.jsonl") == 1
    lines = (artifacts / "base.jsonl").read_text().splitlines()
    (artifacts / "less.jsonl").write_text("\n".join(lines[:-5]) + "\n")
    assert run("gate", "bad.jsonl", "-b", "less.jsonl") == 2
    assert "not of the same items: 5 only in the candidate (first: i383)" in capsys.readouterr().err


def test_files_for_other_programs(artifacts, data, monkeypatch, capsys):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(artifacts / "step.md"))
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert (
        run("gate", "bad", "-b", "base", "-d", data, "-q", "--junit", "out/j.xml", "--metrics", "out/m.json", "--summary", "out/s.md") == 1
    )
    suite = ElementTree.parse(artifacts / "out" / "j.xml").getroot()[0]
    cases = {c.get("name"): c for c in suite}
    assert set(cases) == {"overall", *SLICES} and cases["overall"].find("failure") is not None
    assert int(suite.get("tests")) == 5 and int(suite.get("failures")) == 5
    rows = json.loads((artifacts / "out" / "m.json").read_text())
    assert {"name", "unit", "value", "range", "extra"} == set(rows[0]) and rows[0]["value"] == pytest.approx(100 * 57 / 97, abs=1e-3)
    assert "FAIL" in (artifacts / "step.md").read_text() and (artifacts / "step.md").read_text() == (artifacts / "out" / "s.md").read_text()
    assert "::error title=foveate gate FAIL::overall: worse by" in capsys.readouterr().err


def test_latency_ratio(artifacts, data, capsys):
    assert run("gate", "same", "-b", "base", "-d", data, "-q", "--max-latency-ratio", 50) == 0
    assert "latency ttft" in capsys.readouterr().out
    run("eval", "base", "-d", data, "-o", "base.jsonl", "-q")
    assert run("gate", "same", "-b", "base.jsonl", "-d", data, "-q", "--max-latency-ratio", 2) == 2
    assert "saved results cannot be timed" in capsys.readouterr().err


def test_plan(artifacts, capsys):
    assert run("gate", "--plan", 0.05) == 0
    assert "items give a PASS with 80% chance" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gate", "same"], "give a candidate and --baseline"),
        (["gate", "nothing", "-b", "base"], "candidate nothing is neither an artifact folder nor"),
        (["gate", "same", "-b", "base"], "--data is needed"),
        (["gate", "same", "-b", "base", "-d", "nowhere"], "no such file or folder"),
        (["gate", "same", "-b", "base", "-d", "data", "--margin", "0"], "margin is 0"),
        (["eval", "same", "-d", "data", "-o", "x.jsonl", "--shard", "2"], "write it as i/n"),
        (["gate", "same", "-b", "base", "-d", "data", "--slices", "all"], "possible: guard, strict, report"),
    ],
)
def test_wrong_usage(artifacts, data, arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


def test_agreement_figures_with_log_probabilities(artifacts, data, capsys):
    run("gate", "bad", "-b", "base", "-d", data, "-q", "--logits", "--json", "--limit", 97)
    found = json.loads(capsys.readouterr().out)["agreement"]
    assert found["items"] == 97 and found["same_answers"] == found["same_first_token"] == pytest.approx(60 / 97)
    assert found["first_token_kl"] > 0 and found["likelihood_gap"] > 0
