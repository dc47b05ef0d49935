"""Saved per-item results: one JSON line per item under a header line, appended as they come, readable after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import RunError
from .gate import Pair

VERSION = 1


@dataclass(frozen=True)
class Result:
    """What one item came to.

    `score` is the mean over its turns, None when unlabelled; an `error` of kind "run" is tried again on resume.
    """

    id: str
    digest: str
    slice: str
    metric: str | None
    answers: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    score: float | None = None
    group: str | None = None
    turns: int = 1
    error: str | None = None
    kind: str | None = None  # of the error: "model" (an answer that is no number: a wrong answer) or "run"
    tokens: int = 0  # generated
    first: tuple[Mapping[str, Any], ...] = ()  # per turn the first token's likeliest ids and log-probabilities, where asked for
    ms: Mapping[str, Any] = field(default_factory=dict)  # not part of what must repeat

    def as_dict(self) -> dict[str, Any]:
        empty = (None, (), {}, [])
        return {k: v for k, v in asdict(self).items() if v not in empty or k == "answers"}

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Result:
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in record.items() if k in cls.__dataclass_fields__}
        return cls(**known)


@dataclass(frozen=True)
class Run:
    """A results file: what was run on what, and the items so far."""

    header: Mapping[str, Any]
    results: dict[str, Result]

    @property
    def name(self) -> str:
        return str(self.header.get("name", "?"))

    @property
    def errors(self) -> list[Result]:
        return [r for r in self.results.values() if r.error]


class Log:
    """Appends results; a file that exists is continued when its header is the same."""

    def __init__(self, path: Path, header: Mapping[str, Any]):
        self.path, self.header = path, {"foveate_results": VERSION, **header}
        self.done: dict[str, Result] = {}
        if path.exists() and path.stat().st_size:
            self._continue()

    def _continue(self) -> None:
        old = read(self.path)
        same = {k: v for k, v in old.header.items() if k != "name"}
        want = json.loads(json.dumps({k: v for k, v in self.header.items() if k != "name"}))
        if same != want:
            differs = [k for k in {**same, **want} if same.get(k) != want.get(k)]
            raise RunError(
                f"results: {self.path} is of another run "
                f"({', '.join(f'{k}: {same.get(k)!r}, now {want.get(k)!r}' for k in differs)}); name another file or remove it"
            )
        self.done = {k: r for k, r in old.results.items() if r.kind != "run"}

    def start(self, keep: Iterable[str]) -> None:
        """Rewrite the file with the finished items `keep`, whole lines only, then append."""
        keep = set(keep)
        self.done = {k: r for k, r in self.done.items() if k in keep}
        write(self.path, self.header, self.done.values())

    def append(self, results: Sequence[Result]) -> None:
        """One write for all, so that a batch is there as a whole or cut in its last line."""
        text = "".join(json.dumps(r.as_dict(), ensure_ascii=False) + "\n" for r in results)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise RunError(
                f"results: {self.path} cannot be written ({error.strerror or error}); the {len(self.done)} items so far are kept"
            ) from None
        self.done |= {r.id: r for r in results}


def write(path: Path, header: Mapping[str, Any], results: Iterable[Result]) -> None:
    """A whole results file, by rename."""
    partial = path.with_name(f".{path.name}.part")
    lines = [json.dumps(header, ensure_ascii=False), *(json.dumps(r.as_dict(), ensure_ascii=False) for r in results)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"results: {path} cannot be written: {error.strerror or error}") from None


def read(*paths: Path) -> Run:
    """One results file, or the shards of one run. A line cut by a kill at the end is left out; any other damage is an error."""
    header: dict[str, Any] = {}
    results: dict[str, Result] = {}
    for path in paths:
        first, found = _read(path)
        if header and {**first, "shard": 0, "name": 0} != {**header, "shard": 0, "name": 0}:
            raise RunError(f"results: {path} is of another run than {paths[0]}")
        twice = results.keys() & found.keys()
        if twice:
            raise RunError(f"results: item {sorted(twice)[0]} is in more than one of {len(paths)} files")
        header, results = header or first, results | found
    return Run(header, results)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Result]]:
    if not path.is_file():
        raise RunError(f"results: no file {path}")
    lines = path.read_bytes().split(b"\n")
    cut = lines[-1] != b""
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"a {type(record).__name__}")
        except ValueError as error:
            if cut and number == len(lines):
                break
            raise RunError(f"results: {path}:{number} is not a JSON object ({error})") from None
        records.append(record)
    if not records or records[0].get("foveate_results") != VERSION:
        raise RunError(f"results: {path} is not a results file of this version (its first line has no 'foveate_results': {VERSION})")
    try:
        found = [Result.of(r) for r in records[1:]]
    except TypeError as error:
        raise RunError(f"results: {path} lacks a field ({error})") from None
    return records[0], {r.id: r for r in found}


def pairs(baseline: Run, candidate: Run, subset: bool = False) -> list[Pair]:
    """Both runs item by item, in the candidate's order. Every id and question must match; with `subset` the baseline may have more items.

    An item without a score because its answer was no number counts as wrong; any other error, or an unlabelled item, is refused.
    """
    lost = [i for i in candidate.results if i not in baseline.results]
    more = [] if subset else [i for i in baseline.results if i not in candidate.results]
    if lost or more:
        raise RunError(
            "gate: baseline and candidate are not of the same items: "
            + "; ".join(
                f"{len(ids)} {where} (first: {ids[0]})"
                for ids, where in ((lost, "only in the candidate"), (more, "only in the baseline"))
                if ids
            )
        )
    out = []
    for id, c in candidate.results.items():
        b = baseline.results[id]
        if b.digest != c.digest or b.metric != c.metric:
            raise RunError(
                f"gate: item {id} asked or expected something else in the baseline than in the candidate; evaluate both on the same data"
            )
        out.append(Pair(id, _score(b, "baseline"), _score(c, "candidate"), c.slice, c.metric or "none", c.turns, c.group))
    if not out:
        raise RunError("gate: there are no items to judge")
    return out


def _score(result: Result, who: str) -> float:
    if result.kind == "run":
        raise RunError(f"gate: item {result.id} has no answer in the {who} ({result.error}); run the evaluation again, it continues there")
    if result.score is None:
        raise RunError(f"gate: item {result.id} has no reference answer or no metric; a gate needs labelled items")
    return result.score
