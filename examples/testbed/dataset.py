"""Read a dataset folder: `items.jsonl` and the images it names (DATASET.md). Needs no torch."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError


class DatasetError(ValueError):
    """A dataset that cannot be read; the message names the file and, where there is one, the line."""


@dataclass(frozen=True)
class Turn:
    question: str
    answer: str | None = None                           # None: unlabelled (calibration)


@dataclass(frozen=True)
class Item:
    """One conversation about one or more images."""

    id: str
    sources: tuple[Path | Image.Image, ...]
    turns: tuple[Turn, ...]
    slice: str
    metric: str | None = "exact"

    @property
    def images(self) -> list[Image.Image]:
        """The pictures as RGB, opened at every call so that a long dataset stays small in memory."""
        return [open_image(s) for s in self.sources]


def open_image(source: Path | Image.Image) -> Image.Image:
    if isinstance(source, Image.Image):
        return source.convert("RGB")
    try:
        with Image.open(source) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise DatasetError(f"{source}: not a readable image ({error})") from error


# ---- scores: prediction, answer -> [0, 1] --------------------------------------------------------------------------
def exact(prediction: str, answer: str) -> float:
    """Equal up to case and spacing."""
    return float(prediction.casefold().split() == answer.casefold().split())


def words(prediction: str, answer: str) -> float:
    """The share of the answer's words that stand at their place."""
    said, want = prediction.casefold().split(), answer.casefold().split()
    return sum(a == b for a, b in zip(said, want, strict=False)) / max(len(said), len(want), 1)


METRICS: dict[str, Callable[[str, str], float]] = {"exact": exact, "words": words}


def score(prediction: str, answer: str, metric: str = "exact") -> float:
    if metric not in METRICS:
        raise DatasetError(f"no metric {metric!r}; there are {sorted(METRICS)}")
    return METRICS[metric](prediction, answer)


# ---- reading -------------------------------------------------------------------------------------------------------
def load_items(folder: str | Path) -> Iterator[Item]:
    """The items of a dataset folder, one by one, in file order."""
    file = Path(folder) / "items.jsonl"
    if not file.is_file():
        raise DatasetError(f"{file}: no such file; a dataset is a folder with items.jsonl and the images it names")
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse(line, file, number)


def parse(line: str, file: Path, number: int) -> Item:
    def want(ok: object, what: str) -> None:
        if not ok:
            raise DatasetError(f"{file}:{number}: {what}")

    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise DatasetError(f"{file}:{number}: not a complete JSON object ({error.msg} at column {error.colno})") from None
    want(isinstance(record, dict), f"expected a JSON object, found {type(record).__name__}")
    missing = [key for key in ("id", "images", "turns") if key not in record]
    want(not missing, f"missing {', '.join(missing)}; found {', '.join(record) or 'nothing'}")
    images, turns = record["images"], record["turns"]
    want(isinstance(images, list) and images and all(isinstance(i, str) for i in images), "'images' must be a list of file names")
    want(isinstance(turns, list) and turns, "'turns' must be a list of {question, answer}")
    for turn in turns:
        want(isinstance(turn, dict) and isinstance(turn.get("question"), str), f"a turn needs a 'question', found {turn!r}")
        want(isinstance(turn.get("answer"), str | None), f"an 'answer' must be text, found {turn['answer']!r}" if "answer" in turn else "")
    paths = tuple(file.parent / name for name in images)
    for path in paths:
        want(path.is_file(), f"no image {path}")
    metric = record.get("metric", "exact")
    want(metric is None or metric in METRICS, f"no metric {metric!r}; there are {sorted(METRICS)}")
    said = tuple(Turn(t["question"], t.get("answer")) for t in turns)
    return Item(str(record["id"]), paths, said, str(record.get("slice", "all")), metric)
