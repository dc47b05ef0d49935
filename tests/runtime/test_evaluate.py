"""The runner on a session that can be followed by hand: logs, resume after a kill, shards, errors."""

import json

import numpy as np
import pytest
from fakes import Engine, Processor, manifest
from PIL import Image

from foveate.runtime.datasets import Item, Turn
from foveate.runtime.errors import RunError
from foveate.runtime.evaluate import Settings, evaluate, messages, summary
from foveate.runtime.results import pairs, read
from foveate.runtime.session import Session

# red r -> features 6 * r / 10 -> token sum % 5 + 5, counted on to 10: the answers that Engine gives
ANSWERS = {10: "is this and ? w10", 20: "this and ? w10", 30: "and ? w10"}


@pytest.fixture
def items(tmp_path):
    out = []
    for i in range(9):
        red = (10, 20, 30)[i % 3]
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (8, 8), (red, 0, 0)).save(path)
        turns = (Turn("what is this ?", (ANSWERS[red] if i != 4 else "wrong",)),) * (2 if i == 8 else 1)
        out.append(Item(f"i{i}", (path,), turns, ("count", "read", "where")[i % 3]))
    return out


def session(engine=None):
    return Session(engine or Engine(), Processor(), manifest())


def content(path):
    """The file without its timings."""
    return [{k: v for k, v in json.loads(line).items() if k != "ms"} for line in path.read_text().splitlines()]


def test_scores_slices_and_turns(items, tmp_path):
    seen = []
    run = evaluate(session(), items, tmp_path / "r.jsonl", Settings(max_new_tokens=8), name="toy", progress=lambda *a: seen.append(a))
    assert [r.score for r in run.results.values()] == [1, 1, 1, 1, 0, 1, 1, 1, 1]
    assert run.results["i0"].answers == (ANSWERS[10],) and run.results["i8"].turns == 2 and len(run.results["i8"].answers) == 2
    assert seen[-1][:2] == (9, 9) and seen[-1][2] == pytest.approx(8 / 9)
    rows = {r["slice"]: r for r in summary(run)}
    assert (
        rows["overall"]["n"] == 9 and rows["read"]["score"] == pytest.approx(2 / 3) and rows["read"]["low"] < 2 / 3 < rows["read"]["high"]
    )
    assert read(tmp_path / "r.jsonl").results.keys() == run.results.keys() and run.name == "toy"


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("cut", [0, 20])
def test_a_killed_run_goes_on_and_ends_the_same(items, tmp_path, batch, cut):
    settings = Settings(max_new_tokens=8, batch=batch, logits=True)
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    evaluate(session(), items, whole, settings)

    class Killed(Exception):
        pass

    def kill(done, total, score):
        if done >= 4:
            raise Killed

    with pytest.raises(Killed):
        evaluate(session(), items, part, settings, progress=kill)
    part.write_bytes(part.read_bytes()[: -cut or None])  # also in the middle of a line
    engine = Engine()
    evaluate(session(engine), items, part, settings)
    assert content(part) == content(whole)
    samples = sum(len(c[1]["input_ids"]) for c in engine.calls if c[0] == "prefill")
    assert samples <= 10 - (max(0, 4 - batch) if cut else 4), "finished items were not computed again"
    before = part.read_bytes()
    evaluate(session(engine), items, part, settings)
    assert part.read_bytes() == before


def test_shards_together_are_the_whole(items, tmp_path):
    evaluate(session(), items, tmp_path / "w.jsonl", Settings(8))
    for k in (1, 2):
        evaluate(session(), items, tmp_path / f"{k}.jsonl", Settings(8), shard=(k, 2))
    merged = read(tmp_path / "1.jsonl", tmp_path / "2.jsonl")
    assert {k: r.answers for k, r in merged.results.items()} == {k: r.answers for k, r in read(tmp_path / "w.jsonl").results.items()}
    with pytest.raises(RunError, match="item i0 is in more than one of 2 files"):
        read(tmp_path / "1.jsonl", tmp_path / "1.jsonl")


def test_results_of_another_run_are_not_continued(items, tmp_path):
    evaluate(session(), items[:3], tmp_path / "r.jsonl", Settings(8))
    with pytest.raises(RunError, match=r"is of another run \(settings: .*max_new_tokens"):
        evaluate(session(), items[:3], tmp_path / "r.jsonl", Settings(9))
    with pytest.raises(RunError, match="is of another run"):
        evaluate(session(), items[:4], tmp_path / "r.jsonl", Settings(8))


class Nan(Engine):
    def prefill(self, feeds, capacity):
        out, cache = super().prefill(feeds, capacity)
        out["logits"][feeds["image_features"].max((1, 2)) == 20] = np.nan
        return out, cache


@pytest.mark.parametrize("batch", [1, 3])
def test_nan_is_a_wrong_answer_and_the_rest_goes_on(items, tmp_path, batch):
    run = evaluate(session(Nan()), items, tmp_path / "r.jsonl", Settings(8, batch=batch))
    bad = run.results["i1"]
    assert bad.score == 0 and bad.kind == "model" and "prefill: 16 of 16 logits are NaN" in bad.error
    assert run.results["i0"].score == 1 and len(run.errors) == 3


def test_a_damaged_picture_is_named_and_tried_again(items, tmp_path):
    good = items[2].images[0].read_bytes()
    items[2].images[0].write_bytes(b"no")
    with pytest.raises(
        RunError, match=r"1 of 9 items could not be run \(first: i2: item i2: .* not a readable picture.*the others are kept"
    ):
        evaluate(session(), items, tmp_path / "r.jsonl", Settings(8))
    assert len(read(tmp_path / "r.jsonl").results) == 9
    items[2].images[0].write_bytes(good)
    engine = Engine()
    run = evaluate(session(engine), items, tmp_path / "r.jsonl", Settings(8))
    assert run.results["i2"].score == 1 and sum(c[0] == "prefill" for c in engine.calls) == 1


def test_the_chat_of_a_second_turn():
    item = Item("x", (b"", b""), (Turn("a ?"), Turn("b ?")))
    assert messages(item, ["yes"]) == [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "a ?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "text", "text": "b ?"}]},
    ]


def test_without_a_chat_template(items, tmp_path):
    s = session()
    s.processor.chat_template = None
    assert evaluate(s, items[:3], tmp_path / "r.jsonl", Settings(8)).results["i1"].score == 1
    with pytest.raises(RunError, match="several turns, and this model has no chat template"):
        evaluate(s, items[8:], tmp_path / "s.jsonl", Settings(8))


def test_pairs_match_item_by_item(items, tmp_path):
    base = evaluate(session(), items, tmp_path / "a.jsonl", Settings(8))
    cand = evaluate(session(Nan()), items, tmp_path / "b.jsonl", Settings(8))
    got = pairs(base, cand)
    assert [(p.id, p.baseline, p.candidate) for p in got][:2] == [("i0", 1.0, 1.0), ("i1", 1.0, 0.0)] and got[8].turns == 2
    few = evaluate(session(), items[:5], tmp_path / "c.jsonl", Settings(8))
    assert len(pairs(base, few, subset=True)) == 5
    with pytest.raises(RunError, match=r"not of the same items: 4 only in the baseline \(first: i5\)"):
        pairs(base, few)
    with pytest.raises(RunError, match=r"4 only in the candidate \(first: i5\)"):
        pairs(few, base)
    other = [Item(i.id, i.images, (Turn("another ?", ("x",)),), i.slice) for i in items]
    with pytest.raises(RunError, match="item i0 asked or expected something else"):
        pairs(base, evaluate(session(), other, tmp_path / "d.jsonl", Settings(8)))
    unlabelled = evaluate(session(), [Item("u", items[0].images, (Turn("a ?"),))], tmp_path / "e.jsonl", Settings(8))
    with pytest.raises(RunError, match="item u has no reference answer or no metric"):
        pairs(unlabelled, unlabelled)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a results file"),
        ("{}\n", "not a results file"),
        ('{"foveate_results": 1}\nno json\n{}\n', ":2 is not a JSON object"),
        ('{"foveate_results": 1}\n{"id": "x"}\n', "lacks a field"),
    ],
)
def test_damaged_results(tmp_path, text, message):
    (tmp_path / "r.jsonl").write_text(text)
    with pytest.raises(RunError, match=message):
        read(tmp_path / "r.jsonl")
