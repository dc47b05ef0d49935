"""What a teacher knows about unlabelled pictures and questions: its greedy answers, its distributions, its hidden rows and its image features, on disk.

The folder holds shards of `SHARD` sources in safetensors and `cache.json`. An interrupted build goes on at the first missing shard. Labels are never
read. A row is one beginning (everything up to the last image token) and one or more questions with the teacher's answers behind it. Memory holds
neither the pictures nor the rows of a large data set: both are opened when they are needed.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .distill_error import DistillError
from .distill_view import ANSWERS, SEGMENT, TEXTS, trainable, training_view
from .export.artifact import Artifact
from .export.backends.base import find
from .graph.program import Program
from .in_memory import in_memory
from .passes.insert import reference
from .runtime import prompts
from .runtime.batch import Batch, Layout, assemble, image_groups, lay_out
from .runtime.context import compressed
from .runtime.datasets import load_items, open_image
from .runtime.image_cache import read
from .runtime.result import Timings
from .runtime.session import Session, Stop

SHARD = 32
OPEN = 64  # shards that are open at a time
TOP = 64  # of the teacher's distribution are kept where the vocabulary is larger than FULL
FULL = 512
Say = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """Pictures, and what is asked about them; every question stands alone behind the pictures. context: a text that belongs to all questions.

    A picture is a PIL image, a path, a uint8 array, or a function that opens one.
    """

    pictures: tuple[Any, ...]
    questions: tuple[str, ...]
    context: str = ""

    def opened(self) -> list[Any]:
        return [p() if callable(p) else p for p in self.pictures]


@dataclass(frozen=True)
class Stored:
    """A picture of a data set's item, opened at every call."""

    source: Path | bytes
    item: str

    def __call__(self) -> Any:
        return open_image(self.source, self.item)


def sources(data: Any) -> list[Source]:
    """From a data set's folder or file (see docs/judge.md), items of one, (pictures, questions) or (pictures, questions, context). Labels are not looked at.

    Items about the same pictures become one source, so that none of them is held out while another trains.
    """
    if isinstance(data, (str, Path)):
        data = load_items(data)
    found: list[Source] = []
    seen: dict[Any, int] = {}  # the pictures of items -> their place among `found`
    for entry in data:
        if isinstance(entry, Source):
            found.append(entry)
        elif hasattr(entry, "turns"):
            at = seen.setdefault(entry.images or entry.id, len(found))
            if at == len(found):
                found.append(Source(tuple(Stored(s, entry.id) for s in entry.images), ()))
            asked = dict.fromkeys([*found[at].questions, *(t.question for t in entry.turns[:1])])
            found[at] = replace(found[at], questions=tuple(asked))
        else:
            pictures, questions, *context = entry
            several = isinstance(pictures, (list, tuple))
            found.append(Source(tuple(pictures) if several else (pictures,), (questions,) if isinstance(questions, str) else tuple(questions), *context))
    if not found:
        raise DistillError("distill: the data are empty; give pictures with at least one question each")
    if bare := [i for i, s in enumerate(found) if not s.pictures or any(p is None for p in s.pictures)]:
        raise DistillError(f"distill: {len(bare)} of {len(found)} entries have no picture (first: number {bare[0]}); visual tokens cannot be learned from text")
    if silent := [i for i, s in enumerate(found) if not s.questions]:
        raise DistillError(f"distill: {len(silent)} of {len(found)} entries have no question (first: number {silent[0]})")
    return found


@dataclass(frozen=True)
class Making:
    """How the teacher was asked. room: text tokens of a row; hidden: layers whose entry is kept (the number of layers is the end)."""

    hidden: tuple[int, ...] = ()
    room: int = 160
    max_new_tokens: int = 64
    packed: bool = True
    until: str | int | None = None  # what ends the prefix that a recipe compresses (facts.context): where the sources' contexts stand
    pixels: bool = False  # keep the processor's arrays too: for insertions in the vision stage
    target: str = "ort"  # on which the answers are generated
    batch: int = 32


@dataclass(frozen=True)
class Segment:
    question: np.ndarray  # int64[q], what follows the beginning
    answer: np.ndarray  # int64[a], ends with the end token unless it was cut off


@dataclass(frozen=True)
class Row:
    """One image (or several) and what was asked about it."""

    beginning: np.ndarray
    segments: tuple[Segment, ...]
    images: int
    vision: Mapping[str, np.ndarray]  # the processor's arrays (empty unless kept), grids always
    features: Mapping[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None  # [R, K] log-probabilities of the teacher
    index: Tensor | None = None  # [R, K] their tokens; None: all of the vocabulary
    hidden: Mapping[int, Tensor] = field(default_factory=dict)

    @property
    def answers(self) -> int:
        return sum(len(s.answer) for s in self.segments)

    @property
    def texts(self) -> int:
        return sum(len(s.question) + len(s.answer) - 1 for s in self.segments)

    def split(self) -> list[Row]:
        """The same questions, one row each: for students that look at the question while they choose among the visual tokens."""
        found, r, q = [], 0, 0
        for s in self.segments:
            a, t = len(s.answer), len(s.question) + len(s.answer) - 1
            index = None if self.index is None else self.index[r : r + a]
            found.append(replace(self, segments=(s,), logits=self.logits[r : r + a], index=index,  # type: ignore[index]
                                 hidden={l: h[q : q + t] for l, h in self.hidden.items()}))
            r, q = r + a, q + t
        return found

    @cached_property
    def wanted(self) -> np.ndarray:
        """int64[R]: the answer tokens"""
        return np.concatenate([s.answer for s in self.segments])


# ---- rows -> feeds


def collate(rows: Sequence[Row], facts: Mapping[str, Any], features: Mapping[str, Sequence[Tensor]] | None = None) -> dict[str, Tensor]:
    """Rows as the inputs of a training view whose program has these facts; features default to the teacher's."""
    laid = [lay(row, facts) for row in rows]
    names = facts["features"]
    given = {n: [(features[n][b] if features else rows[b].features[n]).float().numpy() for b in range(len(rows))] for n in names}
    batch = assemble([layout for layout, *_ in laid], given, facts, _pad(facts))
    feeds = {n: torch.from_numpy(a) for n, a in batch.feeds.items()}
    feeds[SEGMENT] = _padded([s for _, s, _, _ in laid], batch.length, -1)
    feeds[ANSWERS] = _padded([a for _, _, a, _ in laid], max(len(a) for _, _, a, _ in laid), -1)
    feeds[TEXTS] = _padded([t for _, _, _, t in laid], max(len(t) for _, _, _, t in laid), -1)
    return feeds


def lay(row: Row, facts: Mapping[str, Any]) -> tuple[Layout, np.ndarray, np.ndarray, np.ndarray]:
    """-> the row's layout, segment[T], and the text ranks of the rows that predict answers and of all question and answer rows"""
    rule, grids = facts["positions"], row.vision.get("image_grid_thw")
    groups = image_groups(row.beginning, facts["image_token_id"], row.images, facts.get("tokens_per_image"), grids, int(rule.get("merge", 1)))
    fixed = facts.get("features_per_image")
    counts = [len(g) if fixed is None else fixed for g in groups]
    tokens, positions, segment, answers, texts = [], [], [], [], []
    start = rank = 0
    for number, s in enumerate(row.segments):
        fed = np.concatenate([s.question, s.answer[:-1]])
        part = lay_out(np.concatenate([row.beginning, fed]), groups, counts, grids, rule)
        if facts.get("context"):
            part = compressed(part, facts["context"], len(part.tokens) - len(fed))
        if number == 0:
            start = len(part.tokens) - len(fed)
            first = part
            tokens.append(part.tokens[:start]), positions.append(part.positions[..., :start]), segment.append(np.zeros(start, np.int64))
            rank = start - part.visual
        tokens.append(part.tokens[start:]), positions.append(part.positions[..., start:]), segment.append(np.full(len(fed), number + 1, np.int64))
        answers.append(rank + len(s.question) - 1 + np.arange(len(s.answer)))
        texts.append(rank + np.arange(len(fed)))
        rank += len(fed)
    layout = replace(first, tokens=np.concatenate(tokens), positions=np.concatenate(positions, -1), next_position=0)
    return layout, np.concatenate(segment), np.concatenate(answers), np.concatenate(texts)


def _padded(rows: Sequence[np.ndarray], length: int, fill: int) -> Tensor:
    out = np.full((len(rows), length), fill, np.int64)
    for target, row in zip(out, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(out)


def _pad(facts: Mapping[str, Any]) -> int:
    """Any token but the image's."""
    return next(t for t in (*facts["eos_token_ids"], 0, 1) if t != facts["image_token_id"])


# ---- the teacher


class Teacher:
    """The original program: answers by an artifact of it (fast), distributions and hidden rows by its graph."""

    def __init__(self, program: Program, processor: Any, making: Making) -> None:
        self.program, self.processor, self.making = program, processor, making
        self.facts = asdict(program.facts)
        view = training_view(program, making.hidden, making.packed)
        self.forward = trainable(view["prefill"], ["logits", *[f"hidden.{l}" for l in making.hidden]])
        self.see = trainable(program["vision"], list(program.facts.features))
        self.folder = tempfile.TemporaryDirectory(prefix="foveate-teacher-")
        self.session = self._session(Path(self.folder.name) / "teacher")

    def _session(self, path: Path) -> Session:
        """What answers: an artifact where its target takes the program, else the program where it is (half precision on a CPU, any on a GPU)."""
        backend = find(self.making.target)
        if reference(self.program).device.type != "cpu" or backend.check(self.program, backend.settings({})):
            return in_memory(self.program, self.processor)
        with Artifact.create(path) as draft:
            components = backend.lower(self.program, draft.folder, backend.settings({}))
            table, facts = [asdict(e) for e in self.program.kv], json.loads(json.dumps(self.facts))
            draft.manifest.update(target=self.making.target, facts=facts, kv=table, components=components)
        artifact = Artifact.load(path)
        return Session(backend.open(artifact), self.processor, artifact.manifest)

    def rows(self, source: Source) -> list[Row]:
        """The source's questions, answered, packed into rows of at most `room` text tokens."""
        pictures = source.opened()
        samples = [self._sample(pictures, q, source.context) for q in source.questions]
        starts = [self._beginning(s.tokens) for s in samples]
        feats = self._features(samples[0])
        answers = self._answers(samples, starts, feats)
        kept = {n: a for n, a in samples[0].vision.items() if self.making.pixels or n == "image_grid_thw"}
        rows: list[Row] = []
        open_: dict[bytes, list[Segment]] = {}
        for sample, start, answer in zip(samples, starts, answers, strict=True):
            segment = Segment(sample.tokens[start:], answer)
            key = sample.tokens[:start].tobytes()
            waiting = open_.setdefault(key, [])
            used = sum(len(s.question) + len(s.answer) for s in waiting)
            if waiting and (not self.making.packed or used + len(segment.question) + len(answer) > self.making.room):
                rows.append(Row(sample.tokens[:start], tuple(waiting), len(source.pictures), kept, feats))
                waiting.clear()
            waiting.append(segment)
        rows += [Row(np.frombuffer(k, np.int64).copy(), tuple(w), len(source.pictures), kept, feats) for k, w in open_.items() if w]
        return rows

    def judge(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with the teacher's distributions and hidden states."""
        with torch.no_grad():
            out = self.forward(collate(rows, self.facts))
        done = []
        for b, row in enumerate(rows):
            values, index = out["logits"][b, : row.answers].float().cpu().log_softmax(-1), None
            if values.shape[1] > FULL:
                values, index = values.topk(TOP, 1)
            done.append(Row(row.beginning, row.segments, row.images, row.vision, row.features, small(values), None if index is None else index.int(),
                            {l: small(out[f"hidden.{l}"][b, : row.texts]) for l in self.making.hidden}))
        return done

    def close(self) -> None:
        self.session.close()
        self.folder.cleanup()

    def _sample(self, pictures: Sequence[Any], question: str, context: str) -> Any:
        """The context stands before the pictures where a prefix ends at them, else between pictures and question."""
        first = bool(context) and self.making.until == "image"
        front, behind = [context] * first, [*[context] * (bool(context) and not first), question]
        if getattr(self.processor, "chat_template", None):
            content = [*_text(front), *[{"type": "image"}] * len(pictures), *_text(behind)]
            asked = prompts.requests(self.processor, list(pictures), None, [{"role": "user", "content": content}])
        else:
            names = prompts.placeholders(self.processor)[:1] * len(pictures)
            asked = prompts.requests(self.processor, list(pictures), " ".join([*front, *names, *behind]), None)
        return prompts.process(self.processor, *asked[0])

    def _beginning(self, tokens: np.ndarray) -> int:
        """Up to the last image token; the question follows."""
        last = np.flatnonzero(tokens == self.facts["image_token_id"])
        if not len(last):
            raise DistillError("distill: the processor writes no image token into the prompt; visual tokens cannot be told from text")
        end, until = int(last[-1]) + 1, self.making.until
        if isinstance(until, int):
            marks = np.flatnonzero(tokens == until)
            if not len(marks):
                raise DistillError(f"distill: no token {until} ends the prefix of a prompt; let every context end with it")
            end = max(end, int(marks[-1]) + 1)
        if end == len(tokens):
            raise DistillError("distill: a prompt ends with its image, so no text row could learn from it; questions must follow the image")
        return end

    def _features(self, sample: Any) -> dict[str, Tensor]:
        missing = [n for n in self.see.inputs if n not in sample.vision]
        if missing:
            raise DistillError(f"distill: the vision stage takes {missing}, which this processor does not make; it makes {sorted(sample.vision)}")
        with torch.no_grad():
            return {n: small(x) for n, x in self.see({n: self.see.rows(n, sample.vision[n]) for n in self.see.inputs}).items()}

    def _answers(self, samples: Sequence[Any], starts: Sequence[int], feats: Mapping[str, Tensor]) -> list[np.ndarray]:
        """Greedy, until the end token or `max_new_tokens`; in batches over the artifact. Where attention is causal, what questions share is read once."""
        shared = self.making.packed and len(samples) > 1 and len({s.tokens[:n].tobytes() for s, n in zip(samples, starts, strict=True)}) == 1
        ask = self._behind_one if shared else self._each
        parts = [list(zip(samples, starts, strict=True))[i : i + self.making.batch] for i in range(0, len(samples), self.making.batch)]
        return [answer for part in parts for answer in ask([s for s, _ in part], part[0][1], feats)]

    def _each(self, samples: Sequence[Any], start: int, feats: Mapping[str, Tensor]) -> list[np.ndarray]:
        """Every prompt for itself."""
        batch, steps = self._assembled([self._laid(s, s.tokens) for s in samples], feats), self.making.max_new_tokens
        out, cache = self.session.engine.prefill(batch.feeds, batch.length + steps)
        return self.session._decode(batch, out["logits"], cache, Stop(steps), self._choose, Timings(), None)[0]

    def _behind_one(self, samples: Sequence[Any], start: int, feats: Mapping[str, Tensor]) -> list[np.ndarray]:
        """The pictures are read once, questions behind copies of that cache."""
        layouts, steps = [self._laid(s, s.tokens) for s in samples], self.making.max_new_tokens
        batch = self._assembled([self._laid(samples[0], samples[0].tokens[:start])], feats)
        room = max(len(o.tokens) for o in layouts) - start + steps
        cache = self.session.engine.prefill(batch.feeds, batch.length + room)[1].take(np.zeros(len(samples), np.int64))
        return read(self.session, cache, layouts, [start] * len(layouts), self._choose, steps)[0]

    def _choose(self, logits: np.ndarray, history: Sequence[np.ndarray]) -> np.ndarray:
        """Greedy; an answer cannot bring an image."""
        logits = logits.copy()
        logits[:, self.facts["image_token_id"]] = -np.inf
        return logits.argmax(-1).astype(np.int64)

    def _laid(self, sample: Any, tokens: np.ndarray) -> Layout:
        rule, grids = self.facts["positions"], sample.vision.get("image_grid_thw")
        each, merge = self.facts.get("tokens_per_image"), int(rule.get("merge", 1))
        groups = image_groups(tokens, self.facts["image_token_id"], len(sample.pictures), each, grids, merge)
        return lay_out(tokens, groups, [len(g) for g in groups], grids, rule)

    def _assembled(self, layouts: Sequence[Layout], feats: Mapping[str, Tensor]) -> Batch:
        return assemble(layouts, {n: [f.float().numpy()] * len(layouts) for n, f in feats.items()}, self.facts, _pad(self.facts))


def _text(parts: Sequence[str]) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


def small(x: Tensor) -> Tensor:
    """In half precision where the numbers fit, else in bfloat16."""
    x = x.detach().cpu()
    half = x.half()
    return half if torch.isfinite(half).all() else x.bfloat16()


# ---- the folder


class Cache:
    """Rows on disk. `Cache.build` makes or completes a folder; `rows(i)` reads the rows of source i."""

    def __init__(self, folder: Path, making: Making, count: int) -> None:
        self.folder, self.making, self.count = folder, making, count
        self._shard = functools.lru_cache(OPEN)(self._opened)

    @classmethod
    def build(cls, program: Program, processor: Any, data: Sequence[Source], folder: str | Path, making: Making, say: Say = lambda line: None) -> Cache:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        made = {k: v for k, v in asdict(making).items() if k not in ("batch", "target") and (k, v) != ("until", None)}
        mark = json.loads(json.dumps({"teacher": digest(program), "making": made, "sources": len(data), "data": _fingerprint(data)}))
        note = folder / "cache.json"
        if note.is_file():
            known = json.loads(note.read_text(encoding="utf-8"))
            known.setdefault("data", mark["data"])  # an older cache does not say
            if differs := [k for k in mark if known.get(k) != mark[k]]:
                raise DistillError(f"distill: the cache {folder} was made with another {' and '.join(differs)}; choose another folder or remove this one")
        note.write_text(json.dumps(mark, indent=1), encoding="utf-8")
        cache, teacher = cls(folder, making, len(data)), None
        for shard in range(cache.shards):
            if cache.file(shard).is_file():
                continue
            teacher = teacher or Teacher(program, processor, making)
            part = data[shard * SHARD : (shard + 1) * SHARD]
            rows = [teacher.rows(s) for s in part]
            flat = [row for group in rows for row in group]
            judged = iter([r for i in range(0, len(flat), 8) for r in teacher.judge(flat[i : i + 8])])
            cache._write(shard, [[next(judged) for _ in group] for group in rows])
            say(f"teacher: {min((shard + 1) * SHARD, len(data))} of {len(data)} sources answered")
        if teacher:
            teacher.close()
        return cache

    @property
    def shards(self) -> int:
        return -(-self.count // SHARD)

    def file(self, shard: int) -> Path:
        return self.folder / f"rows-{shard:05d}.safetensors"

    def rows(self, source: int) -> list[Row]:
        """Read when asked for: a step needs a few sources of a data set that may be larger than memory."""
        shard, names = self._shard(source // SHARD)
        s, get = source % SHARD, shard.get_tensor
        features, vision = ({n.split(kind)[1]: get(n) for n in names[s] if kind in n} for kind in (".feature.", ".vision."))
        found = []
        for r in range(self.lengths(source)):
            at = f"{s}.{r}"
            (images, _), *lengths = get(f"{at}.lengths").tolist()
            tokens, segments, begin = get(f"{at}.tokens").numpy(), [], 0
            for q, a in lengths:
                segments.append(Segment(tokens[begin : begin + q], tokens[begin + q : begin + q + a]))
                begin += q + a
            index = get(f"{at}.index") if f"{at}.index" in names[s] else None
            found.append(Row(get(f"{at}.beginning").numpy(), tuple(segments), images, {n: v.numpy() for n, v in vision.items()}, features,
                             get(f"{at}.logits"), index, {l: get(f"{at}.hidden.{l}") for l in self.making.hidden}))
        return found

    def lengths(self, source: int) -> int:
        """How many rows a source has."""
        return int(self._shard(source // SHARD)[0].get_tensor("rows")[source % SHARD])

    def _opened(self, shard: int) -> tuple[Any, list[set[str]]]:
        """The shard, mapped into memory, and the names of each of its sources' tensors."""
        from safetensors import safe_open

        file = safe_open(str(self.file(shard)), "pt")  # type: ignore[no-untyped-call]
        names: list[set[str]] = [set() for _ in range(SHARD)]
        for name in file.keys():
            if name != "rows":
                names[int(name.partition(".")[0])].add(name)
        return file, names

    def _write(self, shard: int, groups: list[list[Row]]) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, Tensor] = {"rows": torch.tensor([len(g) for g in groups])}
        for s, group in enumerate(groups):
            for n, t in group[0].features.items():
                tensors[f"{s}.feature.{n}"] = t
            for n, a in group[0].vision.items():
                tensors[f"{s}.vision.{n}"] = torch.from_numpy(np.ascontiguousarray(a))
            for r, row in enumerate(group):
                at = f"{s}.{r}"
                tensors[f"{at}.beginning"] = torch.from_numpy(row.beginning)
                tensors[f"{at}.lengths"] = torch.tensor([[row.images, 0], *[[len(x.question), len(x.answer)] for x in row.segments]])
                tensors[f"{at}.tokens"] = torch.from_numpy(np.concatenate([np.concatenate([x.question, x.answer]) for x in row.segments]))
                tensors[f"{at}.logits"] = row.logits
                tensors |= {f"{at}.index": row.index} if row.index is not None else {}
                tensors |= {f"{at}.hidden.{l}": h for l, h in row.hidden.items()}
        partial = self.file(shard).with_suffix(".part")
        save_file({n: t.contiguous() for n, t in tensors.items()}, str(partial))
        os.replace(partial, self.file(shard))


def _fingerprint(data: Sequence[Source]) -> str:
    """Of what is asked about which pictures; of a picture in a file its name and size."""
    sha = hashlib.sha256()
    for source in data:
        sha.update(json.dumps([source.questions, source.context]).encode())
        for picture in source.pictures:
            sha.update(_identity(picture.source if isinstance(picture, Stored) else picture))
    return sha.hexdigest()[:24]


def _identity(picture: Any) -> bytes:
    if isinstance(picture, (str, Path)):
        path = Path(picture)
        return f"{path.name} {path.stat().st_size if path.is_file() else None}".encode()
    return picture if isinstance(picture, bytes) else np.ascontiguousarray(picture() if callable(picture) else picture).tobytes()


def digest(program: Program) -> str:
    """Of the model's kind and of every parameter's name, shape and first and last numbers: two models, or two trainings of one, differ in it."""
    facts = program.facts
    sha = hashlib.sha256(f"{facts.model_type} {facts.layers} {facts.hidden_size} {facts.vocab_size} {facts.dtype}".encode())
    for name, tensor in sorted(((n, t) for n, t in program.parameters() if isinstance(t, torch.nn.Parameter)), key=lambda p: p[0]):
        flat = tensor.detach().reshape(-1)
        ends = torch.cat([flat[:8], flat[-8:]]).double().tolist() if tensor.device.type != "meta" else []
        sha.update(f"{name}{tuple(tensor.shape)}{ends}".encode())
    return sha.hexdigest()[:24]
