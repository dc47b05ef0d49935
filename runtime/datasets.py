"""Items to evaluate: pictures, one or more questions, reference answers, a slice, a metric.

Read are: the folder with items.jsonl (examples/testbed/DATASET.md); and, through a small mapping, JSONL, JSON, CSV and parquet files
and folders of
them, and folders saved with `datasets.save_to_disk`. A mapping is a preset name, a YAML file, or `dataset.yaml` in the folder:

    id: question_id            # field names; "a.b" goes into a structure
    question: question
    answer: answers            # text, a list of references, or a list of {answer: text}
    image: [image]             # path, URL-free; {bytes, path} as Hugging Face stores it; a list of either
    turns: conversation        # instead of question and answer: a list of {question, answer}
    options: options           # of a multiple-choice question; a list, or text that looks like one
    slice: question_type       # optional; "=text" is a constant
    metric: =vqa
    group: image_id            # optional: items of one group are not independent
    prompt: "{question}\\n{options}\\nAnswer with the option's letter from the given choices directly."
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from . import metrics
from .errors import DataError

SHORT = "{question}\nAnswer the question using a single word or phrase."
PRESETS: dict[str, dict[str, Any]] = {
    "vqav2": {
        "id": "question_id",
        "question": "question",
        "answer": "answers",
        "image": "image",
        "slice": "answer_type",
        "metric": "=vqa",
        "group": "image_id",
        "prompt": SHORT,
    },
    "textvqa": {
        "id": "question_id",
        "question": "question",
        "answer": "answers",
        "image": "image",
        "slice": "=text",
        "metric": "=vqa",
        "group": "image_id",
        "prompt": SHORT,
    },
    "docvqa": {
        "id": "questionId",
        "question": "question",
        "answer": "answers",
        "image": "image",
        "slice": "=doc",
        "metric": "=anls",
        "group": "docId",
        "prompt": SHORT,
    },
    "chartqa": {
        "id": None,
        "question": ["question", "query"],
        "answer": ["answer", "label"],
        "image": "image",
        "slice": "type",
        "metric": "=relaxed",
        "prompt": SHORT,
    },
    "pope": {
        "id": "question_id",
        "question": "question",
        "answer": "answer",
        "image": "image",
        "slice": "category",
        "metric": "=yes_no",
        "group": "image_source",
        "prompt": SHORT,
    },
    "mmmu": {
        "id": "id",
        "question": "question",
        "answer": "answer",
        "options": "options",
        "image": [f"image_{i}" for i in range(1, 8)],
        "slice": "subfield",
        "metric": "=multiple_choice",
        "prompt": "{question}\n{options}\nAnswer with the option's letter from the given choices directly.",
    },
}
KEYS = ("id", "question", "answer", "image", "turns", "options", "slice", "metric", "group", "prompt")
Source = Path | bytes


@dataclass(frozen=True)
class Turn:
    question: str
    answers: tuple[str, ...] = ()  # none: unlabelled


@dataclass(frozen=True)
class Item:
    """One conversation about no, one or more pictures; the pictures stand before the first question."""

    id: str
    images: tuple[Source, ...]
    turns: tuple[Turn, ...]
    slice: str = "all"
    metric: str | None = "exact"
    options: tuple[str, ...] = ()
    group: str | None = None

    def pictures(self) -> list[Image.Image]:
        """Opened at every call, so that a long data set stays small in memory."""
        return [open_image(s, self.id) for s in self.images]

    @property
    def labelled(self) -> bool:
        return self.metric is not None and all(t.answers for t in self.turns)

    @property
    def digest(self) -> str:
        """Of what is asked and expected; results of another question under the same id are noticed by it."""
        names = [s.name if isinstance(s, Path) else hashlib.sha256(s).hexdigest()[:16] for s in self.images]
        text = json.dumps([names, [[t.question, t.answers] for t in self.turns], self.metric, self.options], ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def open_image(source: Source, owner: str) -> Image.Image:
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise DataError(
            f"item {owner}: {source if isinstance(source, Path) else 'its picture'} is not a readable picture ({error})"
        ) from None


def load_items(path: str | Path, mapping: str | Path | None = None, limit: int | None = None) -> list[Item]:
    """All items in file order. Every defect is a DataError that names the file and the line or row; nothing is skipped."""
    path = Path(path)
    items: list[Item] = []
    seen: set[str] = set()
    for item in _items(path, mapping):
        if item.id in seen:
            raise DataError(f"{path}: the id {item.id!r} occurs twice")
        seen.add(item.id)
        items.append(item)
        if limit is not None and len(items) >= limit:
            break
    if not items:
        raise DataError(f"{path}: the data set has no items")
    return items


def _items(path: Path, mapping: str | Path | None) -> Iterator[Item]:
    if not path.exists():
        raise DataError(
            f"{path}: no such file or folder; a data set is a folder with items.jsonl, or a JSONL, JSON, CSV or parquet file with a mapping"
        )
    if mapping is None and path.is_dir():
        if (path / "items.jsonl").is_file():
            yield from (_plain(r, where, path) for r, where in _jsonl(path / "items.jsonl"))
            return
        if (path / "dataset.yaml").is_file():
            mapping = path / "dataset.yaml"
    elif mapping is None and path.name == "items.jsonl":
        yield from (_plain(r, where, path.parent) for r, where in _jsonl(path))
        return
    if mapping is None:
        raise DataError(f"{path}: it has no items.jsonl; say with --mapping which fields to read: {', '.join(PRESETS)}, or a YAML file")
    rule = load_mapping(mapping)
    for index, (record, where) in enumerate(_records(path)):
        yield _mapped(record, where, rule, path if path.is_dir() else path.parent, index)


# -- the plain folder


def _plain(record: Mapping[str, Any], where: str, folder: Path) -> Item:
    missing = [key for key in ("id", "images", "turns") if key not in record]
    _want(not missing, where, f"missing {', '.join(missing)}; found {', '.join(record) or 'nothing'}")
    images, turns, options = record["images"], record["turns"], record.get("options") or []
    _want(isinstance(images, list) and all(isinstance(i, str) for i in images), where, "'images' must be a list of file names")
    _want(isinstance(turns, list) and turns, where, "'turns' must be a list of {question, answer}")
    _want(isinstance(options, list) and all(isinstance(o, str) for o in options), where, "'options' must be a list of texts")
    for turn in turns:
        _want(isinstance(turn, dict) and isinstance(turn.get("question"), str), where, f"a turn needs a 'question', found {turn!r}")
    group = record.get("group")
    return Item(
        str(record["id"]),
        tuple(_path(folder, i, where) for i in images),
        tuple(Turn(t["question"], _answers(t.get("answer"), where)) for t in turns),
        str(record.get("slice", "all")),
        _metric(record.get("metric", "exact"), where),
        tuple(options),
        None if group is None else str(group),
    )


def _answers(value: Any, where: str) -> tuple[str, ...]:
    """Text, a number, a list of them, or of {answer: text}."""
    if value is None:
        return ()
    values = value if isinstance(value, (list, tuple)) else [value]
    values = [v.get("answer") if isinstance(v, Mapping) else v for v in values]
    _want(
        values and all(isinstance(v, (str, int, float)) for v in values),
        where,
        f"an answer must be text or a list of texts, found {value!r}",
    )
    return tuple(str(v) for v in values)


def _metric(name: Any, where: str) -> str | None:
    _want(name is None or name in metrics.METRICS, where, f"no metric {name!r}; there are {', '.join(sorted(metrics.METRICS))}")
    return name


def _path(folder: Path, name: str, where: str) -> Path:
    _want(not name.startswith(("http://", "https://")), where, f"{name} is a URL; download it first, nothing is fetched")
    path = folder / name
    _want(path.is_file(), where, f"no image {path}")
    return path


def _want(ok: object, where: str, what: str) -> None:
    if not ok:
        raise DataError(f"{where}: {what}")


# -- anything else, by a mapping


def load_mapping(source: str | Path) -> dict[str, Any]:
    """A preset or a YAML file -> field names by key."""
    if str(source) in PRESETS:
        return PRESETS[str(source)]
    import yaml

    path = Path(source)
    if not path.is_file():
        raise DataError(f"mapping: {source} is no preset ({', '.join(PRESETS)}) and no file")
    try:
        rule = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML ({str(error).splitlines()[0]})") from None
    _want(isinstance(rule, dict), str(path), f"a mapping is 'key: field' lines, found {type(rule).__name__}")
    unknown = [k for k in rule if k not in KEYS]
    _want(not unknown, str(path), f"unknown key {unknown[0] if unknown else ''!r}; there are {', '.join(KEYS)}")
    _want("turns" in rule or "question" in rule, str(path), "it names neither 'question' nor 'turns'")
    return rule


def _mapped(record: Mapping[str, Any], where: str, rule: Mapping[str, Any], folder: Path, index: int) -> Item:
    options = _options(_field(record, rule.get("options"), where, needed=False))
    if "turns" in rule:
        given = _field(record, rule["turns"], where)
        _want(
            isinstance(given, (list, tuple)) and given and all(isinstance(t, Mapping) and "question" in t for t in given),
            where,
            "turns must be a list of {question, answer}",
        )
        pairs = [(str(t["question"]), t.get("answer")) for t in given]
    else:
        pairs = [(str(_field(record, rule["question"], where)), _field(record, rule.get("answer"), where, needed=False))]
    prompt = rule.get("prompt", "{question}")
    listed = "\n".join(f"({chr(ord('A') + i)}) {o}" for i, o in enumerate(options))
    turns = tuple(Turn(prompt.replace("{options}", listed).replace("{question}", q), _answers(a, where)) for q, a in pairs)
    fields = rule.get("image") or []
    found = [
        _field(record, f, where, needed=len(fields) == 1 or isinstance(fields, str))
        for f in ([fields] if isinstance(fields, str) else fields)
    ]
    images = [i for value in found if value is not None for i in (value if isinstance(value, (list, tuple)) else [value])]
    name = _field(record, rule.get("id"), where, needed=rule.get("id") is not None)
    group = _field(record, rule.get("group"), where, needed=False)
    return Item(
        str(index if name is None else name),
        tuple(_image(i, folder, where) for i in images),
        turns,
        str(_field(record, rule.get("slice"), where, needed=False) or "all"),
        _metric(_field(record, rule.get("metric", "=exact"), where), where),
        options,
        None if group is None else str(group),
    )


def _field(record: Mapping[str, Any], name: Any, where: str, needed: bool = True) -> Any:
    """A field by name, "a.b" path, "=constant", or the first of several names that exists."""
    if isinstance(name, str) and name.startswith("="):
        return name[1:]
    for candidate in [name] if isinstance(name, str) else name or []:
        value: Any = record
        for part in candidate.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    _want(not needed, where, f"no field {name!r}; found {', '.join(map(str, record)) or 'nothing'}")
    return None


def _options(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):  # MMMU stores the list as text
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            value = [value]
    return tuple(str(v) for v in value or ())


def _image(value: Any, folder: Path, where: str) -> Source:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    _want(isinstance(value, str), where, f"an image must be a path or bytes, found {type(value).__name__}")
    return _path(folder, value, where)


# -- files


def _records(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(record, where) of a file, or of all files of the first known kind in a folder, by name."""
    if path.is_file():
        if path.suffix not in READERS:
            raise DataError(f"{path}: files of kind {path.suffix!r} cannot be read; possible: {', '.join(READERS)}")
        yield from READERS[path.suffix](path)
        return
    for suffix, reader in READERS.items():
        if found := sorted(p for p in path.rglob(f"*{suffix}") if p.name not in ("state.json", "dataset_info.json", "dataset_dict.json")):
            for file in found:
                yield from reader(file)
            return
    raise DataError(f"{path}: no data in this folder; possible files: {', '.join(READERS)}")


def _jsonl(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{where}: not a complete JSON object ({getattr(error, 'msg', None) or error})") from None
            _want(isinstance(record, dict), where, f"expected a JSON object, found {type(record).__name__}")
            yield record, where


def _json(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    """A list of objects, or an object with one list of objects (VQA's {"questions": [...]})."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    lists = (
        [content]
        if isinstance(content, list)
        else [v for v in content.values() if isinstance(v, list)]
        if isinstance(content, dict)
        else []
    )
    _want(len(lists) == 1 and all(isinstance(r, dict) for r in lists[0]), str(path), "expected one list of objects")
    yield from ((r, f"{path}[{i}]") for i, r in enumerate(lists[0]))


def _csv(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    with path.open(newline="", encoding="utf-8") as file:
        for i, row in enumerate(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")):
            yield {k: v for k, v in row.items() if v not in (None, "")}, f"{path}:{i + 2}"


def _parquet(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    parquet = _pyarrow(path, "parquet")
    try:
        for i, row in _rows(parquet.ParquetFile(path).iter_batches(64)):
            yield row, f"{path} row {i}"
    except _pyarrow(path, "lib").ArrowException as error:
        raise DataError(f"{path}: not parquet ({str(error).splitlines()[0]})") from None


def _arrow(path: Path) -> Iterator[tuple[Mapping[str, Any], str]]:
    ipc = _pyarrow(path, "ipc")
    try:
        with path.open("rb") as file:
            for i, row in _rows(ipc.open_stream(file)):
                yield row, f"{path} row {i}"
    except _pyarrow(path, "lib").ArrowException as error:
        raise DataError(f"{path}: not an Arrow stream ({str(error).splitlines()[0]})") from None


def _rows(batches: Iterable[Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    index = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield index, row
            index += 1


def _pyarrow(path: Path, module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(f"pyarrow.{module}")
    except ImportError:
        raise DataError(f"{path}: reading it needs pyarrow; install foveate[data]") from None


READERS: dict[str, Callable[[Path], Iterator[tuple[Mapping[str, Any], str]]]] = {
    ".arrow": _arrow,
    ".parquet": _parquet,
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
}


def take(items: Sequence[Item], shard: tuple[int, int]) -> list[Item]:
    """Shard i of n (1-based): every n-th item, so that slices that take turns stay balanced."""
    index, count = shard
    if not 1 <= index <= count:
        raise DataError(f"shard {index}/{count}: write it as i/n with 1 <= i <= n")
    return list(items[index - 1 :: count])
