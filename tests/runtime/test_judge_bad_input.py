"""Bad input of the judge as a user meets it: one clear sentence, the exit code, and results so far kept."""

import json

import numpy as np
import pytest
from fakes import EOS, Engine, Processor, manifest
from PIL import Image

from foveate.cli import execute
from foveate.runtime import session as session_module
from foveate.runtime.results import read
from foveate.runtime.session import Session


class Toy(Engine):
    """Says "this" to every picture; the artifact "nan" answers pictures of red 3 with NaN."""

    def __init__(self, name):
        super().__init__()
        self.name = name

    def prefill(self, feeds, capacity):
        out, cache = super().prefill(feeds, capacity)
        out["logits"] = np.eye(16, dtype=np.float32)[np.full(len(feeds["input_ids"]), 7)]
        if self.name == "nan":
            out["logits"][feeds["image_features"].max((1, 2)) == 3] = np.nan
        return out, cache

    def decode(self, cache, input_ids, position_ids):
        return np.eye(16, dtype=np.float32)[np.full(len(input_ids), EOS)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Artifacts base, same, nan; data of 30 items in data/."""
    for name in ("base", "same", "nan"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(session_module, "load", lambda path, verify=True: Session(Toy(path.name), Processor(), {**manifest(), "name": path.name}))
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "data", 30)
    return tmp_path


def make(folder, count, **other):
    folder.mkdir()
    lines = []
    for i in range(count):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
        turn = {"question": "what ?", "answer": "this"}
        lines.append(json.dumps({"id": f"i{i}", "images": [f"{i}.png"], "turns": [turn], "slice": ("read", "color")[i % 2], **other}))
    (folder / "items.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def complaint(capsys, *arguments):
    """(exit code, the one sentence)"""
    code = execute([str(a) for a in arguments])
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in said.err + said.out
    return code, lines[0]


def test_a_missing_image_names_the_line(place, capsys):
    (place / "data" / "7.png").unlink()
    code, line = complaint(capsys, "gate", "same", "-b", "base", "-d", "data", "-q")
    assert code == 2 and "items.jsonl:8: no image" in line and "7.png" in line


def test_an_image_that_breaks_meanwhile_keeps_the_rest(place, capsys):
    (place / "data" / "7.png").write_bytes(b"no picture")
    code, line = complaint(capsys, "eval", "same", "-d", "data", "-o", "r.jsonl", "-q")
    assert code == 2 and "1 of 30 items could not be run (first: i7:" in line and "the others are kept in r.jsonl" in line
    kept = read(place / "r.jsonl")
    assert sum(r.score == 1 for r in kept.results.values()) == 29
    code, line = complaint(capsys, "gate", "r.jsonl", "-b", "r.jsonl")
    assert code == 2 and "item i7 has no answer in the" in line and "run the evaluation again" in line
    Image.new("RGB", (8, 8), (7, 0, 0)).save(place / "data" / "7.png")
    assert execute(["eval", "same", "-d", "data", "-o", "r.jsonl", "-q"]) == 0


def test_an_unreadable_line(place, capsys):
    path = place / "data" / "items.jsonl"
    path.write_text(path.read_text() + '{"id": "half", "ima\n')
    code, line = complaint(capsys, "gate", "same", "-b", "base", "-d", "data", "-q")
    assert code == 2 and "items.jsonl:31: not a complete JSON object" in line


def test_items_that_do_not_match(place, capsys):
    assert execute(["eval", "base", "-d", "data", "-o", "base.jsonl", "-q"]) == 0
    make(place / "other", 40)
    assert execute(["eval", "same", "-d", "other", "-o", "same.jsonl", "-q"]) == 0
    capsys.readouterr()
    code, line = complaint(capsys, "gate", "same.jsonl", "-b", "base.jsonl")
    assert code == 2 and "not of the same items: 10 only in the candidate (first: i30)" in line
    code, line = complaint(capsys, "gate", "same", "-b", "base.jsonl", "-d", "other", "-q")
    assert code == 2 and "base.jsonl lacks 10 items of the data set" in line
    make(place / "asked", 30, metric="anls")
    code, line = complaint(capsys, "gate", "same", "-b", "base.jsonl", "-d", "asked", "-q")
    assert code == 2 and "item i" in line and "asked or expected something else" in line


def test_nan_logits_count_as_wrong_and_are_named(place, capsys):
    code, line = complaint(capsys, "eval", "nan", "-d", "data", "-o", "nan.jsonl", "-q")
    assert code == 1 and "1 items gave no number (first: i3: prefill: 16 of 16 logits are NaN" in line and "count as wrong" in line
    kept = read(place / "nan.jsonl")
    assert kept.results["i3"].score == 0 and sum(r.score == 1 for r in kept.results.values()) == 29
    assert execute(["gate", "nan", "-b", "base", "-d", "data", "-q"]) == 4  # one of thirty lost: no verdict, and no crash
    assert "warning: 1 items of the candidate gave no number (first: i3: prefill: 16 of 16 logits are NaN" in capsys.readouterr().err


def test_an_empty_data_set(place, capsys):
    (place / "data" / "items.jsonl").write_text("\n")
    code, line = complaint(capsys, "gate", "same", "-b", "base", "-d", "data", "-q")
    assert code == 2 and "has no items" in line
    code, line = complaint(capsys, "gate", "same", "-b", "base", "-d", "data", "--limit", 0, "-q")
    assert code == 2


def test_no_variance_is_no_certainty(place, capsys):
    """Thirty equal answers on both sides: nothing changed, and that is too little to promise a point."""
    code = execute(["gate", "same", "-b", "base", "-d", "data", "-q"])
    said = capsys.readouterr().out
    assert code == 4 and "INCONCLUSIVE" in said and "more items (" in said and "if nothing is truly lost" in said


def test_one_item(place, capsys):
    code = execute(["gate", "same", "-b", "base", "-d", "data", "-q", "--limit", 1])
    said = capsys.readouterr().out
    assert code == 4 and "1 items are too few to judge (at least 20)" in said
