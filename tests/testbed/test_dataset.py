"""The dataset folder: what is written is read back, and what is broken is named by file and line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from examples.testbed import make_data
from examples.testbed.dataset import DatasetError, load_items, score


@pytest.fixture
def folder(tmp_path):
    make_data.write("test", tmp_path, 36)
    return tmp_path


def lines(folder):
    return (folder / "items.jsonl").read_text().splitlines()


def broken(folder, number, text):
    """Replace one line; the error of reading the folder."""
    all_lines = lines(folder)
    all_lines[number - 1] = text
    (folder / "items.jsonl").write_text("\n".join(all_lines) + "\n")
    with pytest.raises(DatasetError) as caught:
        list(load_items(folder))
    return str(caught.value)


def test_a_written_split_reads_back_equal(folder):
    for read, made in zip(load_items(folder), make_data.items("test", 36), strict=True):
        assert (read.id, read.turns, read.slice, read.metric) == (made.id, made.turns, made.slice, made.metric)
        assert [i.tobytes() for i in read.images] == [i.tobytes() for i in made.images]


def test_calibration_has_no_answers(tmp_path):
    make_data.write("calib", tmp_path, 20)
    assert all(t.answer is None for item in load_items(tmp_path) for t in item.turns)


def test_a_truncated_line_is_named(folder):
    assert f"{folder / 'items.jsonl'}:7: not a complete JSON object" in broken(folder, 7, lines(folder)[6][:50])


def test_garbage_is_named(folder):
    assert f"{folder / 'items.jsonl'}:3: not a complete JSON object" in broken(folder, 3, "\x00\x01garbage")


@pytest.mark.parametrize(("change", "message"), [
    (dict(images=["images/none.png"]), "no image"),
    (dict(images=[]), "'images' must be a list"),
    (dict(turns=[{"answer": "7"}]), "a turn needs a 'question'"),
    (dict(turns=[{"question": "what ?", "answer": 7}]), "an 'answer' must be text, found 7"),
    (dict(metric="bleu"), "no metric 'bleu'; there are ['exact', 'words']"),
])
def test_a_bad_field_is_named(folder, change, message):
    text = json.dumps(json.loads(lines(folder)[4]) | change)
    said = broken(folder, 5, text)
    assert f"{folder / 'items.jsonl'}:5: " in said and message in said


def test_a_missing_field_is_named(folder):
    assert ":2: missing images, turns; found id" in broken(folder, 2, '{"id": "x"}')


def test_a_list_is_not_an_item(folder):
    assert ":1: expected a JSON object, found list" in broken(folder, 1, "[]")


def test_a_damaged_image_is_named(folder):
    item = next(load_items(folder))
    item.sources[0].write_bytes(item.sources[0].read_bytes()[:200])
    with pytest.raises(DatasetError, match="not a readable image"):
        _ = item.images


def test_no_folder(tmp_path):
    with pytest.raises(DatasetError, match="no such file"):
        list(load_items(tmp_path / "nothing"))


def test_reading_needs_no_torch():
    code = "import sys; from examples.testbed import dataset, make_data; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])


def test_scores():
    assert score(" Top  left", "top left") == 1.0
    assert score("top", "top left") == 0.0
    assert score("1 2 4", "1 2 3", "words") == pytest.approx(2 / 3)
    with pytest.raises(DatasetError, match="no metric 'f1'"):
        score("a", "b", "f1")
