"""Training batches made on the fly: pictures with patch labels and captions, and conversations packed behind their pictures."""

import numpy as np
from numpy.random import Generator

from examples.testbed.questions import PAGE, SCENE, TYPE_ID, TYPES, ask, pick
from examples.testbed.scenes import COLORS, COLS, GRID, KINDS, LABEL_ID, LETTERS, ROWS, Needle, Picture, page, scene
from examples.testbed.words import BOS, EOS, PAD, encode

WRAPS = ["{}", "{}", "what color is the {} ?", "where is the {} ?", "is there a {} ?", "what is below the {} ?", "what number is {} ?"]
# How often a type is asked before its accuracy says otherwise (see `weights`).
BASE = dict(
    digit_at=0.7, shape_at=0.4, color_at=0.6, color_of=1.0, where=1.4, which_digit=1.2, which_shape=0.7, count_color=1.3, count_kind=1.0,
    exist=1.3, relation=1.6, compare=1.0, read=1.2, vtc_retrieve=1.2, vtc_associate=1.2, vtc_recall=0.8, pair_lookup=1.0, pair_which=0.8)


def weights(accuracy: np.ndarray) -> np.ndarray:
    """Ask more of what is not yet answered: accuracy[type] -> weight[type]."""
    return np.array([BASE.get(t, 0.0) for t in TYPES]) * (0.2 + 1 - accuracy)


def picture(rng: Generator, split: str, pages: float) -> Picture:
    return page(rng) if rng.random() < pages else scene(rng, split)


def name(thing) -> str:
    if isinstance(thing, Needle):
        return f"{LETTERS[thing.key]} {thing.tens} {thing.ones} {COLORS[thing.color]}"
    return f"{ROWS[thing.row]} {COLS[thing.col]} {COLORS[thing.color]} {KINDS[thing.kind]}"


def caption(rng: Generator, things: list) -> str:
    """The things in any order, sometimes only some of them."""
    n = len(things) if rng.random() < 0.6 else int(rng.integers(1, len(things) + 1))
    return " , ".join(name(things[i]) for i in rng.permutation(len(things))[:n])


def phrase(rng: Generator, thing, labels: np.ndarray) -> tuple[str, np.ndarray]:
    """Some attributes of a thing in words, and the patches of a picture that have them all."""
    needle = isinstance(thing, Needle)
    kind = (LETTERS[thing.key], thing.key) if needle else (KINDS[thing.kind], thing.kind + 1)
    have = {"color": (COLORS[thing.color], thing.color + 1), "kind": kind}
    use = pick(rng, [["kind"], ["kind"], ["color"], ["color", "kind"], ["color", "kind"]])
    match = labels[LABEL_ID["kind"]] > 0
    for what in use:
        match = match & (labels[LABEL_ID["key" if needle and what == "kind" else what]] == have[what][1])
    said = " ".join(have[what][0] for what in use)
    if not needle and rng.random() < 0.3:
        said = f"{ROWS[thing.row]} {COLS[thing.col]} {said}"
        match = match & (labels[LABEL_ID["row"]] == thing.row) & (labels[LABEL_ID["col"]] == thing.col)
    return pick(rng, WRAPS).format(said), match


def padded(texts: list[list[int]]) -> np.ndarray:
    out = np.full((len(texts), max(map(len, texts))), PAD, np.int64)
    for row, text in zip(out, texts, strict=True):
        row[: len(text)] = text
    return out


def stack(pictures: list[Picture], grid: int) -> dict[str, np.ndarray]:
    labels = np.stack([p.labels for p in pictures])
    labels = labels.repeat(grid // GRID, 2).repeat(grid // GRID, 3)
    return dict(pixels=np.stack([p.pixels for p in pictures]), labels=labels.reshape(*labels.shape[:2], -1))


def vision_batch(rng: Generator, n: int, split: str = "train", pages: float = 0.3, grid: int = GRID) -> dict[str, np.ndarray]:
    pictures = [picture(rng, split, pages) for _ in range(n)]
    phrases = []
    for i, p in enumerate(pictures):                    # half of the phrases are about another picture of the batch
        other = pictures[i if rng.random() < 0.7 else (i + 1) % n]
        phrases.append(phrase(rng, pick(rng, other.things), p.labels))
    match = np.stack([m for _, m in phrases]).repeat(grid // GRID, 1).repeat(grid // GRID, 2)
    return dict(
        **stack(pictures, grid), match=match.reshape(n, -1), phrase=padded([[BOS, *encode(t), EOS] for t, _ in phrases]),
        caption=padded([[BOS, *encode(caption(rng, p.things)), EOS] for p in pictures]))


def conversations(rng: Generator, pictures: list[Picture], weight: np.ndarray, room: int, chat: float) -> list[list]:
    """Lists of question-answer turns about one picture (or two), as many as fit into `room` tokens."""
    things = [p.things for p in pictures]
    paged = isinstance(things[0][0], Needle)
    kinds = ["pair_lookup", "pair_which"] if len(things) > 1 else list(PAGE) if paged else [k for k in SCENE if k != "describe"]
    p = np.array([weight[TYPE_ID[k]] for k in kinds])
    order = [] if len(things) > 1 else ["transcribe" if paged else "describe"]
    order += [kinds[i] for i in rng.choice(len(kinds), 60, p=p / p.sum())]
    out, seen = [], set()
    for kind in order:
        qa = ask(rng, kind, *things)
        if qa is None or qa.question in seen:
            continue
        room -= len(encode(qa.question)) + len(encode(qa.answer)) + 1
        if room < 0:
            break
        seen.add(qa.question)
        if out and len(out[-1]) == 1 and rng.random() < chat:
            out[-1].append(qa)
        else:
            out.append([qa])
    return out


def joint_batch(rng: Generator, n: int, weight: np.ndarray, *, images: int = 1, room: int = 150, chat: float = 0.2, pages: float = 0.25,
                split: str = "train", grid: int = GRID) -> dict[str, np.ndarray]:
    """n packed rows of conversations behind one picture (or `images` scenes)."""
    groups = [[picture(rng, split, pages if images == 1 else 0.0) for _ in range(images)] for _ in range(n)]
    packs = [conversations(rng, g, weight, room, chat) for g in groups]
    shape = (n, max(sum(len(encode(f"{q.question} {q.answer}")) + 1 for c in pack for q in c) for pack in packs))
    ids, segment, offset = np.zeros(shape, np.int64), np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    target, kind, answer = np.full(shape, -100, np.int64), np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    for b, pack in enumerate(packs):
        at = 0
        for s, conversation in enumerate(pack):
            start = at
            for qa in conversation:
                asked, said = encode(qa.question), [*encode(qa.answer), EOS]
                ids[b, at:at + len(asked) + len(said)] = asked + said
                here = slice(at + len(asked) - 1, at + len(asked) + len(said) - 1)
                target[b, here], kind[b, here], answer[b, here] = said, TYPE_ID[qa.type], b * 100 + (answer[b].max() + 1) % 100
                at += len(asked) + len(said)
            segment[b, start:at], offset[b, start:at] = s, np.arange(at - start)
    pictures = stack([p for g in groups for p in g], grid)
    return dict(**pictures, ids=ids, segment=segment, offset=offset, target=target, kind=kind, answer=answer)
