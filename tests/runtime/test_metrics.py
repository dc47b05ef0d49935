"""Each rule on cases worked out by hand."""

import pytest

from foveate.runtime.errors import RunError
from foveate.runtime.metrics import METRICS, binary_report, choice, edit_distance, number, score, vqa_form


@pytest.mark.parametrize(
    ("name", "prediction", "references", "want"),
    [
        ("exact", " Top  Left", ["top left"], 1),
        ("exact", "top", ["top left"], 0),
        ("exact", "b", ["a", "B"], 1),
        ("words", "3 7 1", ["3 1 1"], 2 / 3),
        ("words", "3 7 1 9", ["3 7 1"], 3 / 4),
        ("words", "", ["x"], 0),
        ("contains_all", "the numbers are 47 and 12.", ["12", "47"], 1),
        ("contains_all", "147 and 12", ["12", "47"], 0),
        ("anls", "hello", ["hallo"], 0.8),
        ("anls", "abcd", ["wxyz"], 0),
        ("anls", "HELLO ", ["x", "hello"], 1),
        ("anls", "ab", ["abcd"], 0.5),
        ("relaxed", "104", ["100"], 1),
        ("relaxed", "106", ["100"], 0),
        ("relaxed", "7.5%", ["0.075"], 1),
        ("relaxed", "Red", ["red"], 1),
        ("relaxed", "0", ["0"], 1),
        ("relaxed", "1,040", ["1000"], 1),
        ("f1", "the red cross", ["a red circle"], 0.5),
        ("f1", "yes", ["no"], 0),
        ("rouge_l", "the cat sat", ["the cat ran fast"], 4 / 7),
        ("rouge_l", "", ["x"], 0),
        ("yes_no", "Yes, there is.", ["yes"], 1),
        ("yes_no", "There is not. Yes.", ["yes"], 0),
        ("yes_no", "No", ["no"], 1),
    ],
)
def test_rules(name, prediction, references, want):
    assert score(prediction, references, name) == pytest.approx(want)


def test_vqa_accuracy_leaves_each_annotator_out():
    answers = ["red"] * 3 + ["blue"] * 7
    # of the ten choices of nine: three leave a "red" out (2 left: 2/3), seven keep all three (1)
    assert score("Red.", answers, "vqa") == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert score("blue", answers, "vqa") == 1 and score("green", answers, "vqa") == 0
    assert score("a dog", ["dog"], "vqa") == 1


@pytest.mark.parametrize(
    ("text", "want"),
    [("Two dogs!", "2 dogs"), ("The  dont", "don't"), ("1,000", "1000"), ("3.5", "3.5"), ("yes.", "yes"), ("on/off", "on off")],
)
def test_vqa_form(text, want):
    assert vqa_form(text) == want


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B. the dog", "B"),
        ("The answer is D.", "D"),
        ("I think it is a cat", "A"),
        ("cat", "A"),
        ("fish", "D"),
        ("none", None),
        ("(A) or rather (B)", "B"),
    ],
)
def test_choice(text, want):
    assert choice(text, ["cat", "dog", "bird", "fish"]) == want


def test_multiple_choice_by_letter_or_text():
    assert score("B", ["dog"], "multiple_choice", ["cat", "dog"]) == 1
    assert score("no idea", ["A"], "multiple_choice", ["cat", "dog"]) == 0


def test_binary_report():
    got = binary_report(["yes", "yes", "no", "no", "yes"], ["yes", "no", "no", "yes", "yes"])
    assert got == pytest.approx({"accuracy": 0.6, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes": 0.6})
    assert binary_report(["no"], ["no"])["f1"] == 0


def test_parts():
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "ab") == 2
    assert number("$1,200.") == 1200 and number("12 cats") is None and number("nan") is None


def test_every_metric_names_its_source_and_is_perfect_on_its_reference():
    for name, m in METRICS.items():
        assert m.source
        assert score("yes", ["yes"], name, ["yes", "no"]) == 1


def test_refusals():
    with pytest.raises(RunError, match="there is no 'exakt'; there are anls, contains_all"):
        score("a", ["a"], "exakt")
    with pytest.raises(RunError, match="needs at least one reference"):
        score("a", [], "exact")
