"""Write a split as a dataset folder: `python examples/testbed/make_data.py --split test --out DIR`."""

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.testbed.dataset import Item, Turn
from examples.testbed.questions import PAGE, PAIR, QA, SCENE, SLICES, TRAINING_ONLY, ask, pick
from examples.testbed.scenes import Picture, page, scene

SPLITS = {"val": (2001, 612), "test": (3001, 2052), "calib": (4001, 200)}       # seed, items
FIRST = [k for k in SCENE if k not in TRAINING_ONLY]


def draw(rng: np.random.Generator, kind: str, digits: str) -> tuple[list[Picture], list[QA]]:
    """Pictures and turns of one slice; draws again until the pictures allow the question."""
    while True:
        if kind == "two_turn":
            pictures, kinds = [scene(rng, digits)], [FIRST[i] for i in rng.permutation(len(FIRST))[:2]]
        elif kind == "multi_image":
            pictures, kinds = [scene(rng, digits), scene(rng, digits)], [pick(rng, list(PAIR))]
        else:
            pictures, kinds = [page(rng) if kind in PAGE else scene(rng, digits)], [kind]
        turns = [ask(rng, k, *(p.things for p in pictures)) for k in kinds]
        if all(turns):
            return pictures, turns


def generate(split: str) -> Iterator[tuple[str, str, list[Picture], list[QA]]]:
    """(id, slice, pictures, turns) of a split, the slices taking turns: any first n items are balanced."""
    seed, n = SPLITS[split]
    for i in range(n):
        kind = SLICES[i % len(SLICES)]
        yield (f"{split}-{i:05d}", kind, *draw(np.random.default_rng([seed, i]), kind, "train" if split == "calib" else split))


def items(split: str, limit: int | None = None) -> Iterator[Item]:
    """A split in memory, without writing it."""
    for id, kind, pictures, turns in islice(generate(split), limit):
        yield Item(id, tuple(Image.fromarray(p.pixels) for p in pictures), tuple(Turn(t.question, answer(split, t)) for t in turns),
                   kind, None if split == "calib" else "exact")


def answer(split: str, turn: QA) -> str | None:
    return None if split == "calib" else turn.answer


def record(item: Item, images: list[str]) -> dict:
    turns = [{"question": t.question} | ({} if t.answer is None else {"answer": t.answer}) for t in item.turns]
    return dict(id=item.id, images=images, turns=turns, slice=item.slice, metric=item.metric)


def digest(split: str, limit: int | None = None) -> str:
    """sha256 over every pixel and every line of a split."""
    sha = hashlib.sha256()
    for item in items(split, limit):
        for image in item.images:
            sha.update(image.tobytes())
        sha.update(json.dumps(record(item, [])).encode())
    return sha.hexdigest()


def write(split: str, out: Path, limit: int | None = None) -> int:
    (out / "images").mkdir(parents=True, exist_ok=True)
    count = 0
    with (out / "items.jsonl").open("w", encoding="utf-8") as lines:
        for item in items(split, limit):
            names = [f"images/{item.id}-{i}.png" for i in range(len(item.sources))]
            for name, image in zip(names, item.images, strict=True):
                image.save(out / name)
            lines.write(json.dumps(record(item, names)) + "\n")
            count += 1
    return count


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--split", choices=SPLITS, required=True)
    p.add_argument("--out", type=Path, help="folder to write; without it only the checksum is printed")
    p.add_argument("--limit", type=int, help="only the first N items (balanced over the slices)")
    args = p.parse_args()
    if args.out:
        print(f"{write(args.split, args.out, args.limit)} items in {args.out}")
    print(f"sha256 {digest(args.split, args.limit)}")


if __name__ == "__main__":
    main()
