"""Scores of one answer in [0, 1] under their standard names and rules, and the figures that need a whole data set.

A metric takes the model's text, the references and the answer's options; several references mean "the best of them" unless the rule
says otherwise.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from .errors import RunError


@dataclass(frozen=True)
class Metric:
    """One rule; `source` says where it is defined."""

    name: str
    score: Callable[[str, Sequence[str], Sequence[str]], float]  # prediction, references, options
    source: str


METRICS: dict[str, Metric] = {}
Scorer = Callable[[str, Sequence[str], Sequence[str]], float]


def metric(name: str, source: str) -> Callable[[Scorer], Scorer]:
    def register(function: Scorer) -> Scorer:
        METRICS[name] = Metric(name, function, source)
        return function

    return register


def find(name: str) -> Metric:
    if name not in METRICS:
        raise RunError(f"metric: there is no {name!r}; there are {', '.join(sorted(METRICS))}")
    return METRICS[name]


def score(prediction: str, references: Sequence[str], name: str = "exact", options: Sequence[str] = ()) -> float:
    """One answer in [0, 1]."""
    if not references:
        raise RunError(f"metric: {name} needs at least one reference answer")
    return float(find(name).score(prediction, references, options))


# -- text answers


@metric("exact", "equal up to case and spacing")
def exact(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    return max(float(_words(prediction) == _words(r)) for r in references)


@metric("words", "the share of the reference's words that stand at their place (testbed)")
def words(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    def share(said: list[str], want: list[str]) -> float:
        return sum(a == b for a, b in zip(said, want, strict=False)) / max(len(said), len(want), 1)

    return max(share(_words(prediction), _words(r)) for r in references)


@metric("contains_all", "VTCBench: every reference occurs in the answer")
def contains_all(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    said = " ".join(_words(prediction))
    return float(all(re.search(rf"(?<!\w){re.escape(' '.join(_words(r)))}(?!\w)", said) for r in references))


@metric("anls", "ANLS, threshold 0.5 (Biten et al., Scene Text VQA, ICCV 2019; DocVQA)")
def anls(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    said = " ".join(_words(prediction))

    def similarity(want: str) -> float:
        longest = max(len(said), len(want))
        value = 1 - edit_distance(said, want) / longest if longest else 1.0
        return value if value >= 0.5 else 0.0

    return max(similarity(" ".join(_words(r))) for r in references)


@metric("relaxed", "relaxed accuracy: numbers within 5% (Masry et al., ChartQA, ACL Findings 2022)")
def relaxed(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    def right(want: str) -> bool:
        a, b = number(prediction), number(want)
        if a is not None and b:
            return abs(a - b) <= 0.05 * abs(b)
        return _words(prediction) == _words(want)

    return max(float(right(r)) for r in references)


@metric("f1", "F1 of the words (Rajpurkar et al., SQuAD, EMNLP 2016)")
def f1(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    def one(want: list[str], said: list[str]) -> float:
        same = sum((Counter(want) & Counter(said)).values())
        return 2 * same / (len(want) + len(said)) if same else float(want == said)

    return max(one(squad(r), squad(prediction)) for r in references)


@metric("rouge_l", "ROUGE-L, F-measure, no stemming (Lin, ACL workshop 2004)")
def rouge_l(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    def one(want: list[str], said: list[str]) -> float:
        return 2 * common(want, said) / (len(want) + len(said)) if want and said else 0.0

    return max(one(_letters(r), _letters(prediction)) for r in references)


@metric("vqa", "VQA accuracy: min(matches / 3, 1) over all choices of 9 of the 10 annotators (Antol et al., VQA, ICCV 2015)")
def vqa(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    said, given = vqa_form(prediction), [vqa_form(r) for r in references]
    if len(given) == 1:
        return float(said == given[0])
    right = sum(said == g for g in given)
    return sum(min(1.0, (right - (said == g)) / 3) for g in given) / len(given)


@metric("yes_no", "yes or no as POPE reads it: any 'no' or 'not' in the first sentence is a no (Li et al., EMNLP 2023)")
def yes_no(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    return float(said_yes(prediction) == said_yes(references[0]))


@metric("multiple_choice", "the option's letter, or its text (MMMU's reading: the last letter that is named alone)")
def multiple_choice(prediction: str, references: Sequence[str], options: Sequence[str]) -> float:
    chosen = choice(prediction, options)
    return max(float(chosen is not None and chosen == choice(r, options)) for r in references)


# -- their parts


def _words(text: str) -> list[str]:
    return text.casefold().split()


def _letters(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def squad(text: str) -> list[str]:
    """Lower case without punctuation and articles."""
    return re.sub(r"\b(a|an|the)\b", " ", re.sub(r"[^\w\s]", "", text.lower())).split()


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's"""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence"""
    row = [0] * (len(b) + 1)
    for x in a:
        last = 0
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], last + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def number(text: str) -> float | None:
    """ "7.5%" -> 0.075, "1,200" -> 1200; None when it is no number"""
    text = text.strip().rstrip(".").replace(",", "").lstrip("$")
    try:
        value = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def said_yes(text: str) -> bool:
    first = text.split(".")[0].replace(",", " ").lower().split()
    return not any(w in ("no", "not") for w in first)


def choice(text: str, options: Sequence[str]) -> str | None:
    """The letter that an answer chooses: named in brackets, alone, or by the option's text."""
    letters = [chr(ord("A") + i) for i in range(max(len(options), 4))]
    text = text.strip()
    for pattern in (
        r"^\(?([A-Z])\)?[.:,)]?$",
        r"^([A-Z])[).:]\s",
        r"\(([A-Z])\)",
        r"\b([A-Z])\b(?=[.,)]|\s*$)",
        r"(?<!['\w])([B-HJ-Z])(?!['\w])",
    ):
        found = [m for m in re.findall(pattern, text) if m in letters]
        if found:
            return found[-1]
    for letter, option in zip(letters, options, strict=False):
        if _words(text) == _words(option):
            return letter
    inside = [
        (text.lower().rfind(o.lower()), letter) for letter, o in zip(letters, options, strict=False) if o and o.lower() in text.lower()
    ]
    return max(inside)[1] if inside else None


NUMBERS = {w: str(i) for i, w in enumerate("zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
NOT_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


@cache
def contractions() -> dict[str, str]:
    """ "dont" -> "don't": the forms that the VQA rule repairs"""
    negated = "ai are ca could did do does had has have is might must sha should was were wo would".split()
    found = {f"{w}nt": f"{w}n't" for w in negated}
    for who, ends in {
        "i": "m ve",
        "you": "d ll re ve",
        "they": "d ll re ve",
        "we": "ve",
        "he": "d s",
        "she": "s",
        "it": "d ll",
        "that": "d ll s",
        "there": "d re s",
        "what": "ll re s ve",
        "where": "d s ve",
        "who": "d ll s ve",
        "when": "s",
        "how": "d ll s",
        "let": "s",
        "could": "ve",
        "should": "ve",
        "would": "ve",
        "might": "ve",
        "must": "ve",
        "somebody": "d ll s",
        "someone": "d ll s",
        "something": "d ll",
        "yall": "ll",
        "not": "ve",
    }.items():
        found |= {f"{who}{end}": f"{who}'{end}" for end in ends.split()}
    return found


def vqa_form(text: str) -> str:
    """An answer as the VQA evaluation compares it: no punctuation, digits for number words, no articles, contractions repaired."""
    text = text.replace("\n", " ").replace("\t", " ").strip().lower()
    for mark in PUNCTUATION:
        glued = f"{mark} " in text or f" {mark}" in text or re.search(r"\d,\d", text)
        text = text.replace(mark, "" if glued else " ")
    text = NOT_PERIOD.sub("", text)
    return " ".join(contractions().get(w, w) for w in (NUMBERS.get(w, w) for w in text.split()) if w not in ("a", "an", "the"))


# -- of a whole data set


def binary_report(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall, F1 and the share of yes (POPE); "yes" is the positive class. A ratio without cases is 0."""
    said, true = [said_yes(p) for p in predictions], [said_yes(r) for r in references]
    if not said:
        raise RunError("metric: yes-no figures need at least one answer")
    both, yes, want = sum(a and b for a, b in zip(said, true, strict=True)), sum(said), sum(true)
    return {
        "accuracy": sum(a == b for a, b in zip(said, true, strict=True)) / len(said),
        "precision": both / yes if yes else 0.0,
        "recall": both / want if want else 0.0,
        "f1": 2 * both / (yes + want) if yes + want else 0.0,
        "yes": yes / len(said),
    }
