"""Data sets: the plain folder, mappings of common layouts, and every way in which they are broken."""

import csv
import json

import pytest
from PIL import Image

from foveate.runtime.datasets import PRESETS, load_items, take
from foveate.runtime.errors import DataError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in "ab":
        Image.new("RGB", (4, 4), "red").save(tmp_path / "images" / f"{name}.png")
    return tmp_path


def line(**other):
    return {"id": "1", "images": ["images/a.png"], "turns": [{"question": "what ?", "answer": "red"}], **other}


def write(folder, *records):
    (folder / "items.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n", encoding="utf-8")
    return folder


def test_the_plain_folder(folder):
    two = line(
        id=2,
        images=["images/a.png", "images/b.png"],
        slice="two_turn",
        group="g",
        turns=[{"question": "é ?", "answer": ["x", "y"]}, {"question": "b"}],
        metric=None,
    )
    items = load_items(write(folder, line(metric="anls"), "", two))
    assert [i.id for i in items] == ["1", "2"]
    assert items[0].turns[0].answers == ("red",) and items[0].metric == "anls" and items[0].slice == "all" and items[0].labelled
    assert len(items[1].pictures()) == 2 and items[1].pictures()[0].getpixel((0, 0)) == (255, 0, 0)
    assert items[1].turns[0].answers == ("x", "y") and not items[1].labelled and items[1].group == "g"
    assert items[0].digest != items[1].digest == load_items(folder / "items.jsonl")[1].digest


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"id": "1", "ima', r"items.jsonl:2: not a complete JSON object"),
        ("[1]", "expected a JSON object, found list"),
        ({"id": 1}, "missing images, turns; found id"),
        (line(id="x", images=["images/c.png"]), r":2: no image .*c\.png"),
        (line(id="x", images="a.png"), "'images' must be a list"),
        (line(id="x", turns=[]), "'turns' must be"),
        (line(id="x", turns=[{"answer": "x"}]), "a turn needs a 'question'"),
        (line(id="x", metric="exakt"), "no metric 'exakt'; there are anls"),
        (line(), "the id '1' occurs twice"),
        (line(id="x", turns=[{"question": "a", "answer": {}}]), "an answer must be text"),
        (line(id="x", images=["https://x/y.png"]), "is a URL"),
    ],
)
def test_broken_lines(folder, record, message):
    with pytest.raises(DataError, match=message):
        load_items(write(folder, line(), record))


def test_nothing_there(folder):
    with pytest.raises(DataError, match="no such file or folder"):
        load_items(folder / "nothing")
    with pytest.raises(DataError, match="say with --mapping"):
        load_items(folder)
    with pytest.raises(DataError, match="has no items"):
        load_items(write(folder))
    with pytest.raises(DataError, match="no data in this folder"):
        load_items(folder / "images", "pope")


def test_a_damaged_picture_names_its_item(folder):
    (folder / "images" / "a.png").write_bytes(b"no picture")
    item = load_items(write(folder, line()))[0]
    with pytest.raises(DataError, match=r"item 1: .*a\.png is not a readable picture"):
        item.pictures()


RECORDS = {
    "vqav2": {
        "question_id": 7,
        "question": "what ?",
        "answers": [{"answer": "red"}] * 10,
        "image": "images/a.png",
        "answer_type": "other",
        "image_id": 3,
    },
    "textvqa": {"question_id": 7, "question": "what ?", "answers": ["red"] * 10, "image": "images/a.png", "image_id": "x"},
    "docvqa": {"questionId": "7", "question": "what ?", "answers": ["red", "dark red"], "image": "images/a.png", "docId": 9},
    "chartqa": {"query": "what ?", "label": ["red"], "image": "images/a.png", "type": "human"},
    "pope": {"question_id": 7, "question": "what ?", "answer": "no", "image": "images/a.png", "category": "adversarial"},
    "mmmu": {
        "id": "7",
        "question": "what ?",
        "answer": "A",
        "options": "['red', 'blue']",
        "image_1": "images/a.png",
        "image_2": "images/b.png",
        "subfield": "Art",
    },
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets(folder, name):
    (folder / "x.jsonl").write_text(json.dumps(RECORDS[name]), encoding="utf-8")
    (item,) = load_items(folder / "x.jsonl", name)
    assert item.labelled and item.turns[0].question.startswith("what ?") and item.pictures()
    assert item.id == ("0" if name == "chartqa" else "7")
    assert len(item.turns[0].answers) == {"vqav2": 10, "textvqa": 10, "docvqa": 2}.get(name, 1)
    if name == "mmmu":
        assert len(item.images) == 2 and "(A) red\n(B) blue" in item.turns[0].question and item.options == ("red", "blue")


def test_csv_and_json_with_a_mapping_of_ones_own(folder):
    (folder / "dataset.yaml").write_text(
        "id: n\nquestion: q\nanswer: meta.a\nimage: file\nslice: '=mine'\nmetric: '=contains_all'\nprompt: 'Q: {question}'\n"
    )
    (folder / "d.json").write_text(json.dumps({"rows": [{"n": 1, "q": "what ?", "meta": {"a": 5}, "file": "images/a.png"}]}))
    (item,) = load_items(folder)
    assert (item.id, item.turns[0].question, item.turns[0].answers, item.slice, item.metric) == (
        "1",
        "Q: what ?",
        ("5",),
        "mine",
        "contains_all",
    )
    with (folder / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["n", "q", "file"], ["1", "what ?", "images/a.png"]])
    assert not load_items(folder / "d.csv", folder / "dataset.yaml")[0].labelled


def test_turns_by_mapping(folder):
    (folder / "m.yaml").write_text("turns: talk\nimage: image\n")
    (folder / "x.jsonl").write_text(
        json.dumps(
            {"talk": [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}], "image": ["images/a.png", "images/b.png"]}
        )
    )
    (item,) = load_items(folder / "x.jsonl", folder / "m.yaml")
    assert [t.question for t in item.turns] == ["a", "c"] and len(item.images) == 2


def test_parquet_and_saved_datasets_with_bytes(folder):
    pa = pytest.importorskip("pyarrow", reason="foveate[data]")
    import pyarrow.parquet as pq

    picture = (folder / "images" / "a.png").read_bytes()
    table = pa.Table.from_pylist(
        [{**RECORDS["docvqa"], "questionId": str(i), "image": {"bytes": picture, "path": "a.png"}} for i in range(3)]
    )
    pq.write_table(table, folder / "x.parquet")
    (folder / "saved").mkdir()
    with pa.ipc.new_stream(folder / "saved" / "data-00000-of-00001.arrow", table.schema) as stream:
        stream.write_table(table)
    (folder / "saved" / "state.json").write_text("{}")
    for path in (folder / "x.parquet", folder / "saved"):
        items = load_items(path, "docvqa")
        assert [i.id for i in items] == ["0", "1", "2"] and items[2].pictures()[0].size == (4, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("quesion: q", "unknown key 'quesion'; there are id, question"),
        ("id: x", "neither 'question' nor 'turns'"),
        ("- a", "found list"),
        ("a: [", "not YAML"),
    ],
)
def test_broken_mappings(folder, text, message):
    (folder / "m.yaml").write_text(text)
    (folder / "x.jsonl").write_text("{}")
    with pytest.raises(DataError, match=message):
        load_items(folder / "x.jsonl", folder / "m.yaml")


def test_a_field_that_is_missing_is_named(folder):
    (folder / "x.jsonl").write_text(json.dumps({"question_id": 1, "image": "images/a.png"}))
    with pytest.raises(DataError, match=r"x.jsonl:1: no field 'question'; found question_id, image"):
        load_items(folder / "x.jsonl", "pope")
    with pytest.raises(DataError, match=r"coco is no preset \(vqav2"):
        load_items(folder / "x.jsonl", "coco")
    (folder / "x.txt").write_text("")
    with pytest.raises(DataError, match=r"files of kind '\.txt' cannot be read"):
        load_items(folder / "x.txt", "pope")


def test_shards_are_a_partition(folder):
    items = load_items(write(folder, *[line(id=str(i)) for i in range(7)]))
    shards = [take(items, (k, 3)) for k in (1, 2, 3)]
    assert sorted(i.id for s in shards for i in s) == [i.id for i in items]
    with pytest.raises(DataError, match="shard 4/3"):
        take(items, (4, 3))
    assert len(load_items(folder, limit=2)) == 2
