"""The generator is reproducible, its digits are split, its answers follow from what is drawn."""

import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from examples.testbed import make_data, questions, scenes, words

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("split", make_data.SPLITS)
def test_a_split_is_the_same_in_two_runs(split):
    assert make_data.digest(split, 40) == make_data.digest(split, 40)


def test_a_split_is_the_same_in_two_processes():
    command = [sys.executable, str(ROOT / "examples/testbed/make_data.py"), "--split", "test", "--limit", "40"]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed}) for seed in "12"]
    said = [run.stdout for run in runs]
    assert said[0] == said[1] == f"sha256 {make_data.digest('test', 40)}\n"


def test_no_digit_is_in_two_splits():
    pools = {split: {g.tobytes() for kind in scenes.glyphs(split) for g in kind} for split in scenes.SPLITS}
    assert all(len(pool) > 50 for pool in pools.values())
    for a, b in itertools.combinations(pools, 2):
        assert not pools[a] & pools[b], f"{a} and {b} share a handwritten digit"


def test_test_is_balanced_and_large():
    _, n = make_data.SPLITS["test"]
    assert n >= 2000 and n % len(questions.SLICES) == 0
    assert Counter(i.slice for i in make_data.items("test", 36)) == dict.fromkeys(questions.SLICES, 2)


def test_pictures_are_mostly_background():
    rng = np.random.default_rng(0)
    for draw in (lambda: scenes.scene(rng, "train"), lambda: scenes.page(rng)):
        labels = np.stack([draw().labels for _ in range(60)])
        assert 0.15 < (labels[:, 0] > 0).mean() < 0.4
        for i, (name, classes) in enumerate(scenes.LABELS.items()):
            assert labels[:, i].min() >= -1 and labels[:, i].max() < classes, name


# ---- an oracle that reads the question again and never saw how it was made -----------------------------------------
PLURALS = {"circles": "circle", "squares": "square", "triangles": "triangle", "crosses": "cross"}


def facts(picture):
    """Plain dictionaries, in reading order."""
    if isinstance(picture.things[0], scenes.Needle):
        return [dict(key=scenes.LETTERS[n.key], value=f"{n.tens} {n.ones}", color=scenes.COLORS[n.color]) for n in picture.things]
    return [
        dict(at=f"{scenes.ROWS[t.row]} {scenes.COLS[t.col]}", cell=(t.row, t.col), kind=scenes.KINDS[t.kind], color=scenes.COLORS[t.color])
        for t in picture.things]


def oracle(question: str, *pictures: list[dict]) -> str:
    def only(found):
        found = set(found)
        assert len(found) == 1, f"{question}: {found}"
        return found.pop()

    def is_digit(t):
        return t.get("kind", "").isdigit()

    if m := re.fullmatch(r"in the (first|second) image (.*)", question):
        return oracle(m[2], pictures[m[1] == "second"])
    if m := re.fullmatch(r"which image has a (\w+) \?", question):
        return only(w for w, p in zip(("first", "second"), pictures, strict=True) if any(t["kind"] == m[1] for t in p))
    things = pictures[0]
    pool = {"digit": [t for t in things if is_digit(t)], "shape": [t for t in things if not is_digit(t)]}
    rules = {
        r"what (digit|shape) is at the (\w+ \w+) \?": lambda w, at: only(t["kind"] for t in pool[w] if t["at"] == at),
        r"what color is the object at the (\w+ \w+) \?": lambda at: only(t["color"] for t in things if t["at"] == at),
        r"what color is the (\w+) \?": lambda kind: only(t["color"] for t in [t for t in things if t["kind"] == kind]),
        r"where is the (\w+) \?": lambda kind: only(t["at"] for t in things if t["kind"] == kind),
        r"what (digit|shape) is (\w+) \?": lambda w, c: only(t["kind"] for t in pool[w] if t["color"] == c),
        r"how many (\w+) objects are there \?": lambda c: str(sum(t["color"] == c for t in things)),
        r"how many digits are there \?": lambda: str(sum(map(is_digit, things))),
        r"how many (circles|squares|triangles|crosses) are there \?": lambda s: str(sum(t["kind"] == PLURALS[s] for t in things)),
        r"is there a (\w+) (\w+) \?": lambda c, k: "yes" if any((t["color"], t["kind"]) == (c, k) for t in things) else "no",
        r"what is (below|above|left of|right of) the (\w+) (\w+) \?": lambda way, c, k: relation(way, c, k),
        r"what is the (largest|smallest) digit \?": lambda w: sorted(t["kind"] for t in things if is_digit(t))[-1 if w == "largest" else 0],
        r"read the digits \.": lambda: " ".join(t["kind"] for t in things if is_digit(t)),
        r"describe the image \.": lambda: " , ".join(f"{t['at']} {t['color']} {t['kind']}" for t in things),
        r"what number is (\w) \?": lambda key: only(t["value"] for t in things if t["key"] == key),
        r"which letter is (\d \d) \?": lambda value: only(t["key"] for t in things if t["value"] == value),
        r"list the (\w+) letters \.": lambda c: " ".join(t["key"] for t in things if t["color"] == c),
        r"read the page \.": lambda: " , ".join(f"{t['key']} {t['value']}" for t in things),
    }

    def relation(way, color, kind):
        r, c = only(t["cell"] for t in things if (t["color"], t["kind"]) == (color, kind))
        there = {"below": (r + 1, c), "above": (r - 1, c), "left of": (r, c - 1), "right of": (r, c + 1)}[way]
        return only(t["kind"] for t in things if t["cell"] == there)

    for pattern, answer in rules.items():
        if m := re.fullmatch(pattern, question):
            return answer(*m.groups())
    raise AssertionError(f"no rule for {question!r}")


@pytest.mark.parametrize("kind", [*questions.SLICES, *questions.TRAINING_ONLY])
def test_answers_follow_from_the_picture(kind):
    answers = set()
    for i in range(60):
        rng = np.random.default_rng([9, i])
        if kind in questions.TRAINING_ONLY:
            pictures = [scenes.page(rng) if kind == "transcribe" else scenes.scene(rng, "val")]
            turns = [questions.ask(rng, kind, pictures[0].things)]
        else:
            pictures, turns = make_data.draw(rng, kind, "val")
        for turn in turns:
            assert turn.answer == oracle(turn.question, *map(facts, pictures))
            assert words.UNK not in [words.ID.get(w, words.UNK) for w in f"{turn.question} {turn.answer}".split()]
            answers.add(turn.answer)
    assert len(answers) > 1, "one answer to everything cannot be judged"


def test_two_turns_ask_about_different_things():
    for i in range(100):
        _, (first, second) = make_data.draw(np.random.default_rng(i), "two_turn", "val")
        assert first.type != second.type
