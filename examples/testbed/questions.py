"""Question types: each turns what is in a picture into a question and its answer."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from numpy.random import Generator

from examples.testbed.scenes import COLORS, COLS, DIGITS, KINDS, LETTERS, ROWS, SHAPES, Needle, Thing, neighbours

T = TypeVar("T")
DIRECTIONS = {"below": "down", "above": "up", "left of": "left", "right of": "right"}


class QA(NamedTuple):
    type: str
    question: str
    answer: str


def pick(rng: Generator, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def place(thing: Thing) -> str:
    return f"{ROWS[thing.row]} {COLS[thing.col]}"


def name(thing: Thing) -> str:
    return f"{COLORS[thing.color]} {KINDS[thing.kind]}"


def digits(things: list[Thing]) -> list[Thing]:
    return [t for t in things if t.kind < 10]


def shapes(things: list[Thing]) -> list[Thing]:
    return [t for t in things if t.kind >= 10]


def alone(things: list[Thing], attribute: str) -> list[Thing]:
    """The things whose kind (or colour) no other thing of the list shares."""
    count = Counter(getattr(t, attribute) for t in things)
    return [t for t in things if count[getattr(t, attribute)] == 1]


# A type returns (question, answer), or None when the picture does not allow it.
Found = tuple[str, str] | None


def digit_at(rng: Generator, things: list[Thing]) -> Found:
    if found := digits(things):
        t = pick(rng, found)
        return f"what digit is at the {place(t)} ?", KINDS[t.kind]


def shape_at(rng: Generator, things: list[Thing]) -> Found:
    if found := shapes(things):
        t = pick(rng, found)
        return f"what shape is at the {place(t)} ?", KINDS[t.kind]


def color_at(rng: Generator, things: list[Thing]) -> Found:
    t = pick(rng, things)
    return f"what color is the object at the {place(t)} ?", COLORS[t.color]


def color_of(rng: Generator, things: list[Thing]) -> Found:
    if found := alone(things, "kind"):
        t = pick(rng, found)
        return f"what color is the {KINDS[t.kind]} ?", COLORS[t.color]


def where(rng: Generator, things: list[Thing]) -> Found:
    if found := alone(things, "kind"):
        t = pick(rng, found)
        return f"where is the {KINDS[t.kind]} ?", place(t)


def which_digit(rng: Generator, things: list[Thing]) -> Found:
    if found := alone(digits(things), "color"):
        t = pick(rng, found)
        return f"what digit is {COLORS[t.color]} ?", KINDS[t.kind]


def which_shape(rng: Generator, things: list[Thing]) -> Found:
    if found := alone(shapes(things), "color"):
        t = pick(rng, found)
        return f"what shape is {COLORS[t.color]} ?", KINDS[t.kind]


def balanced(rng: Generator, counts: dict[str, int]) -> tuple[str, str]:
    """A thing to count: first a count among those that occur, then what has it."""
    n = pick(rng, sorted(set(counts.values())))
    return pick(rng, [what for what in counts if counts[what] == n]), str(n)


def count_color(rng: Generator, things: list[Thing]) -> Found:
    color, n = balanced(rng, {c: sum(COLORS[t.color] == c for t in things) for c in COLORS})
    return f"how many {color} objects are there ?", n


def count_kind(rng: Generator, things: list[Thing]) -> Found:
    if rng.random() < 0.4:
        return "how many digits are there ?", str(len(digits(things)))
    shape, n = balanced(rng, {s: sum(KINDS[t.kind] == s for t in things) for s in SHAPES})
    return f"how many {PLURAL[shape]} are there ?", n


def exist(rng: Generator, things: list[Thing]) -> Found:
    if rng.random() < 0.5:
        return f"is there a {name(pick(rng, things))} ?", "yes"
    there = {(t.kind, t.color) for t in things}
    for _ in range(20):                                 # mostly hard: the kind or the colour is there, the pair is not
        kind = pick(rng, things).kind if rng.random() < 0.6 else int(rng.integers(14))
        color = pick(rng, things).color if rng.random() < 0.6 else int(rng.integers(len(COLORS)))
        if (kind, color) not in there:
            return f"is there a {COLORS[color]} {KINDS[kind]} ?", "no"
    return None


def relation(rng: Generator, things: list[Thing]) -> Found:
    names = Counter(name(t) for t in things)
    found = [(way, t, near[step]) for t in things if names[name(t)] == 1 for near in [neighbours(t, things)]
             for way, step in DIRECTIONS.items() if near[step]]
    if found:
        way, t, other = pick(rng, found)
        return f"what is {way} the {name(t)} ?", KINDS[other.kind]


def compare(rng: Generator, things: list[Thing]) -> Found:
    values = {t.kind for t in digits(things)}
    if len(values) > 1:
        word, best = pick(rng, [("largest", max), ("smallest", min)])
        return f"what is the {word} digit ?", str(best(values))


def read(rng: Generator, things: list[Thing]) -> Found:
    if len(digits(things)) > 1:
        return "read the digits .", " ".join(KINDS[t.kind] for t in digits(things))


def describe(rng: Generator, things: list[Thing]) -> Found:
    return "describe the image .", " , ".join(f"{place(t)} {name(t)}" for t in things)


def number(needle: Needle) -> str:
    return f"{DIGITS[needle.tens]} {DIGITS[needle.ones]}"


def vtc_retrieve(rng: Generator, needles: list[Needle]) -> Found:
    n = pick(rng, needles)
    return f"what number is {LETTERS[n.key]} ?", number(n)


def vtc_associate(rng: Generator, needles: list[Needle]) -> Found:
    n = pick(rng, needles)
    return f"which letter is {number(n)} ?", LETTERS[n.key]


def vtc_recall(rng: Generator, needles: list[Needle]) -> Found:
    color = pick(rng, needles).color
    return f"list the {COLORS[color]} letters .", " ".join(LETTERS[n.key] for n in needles if n.color == color)


def transcribe(rng: Generator, needles: list[Needle]) -> Found:
    return "read the page .", " , ".join(f"{LETTERS[n.key]} {number(n)}" for n in needles)


def pair_lookup(rng: Generator, first: list[Thing], second: list[Thing]) -> Found:
    """A question on one picture, asked with both in view."""
    which, things = pick(rng, [("first", first), ("second", second)])
    if found := pick(rng, [digit_at, shape_at, color_at, color_of])(rng, things):
        return f"in the {which} image {found[0]}", found[1]


def pair_which(rng: Generator, first: list[Thing], second: list[Thing]) -> Found:
    """Which picture holds a kind that only one of them has."""
    kinds = [{t.kind for t in things} for things in (first, second)]
    if found := [(k, which) for which, has, other in (("first", *kinds), ("second", *kinds[::-1])) for k in sorted(has - other)]:
        kind, which = pick(rng, found)
        return f"which image has a {KINDS[kind]} ?", which


PLURAL = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
SCENE: dict[str, Callable[..., Found]] = {f.__name__: f for f in (
    digit_at, shape_at, color_at, color_of, where, which_digit, which_shape, count_color, count_kind, exist, relation, compare, read,
    describe)}
PAGE: dict[str, Callable[..., Found]] = {f.__name__: f for f in (vtc_retrieve, vtc_associate, vtc_recall)}
PAIR: dict[str, Callable[..., Found]] = {f.__name__: f for f in (pair_lookup, pair_which)}
TYPES = {**SCENE, **PAGE, **PAIR, "transcribe": transcribe}          # order matters to saved runs
TYPE_ID = {kind: i for i, kind in enumerate(TYPES)}
TRAINING_ONLY = ("describe", "transcribe")             # list everything: dense supervision, no question
SLICES = [*(k for k in SCENE if k not in TRAINING_ONLY), *PAGE, "two_turn", "multi_image"]


def ask(rng: Generator, kind: str, *pictures: list) -> QA | None:
    found = TYPES[kind](rng, *pictures)
    return QA(kind, *found) if found else None
