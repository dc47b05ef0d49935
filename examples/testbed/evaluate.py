"""Accuracy by slice of a checkpoint through plain transformers `generate`, with Wilson 95% intervals; JSON on the last line."""

import argparse
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import islice
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")           # everything needed is in the folder

import numpy as np
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.testbed import make_data
from examples.testbed.dataset import Item, load_items, score
from examples.testbed.scenes import scene

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"


def wilson(right: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a proportion."""
    if n == 0:
        return 0.0, 1.0
    p, d = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / d
    return max(0.0, middle - half), min(1.0, middle + half)


def messages(item: Item, answers: list[str]) -> list[dict]:
    """The chat up to the next question: earlier turns carry the model's own answers."""
    said = [{"role": "user", "content": [*({"type": "image"} for _ in item.sources), {"type": "text", "text": item.turns[0].question}]}]
    for answer, turn in zip(answers, item.turns[1:], strict=False):
        said += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn.question}]
    return said


@torch.no_grad()
def answer(model, processor, items: list[Item], batch: int = 48, blank: Image.Image | None = None, room: int = 12) -> dict[str, list[str]]:
    """Greedy answers to every turn of every item, by item id; `blank` replaces all pictures."""
    answers: dict[str, list[str]] = {i.id: [] for i in items}
    for turn in range(max(len(i.turns) for i in items)):
        todo = sorted((i for i in items if len(i.turns) > turn), key=lambda i: len(i.sources))
        while todo:
            pictures = len(todo[0].sources)
            now = [i for i in todo[:batch] if len(i.sources) == pictures]
            todo = todo[len(now):]
            texts = [processor.apply_chat_template(messages(i, answers[i.id]), tokenize=False, add_generation_prompt=True) for i in now]
            images = [[blank] * len(i.sources) if blank else i.images for i in now]
            inputs = processor(images=images, text=texts, return_tensors="pt", padding=True).to(model.device)
            out = model.generate(**inputs, max_new_tokens=room, do_sample=False)
            for item, ids in zip(now, out[:, inputs["input_ids"].shape[1]:], strict=True):
                answers[item.id].append(processor.tokenizer.decode(ids, skip_special_tokens=True))
    return answers


def mark(items: Iterable[Item], answers: dict[str, list[str]]) -> dict[str, list[float]]:
    """Per slice, one score per item: the mean over its turns."""
    marks = defaultdict(list)
    for item in items:
        got = [score(a, t.answer, item.metric) for a, t in zip(answers[item.id], item.turns, strict=True)]
        marks[item.slice].append(sum(got) / len(got))
    return marks


def summary(marks: dict[str, list[float]]) -> dict:
    def row(scores: list[float]) -> dict:
        low, high = wilson(sum(scores), len(scores))
        return dict(accuracy=sum(scores) / len(scores), low=low, high=high, n=len(scores))

    everything = row([s for scores in marks.values() for s in scores])
    return dict(overall=everything["accuracy"], low=everything["low"], high=everything["high"], n=everything["n"],
                slices={name: row(scores) for name, scores in marks.items()})


def table(result: dict) -> str:
    rows = [*result["slices"].items(), ("overall", dict(result, accuracy=result["overall"]))]
    return "\n".join(
        f"{name:14s} {100 * r['accuracy']:5.1f}%  [{100 * r['low']:5.1f}, {100 * r['high']:5.1f}]  n={r['n']}" for name, r in rows)


def mean_image() -> Image.Image:
    """What a picture looks like on average: the blind model sees only this."""
    pixels = np.mean([scene(np.random.default_rng([5001, i]), "train").pixels for i in range(256)], axis=0)
    return Image.fromarray(pixels.astype(np.uint8))


def prior(items: list[Item], seen: int = 12000) -> dict[str, list[str]]:
    """The best blind guesser: to each question its most frequent answer among training items of the slice."""
    asked, sliced = defaultdict(Counter), defaultdict(Counter)
    kinds = sorted({i.slice for i in items})
    for i in range(seen):
        kind = kinds[i % len(kinds)]
        for turn in make_data.draw(np.random.default_rng([6001, i]), kind, "train")[1]:
            asked[kind, turn.question][turn.answer] += 1
            sliced[kind][turn.answer] += 1
    return {i.id: [(asked[i.slice, t.question] or sliced[i.slice]).most_common(1)[0][0] for t in i.turns] for i in items}


def load(folder: Path, **options):
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder}: no checkpoint there (no config.json); train one with train.py or pass --model DIR")
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options).eval(), AutoProcessor.from_pretrained(folder)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--limit", type=int, help="only N items, the slices taking turns")
    p.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    p.add_argument("--model", type=Path, default=CHECKPOINT)
    p.add_argument("--split", choices=["val", "test"], default="test")
    p.add_argument("--data", type=Path, help="a dataset folder instead of the generated split")
    p.add_argument("--blind", action="store_true", help="show the mean image instead of the pictures, and the best blind guesser beside it")
    p.add_argument("--wrong", type=int, default=0, help="print this many wrong answers")
    args = p.parse_args()
    items = list(islice(load_items(args.data), args.limit)) if args.data else list(make_data.items(args.split, args.limit))
    model, processor = load(args.model)
    answers = answer(model, processor, items, blank=mean_image() if args.blind else None)
    result = summary(mark(items, answers))
    if args.blind:
        result["prior"] = summary(mark(items, prior(items)))["overall"]
    if not args.json:
        print(table(result))
        if args.blind:
            print(f"best answer-prior guesser {100 * result['prior']:.1f}%")
        wrong = [(i, a) for i in items for a in [answers[i.id]] if [t.answer for t in i.turns] != a]
        for item, said in wrong[: args.wrong]:
            print(item.id, item.slice, [t.question for t in item.turns], "said", said, "truth", [t.answer for t in item.turns])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
