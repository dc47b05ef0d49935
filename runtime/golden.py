"""Golden files: what an artifact's stages gave on one tiny example when it was made, and whether they still do.

    golden/vision.npz     in.*, out.*                       one picture of the captured geometry, coarse random pixels
    golden/prefill.npz    in.*, out.*                       a prompt with as few visual rows as the program takes
    golden/decode.npz     in.input_ids[steps, 1, 1], in.position_ids, out.logits[steps, 1, V]    from that prompt on

An output of more than MOST values is kept in part (`out.<name>` holds every n-th value, `every.<name>` says n). The values come from the
rewritten program in plain torch, in the type it was captured in: the target has no part in them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RunError

FOLDER = "golden"
STAGES = ("vision", "prefill", "decode")
STEPS = 2
MOST = 1 << 16  # values of an output that are kept
# Largest difference that a lowering may make, relative to the largest value of the output. float32: sums in another order, 1e-5 seen.
# Half precision: 10 or 7 bits of mantissa through all layers. Quantized caches: a code more or less at a boundary.
LIMITS = {"float32": 1e-3, "float16": 5e-2, "bfloat16": 1e-1}
QUANTIZED = 5e-2

Arrays = dict[str, np.ndarray]


def coarse(rng: np.random.Generator, shape: Iterable[int]) -> np.ndarray:
    """Random float32 of nine values in [-2, 2]: unlike any picture, and a tenth of its size when compressed."""
    return (np.clip(np.round(2 * rng.standard_normal(tuple(shape))), -4, 4) / 2).astype(np.float32)


def record(engine: Any, vision: Arrays | None, prefill: Arrays, tokens: Iterable[int]) -> dict[str, Arrays]:
    """stage -> arrays of its file. tokens: what decode is fed. Raises a RunError when a result is not finite."""
    found: dict[str, Arrays] = {}
    if vision is not None:
        found["vision"] = _file(vision, engine.vision(vision))
    outputs, cache = engine.prefill(prefill, prefill["input_ids"].shape[1] + STEPS)
    found["prefill"] = _file(prefill, outputs)
    ids = np.array(list(tokens), np.int64).reshape(-1, 1, 1)
    last = int(prefill["attention_mask"].sum())
    shape = (*prefill["position_ids"].shape[:-1], 1)
    positions = np.stack([np.full(shape, last + step, np.int64) for step in range(len(ids))])
    logits = [engine.decode(cache, i, p) for i, p in zip(ids, positions, strict=True)]
    found["decode"] = _file({"input_ids": ids, "position_ids": positions}, {"logits": np.stack(logits)})
    for stage, arrays in found.items():
        bad = [n for n, a in arrays.items() if not np.isfinite(a).all()]
        if bad:
            raise RunError(f"golden: {stage} gives NaN or infinity on its own example ({bad[0]}); nothing could be compared with that")
    return found


def _file(inputs: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]) -> Arrays:
    found = {f"in.{n}": np.asarray(a) for n, a in inputs.items()}
    for name, value in outputs.items():
        every = -(-value.size // MOST)
        found[f"out.{name}"] = np.ascontiguousarray(value.reshape(-1)[::every] if every > 1 else value)
        if every > 1:
            found[f"every.{name}"] = np.array(every)
    return found


def write(folder: Path, found: Mapping[str, Arrays]) -> None:
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for stage, arrays in found.items():
        np.savez_compressed(folder / FOLDER / f"{stage}.npz", **arrays)


@dataclass(frozen=True)
class Line:
    """One output of one stage: its largest difference from the golden file, relative to the file's largest value."""

    stage: str
    output: str
    difference: float | None  # None: not comparable, `note` says why
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.difference is None or self.difference <= self.limit


@dataclass(frozen=True)
class Check:
    """All lines of an artifact."""

    lines: tuple[Line, ...]

    @property
    def ok(self) -> bool:
        return all(line.ok for line in self.lines)

    @property
    def worst(self) -> Line:
        return max(self.lines, key=lambda line: (not line.ok, line.difference or 0.0))

    def __str__(self) -> str:
        rows = []
        for x in self.lines:
            seen = x.note if x.difference is None else f"{x.difference:.1e} (limit {x.limit:g})" + (f", {x.note}" if x.note else "")
            rows.append(f"{'ok    ' if x.ok else 'DIFFER'} {x.stage:8s} {x.output:20s} {seen}")
        x = self.worst
        head = "the largest difference is" if self.ok else "it does not give what it gave when it was made: the largest difference is"
        seen = "" if x.difference is None else f"{x.difference:.1e} of the largest value, "
        return "\n".join([*rows, f"{head} {seen}stage {x.stage}, output {x.output}"])

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "lines": [{**asdict(x), "ok": x.ok} for x in self.lines], "worst": asdict(self.worst)}


def check(engine: Any, folder: Path, manifest: Mapping[str, Any], limit: float | None = None) -> Check:
    """Replay the golden files of an artifact on its engine. limit: for every output, instead of what its precision allows."""
    files = {s: _read(folder / FOLDER / f"{s}.npz") for s in STAGES if (folder / FOLDER / f"{s}.npz").is_file()}
    if "prefill" not in files or "decode" not in files:
        raise RunError(f"check: {folder} has no golden files (it was made without them); optimize the model again")
    limit = allowed(manifest) if limit is None else limit
    lines: list[Line] = []
    if "vision" in files:
        lines += _compare("vision", files["vision"], engine.vision(_side(files["vision"], "in.")), limit)
    feeds, steps = _side(files["prefill"], "in."), _side(files["decode"], "in.")
    outputs, cache = engine.prefill(feeds, feeds["input_ids"].shape[1] + len(steps["input_ids"]))
    lines += _compare("prefill", files["prefill"], outputs, limit)
    logits = [engine.decode(cache, i, p) for i, p in zip(steps["input_ids"], steps["position_ids"], strict=True)]
    moved = any(x.output.startswith("kept.") and x.difference for x in lines if x.stage == "prefill")
    lines += _compare("decode", files["decode"], {"logits": np.stack(logits)}, limit, moved)
    return Check(tuple(lines))


def allowed(manifest: Mapping[str, Any]) -> float:
    """By the precision that the target computes in and by the cache."""
    precision = str((manifest.get("options") or {}).get("precision") or manifest["facts"].get("dtype") or "float32")
    formats = any(isinstance(entry.get("format"), Mapping) for entry in manifest["kv"])
    return max(LIMITS.get(precision, LIMITS["float32"]), QUANTIZED if formats else 0.0)


def _compare(stage: str, file: Arrays, outputs: Mapping[str, np.ndarray], limit: float, moved: bool = False) -> list[Line]:
    """Kept tokens first: where others were kept in half precision, what follows is of other tokens and cannot be compared."""
    want = _side(file, "out.")
    lines = []
    for name in sorted(want, key=lambda n: not n.startswith("kept.")):
        if name not in outputs:
            lines.append(Line(stage, name, float("inf"), limit, "it is missing now"))
        elif name.startswith("kept."):
            share = _unequal(want[name], outputs[name])
            moved |= share > 0
            lines.append(Line(stage, name, share, 0.0 if limit <= LIMITS["float32"] else 0.1, "share of other kept tokens" if share else ""))
        elif moved and limit > LIMITS["float32"]:
            lines.append(Line(stage, name, None, limit, "not compared: other tokens were kept, as rounding can do"))
        else:
            every = int(file[f"every.{name}"]) if f"every.{name}" in file else 1
            got = np.asarray(outputs[name])
            lines.append(Line(stage, name, _difference(want[name], got.reshape(-1)[::every] if every > 1 else got), limit))
    return lines


def _difference(want: np.ndarray, got: np.ndarray) -> float:
    if want.shape != got.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):
        found = float(np.abs(want.astype(np.float64) - got).max() / max(float(np.abs(want).max()), 1e-9)) if want.size else 0.0
    return found if np.isfinite(found) else float("inf")


def _unequal(want: np.ndarray, got: np.ndarray) -> float:
    """Share of kept tokens that are others now."""
    if want.shape != np.shape(got):
        return float("inf")
    rows = zip(want.reshape(-1, want.shape[-1]), np.reshape(got, (-1, want.shape[-1])), strict=True)
    return float(np.mean([1 - len(np.intersect1d(a, b)) / max(len(np.unique(a)), 1) for a, b in rows]))


def _side(file: Arrays, prefix: str) -> Arrays:
    return {n.removeprefix(prefix): a for n, a in file.items() if n.startswith(prefix)}


def _read(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {n: file[n] for n in file.files}
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise RunError(f"check: {path} cannot be read ({error})") from None
