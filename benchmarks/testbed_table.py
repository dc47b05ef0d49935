"""Every token-reduction method on the testbed: accuracy, true token counts, FLOPs and ONNX Runtime latency, one JSON line per configuration.

    python -m benchmarks.testbed_table run [--items 612] [--until HH:MM]    # accuracy; goes on where it stopped, computes nothing twice
    python -m benchmarks.testbed_table latency [--rounds 9]                 # per stage, in turns with the unreduced model; wants a quiet machine
    python -m benchmarks.testbed_table report                               # docs/methods.md, the README's section and the pictures

Held-out `test` items, the first n (slices taking turns), greedy answers, exact match; one thread; ORT artifacts. The model is captured once,
every configuration rewrites a clone of it. A line holds one bit per question of every item, so that any interval can be recomputed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import RESULTS, machine
from benchmarks.testbed_configs import NONE, Config, plan
from examples.testbed import make_data
from examples.testbed.dataset import Item, score
from examples.testbed.evaluate import CHECKPOINT, load, messages
from examples.testbed.scenes import LABEL_ID
from examples.testbed.text_tower import TextTower
from foveate.export.artifact import Artifact
from foveate.export.backends import find
from foveate.graph.capture import capture
from foveate.graph.errors import FoveateError
from foveate.graph.program import Program
from foveate.passes.pipeline import run as apply
from foveate.passes.recipe import load as recipe_of
from foveate.report import Figures
from foveate.runtime.evaluate import watched
from foveate.runtime.prompts import Sample
from foveate.runtime.session import Session

ROOT = Path(__file__).resolve().parent.parent
RECORD = RESULTS / "testbed_table.jsonl"
ROOM = 12  # new tokens at most: the longest answer has four words
BATCH = 30
TEXT = 16  # text tokens of the request that FLOPs and latency are for
STEPS = 8  # decode steps per timing


class RecordError(FoveateError):
    """A record that cannot be gone on with or reported."""


# -- the record


@dataclass(frozen=True)
class Line:
    """One configuration as measured. `right`: a bit per question, hexadecimal, items in order; or `refused`: why it cannot be built."""

    recipe: str
    items: str  # digest of the questions, pictures and checkpoint
    n: int
    right: str = ""
    refused: str = ""
    visual: tuple[float, ...] = ()  # executed visual rows per layer, one picture: what the graph computes, filler among them
    held: tuple[float, ...] = ()  # visual rows that the cache of each layer holds, mean over the items, per picture
    flops: dict[str, int] = dataclasses.field(default_factory=dict)  # vision, prefill, decode
    parameters: tuple[Any, ...] = ()  # (pass, all its parameters)
    extra: str = ""  # the stand-in for an outside input
    seconds: float = 0.0
    commit: str = ""
    date: str = ""
    versions: dict[str, Any] = dataclasses.field(default_factory=dict)
    was: str = ""  # the recipe as it was called at that commit, where passes have changed their defaults since
    latency: dict[str, Any] | None = None


def read(path: Path, items: str | None = None) -> dict[str, Line]:
    """recipe -> its line; a later line replaces or, with latency alone, completes an earlier one. Lines on other items are refused."""
    found: dict[str, Line] = {}
    for number, text in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
        try:
            raw = json.loads(text)
            recipe, digest = raw["recipe"], raw["items"]
        except (ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path.name}:{number}: not a line of this record ({error}); delete the line and run again") from None
        items = items or digest
        if digest != items:
            raise RecordError(f"{path.name}:{number}: measured on items {digest}, the others are {items}; use another --record for other items")
        if set(raw) <= {"recipe", "items", "latency"}:
            if recipe not in found:
                raise RecordError(f"{path.name}:{number}: a latency of {recipe!r}, whose accuracy is not in the record; run that first")
            found[recipe] = dataclasses.replace(found[recipe], latency=raw["latency"])
        else:
            found[recipe] = Line(**{k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()})
    return found


def append(path: Path, fields: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as out:
        out.write(json.dumps(fields) + "\n")


def pack(bits: Sequence[bool]) -> str:
    return np.packbits(np.array(bits, bool)).tobytes().hex()


def unpack(text: str, count: int) -> np.ndarray:
    """-> bool[count]; a record of another number of questions is refused"""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)).astype(bool)
    if not count <= len(bits) < count + 8:
        raise RecordError(f"testbed_table: a line holds {len(bits)} bits for {count} questions; it was measured on other items")
    return bits[:count]


def item_scores(text: str, turns: Sequence[int]) -> np.ndarray:
    """[items], each the share of its questions (`turns` of them) answered right"""
    bits, ends = unpack(text, sum(turns)), np.cumsum(turns)
    return np.array([bits[e - t : e].mean() for e, t in zip(ends, turns, strict=True)])


# -- items


@cache
def items_of(count: int) -> tuple[Item, ...]:
    return tuple(make_data.items("test", count))


@cache
def digest(count: int) -> str:
    """Of checkpoint, questions, answers and pixels."""
    sha = hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes())
    for item in items_of(count):
        sha.update(json.dumps([item.id, [[t.question, t.answer] for t in item.turns]]).encode())
        for image in item.images:
            sha.update(image.tobytes())
    return sha.hexdigest()[:16]


@cache
def objects(count: int) -> dict[str, np.ndarray]:
    """Item id -> heat[pictures, 144]: how deep inside a thing of the picture a patch lies, in patches, 0 on background; as an ideal detector."""
    from scipy.ndimage import distance_transform_edt

    kind = LABEL_ID["kind"]

    def heat(labels: np.ndarray) -> np.ndarray:
        return distance_transform_edt(np.pad(labels[kind] > 0, 1))[1:-1, 1:-1].ravel().astype(np.float32)

    return {id: np.stack([heat(p.labels) for p in pictures]) for id, _, pictures, _ in islice(make_data.generate("test"), count)}


class Extras:
    """Stand-ins for what some methods are given from outside; (item, question) -> inputs of the vision stage, a row per picture.

    question in token space   the mean of the unit word embeddings of the question, in the language model's own space (CDPruner)
    question in tower space   the question's vector of the testbed's text tower, through the pseudo-inverse of the visual projection, as
                              long as a normalised state of the tower (ELIP; its paper trains both towers together)
    true objects              heat maps of the things, by the generator's labels (object-guided sampling; its paper's are of detected boxes)
    """

    def __init__(self, model: Any, processor: Any, count: int) -> None:
        self.words = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)
        self.tokenizer, self.tower, self.count = processor.tokenizer, TextTower.load(CHECKPOINT), count
        self.back = torch.linalg.pinv(self.tower.projection)  # [Dv, D]

    def __call__(self, name: str, item: Item, question: str) -> dict[str, np.ndarray]:
        if name == "question in token space":
            ids = self.tokenizer(question, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
            return self._rows(self.words[ids].mean(0), item)
        if name == "question in tower space":
            vector = torch.nn.functional.normalize(self.back @ self.tower.say([question])[0], dim=-1)
            return self._rows(vector * vector.shape[0] ** 0.5, item)
        if name == "true objects":
            return {"saliency": objects(self.count)[item.id]}
        raise RecordError(f"testbed_table: no stand-in {name!r}")

    @staticmethod
    def _rows(vector: torch.Tensor, item: Item) -> dict[str, np.ndarray]:
        return {"text": vector.numpy()[None].repeat(len(item.sources), 0)}


# -- answering


class Reader(Session):
    """A session whose requests are prepared samples, and which remembers what an unreduced vision stage said of them."""

    seen: dict[int, dict[str, np.ndarray]] | None = None  # id of the sample's pixels -> outputs of the vision stage

    def prepare(self, images: Any = None, prompt: Any = None, messages: Any = None) -> list[Sample]:
        return list(images)

    def _vision(self, samples: Sequence[Sample], *more: Any) -> dict[str, np.ndarray]:
        if self.seen is None:
            return super()._vision(samples, *more)
        keys = [id(s.vision["pixel_values"]) for s in samples]
        if any(k not in self.seen for k in keys):
            outputs, images = super()._vision(samples, *more), [len(s.pictures) for s in samples]
            for at, (key, count) in enumerate(zip(keys, images, strict=True)):
                start = sum(images[:at])
                self.seen[key] = {n: _part(v, start, count, sum(images)) for n, v in outputs.items()}
        return {name: np.concatenate([self.seen[k][name] for k in keys]) for name in self.seen[keys[0]]}


def _part(value: np.ndarray, start: int, count: int, images: int) -> np.ndarray:
    rows = len(value) // images
    return value[start * rows : (start + count) * rows]


class Bench:
    """The testbed, captured once; items tokenised once."""

    def __init__(self, count: int) -> None:
        torch.set_num_threads(1)
        self.model, self.processor = load(CHECKPOINT)
        self.program = capture(self.model, self.processor)
        self.items, self.extras = items_of(count), Extras(self.model, self.processor, count)
        self.samples: dict[tuple[str, tuple[str, ...]], Sample] = {}
        self.seen: dict[int, dict[str, np.ndarray]] = {}
        self.generation = self.model.generation_config.to_dict()

    def build(self, recipe: str) -> Program:
        program = self.program.clone()
        apply(program, recipe_of(recipe))
        return program

    def open(self, program: Program, folder: Path) -> Reader:
        backend = find("ort")
        with Artifact.create(folder) as draft:
            facts, kv = dataclasses.asdict(program.facts), [dataclasses.asdict(e) for e in program.kv]
            components = backend.lower(program, draft.folder, {"threads": 1})
            draft.manifest.update(target="ort", facts=facts, kv=kv, components=components)
        artifact = Artifact.load(folder)
        return Reader(backend.open(artifact), self.processor, artifact.manifest, self.generation)

    def sample(self, item: Item, said: Sequence[str]) -> Sample:
        key = (item.id, tuple(said))
        if key not in self.samples:
            first = self.samples.get((item.id, ()))
            chat = [*messages(item, list(said))]
            made = Session.prepare(self, [item.images], messages=[chat])[0]
            self.samples[key] = dataclasses.replace(made, vision=first.vision) if first else made  # the same pixels, known by their id
        return self.samples[key]

    def given(self, extra: str, batch: Sequence[Item], turn: int) -> dict[str, np.ndarray]:
        """The outside inputs of a batch, a row per picture."""
        rows = [self.extras(extra, i, i.turns[turn].question) for i in batch] if extra else [{}]
        return {name: np.concatenate([r[name] for r in rows]) for name in rows[0]}

    def answers(self, session: Reader, extra: str = "") -> tuple[list[bool], np.ndarray]:
        """-> a bit per question, items in order; visual rows per picture in the cache of every layer, mean over items"""
        said: dict[str, list[str]] = {i.id: [] for i in self.items}
        held = []
        with watched(session):
            for turn in range(max(len(i.turns) for i in self.items)):
                asked = [i for i in self.items if len(i.turns) > turn]
                for batch in batches(asked):
                    samples = [self.sample(i, said[i.id]) for i in batch]
                    made = session.generate(samples, extra=self.given(extra, batch, turn), max_new_tokens=ROOM, do_sample=False)
                    for item, text in zip(batch, made.texts, strict=True):
                        said[item.id].append(text)
                    if turn == 0:
                        text = np.array([(s.tokens != session.facts["image_token_id"]).sum() for s in samples])
                        held.append((made.kv_rows - text) / np.array([len(i.sources) for i in batch]))
        right = [score(a, t.answer, i.metric) == 1 for i in self.items for a, t in zip(said[i.id], i.turns, strict=True)]
        return right, np.concatenate(held, 1).mean(1)


def batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    """Items with as many pictures each, in order."""
    for pictures in sorted({len(i.sources) for i in items}):
        group = [i for i in items if len(i.sources) == pictures]
        yield from (group[at : at + BATCH] for at in range(0, len(group), BATCH))


# -- run


def todo(configs: Sequence[Config], done: dict[str, Line]) -> list[tuple[str, str]]:
    """(recipe, its outside input), every recipe once: the unreduced model, then configurations with the uniform controls that each needs, then
    the random ones that no configuration is (second draws, the stages of others)."""
    wanted: dict[str, str] = {NONE: ""}
    for c in configs:
        if "seed=1" not in c.recipe:
            wanted.setdefault(c.recipe, c.extra)
        for control in c.uniform:
            wanted.setdefault(control, "")
    for control in (r for c in configs for r in c.random):
        wanted.setdefault(control, "")
    return [(r, e) for r, e in wanted.items() if r not in done]


def measure(bench: Bench, recipe: str, extra: str) -> dict[str, Any]:
    """The fields of a line."""
    try:
        program = bench.build(recipe)
    except FoveateError as error:
        return {"refused": str(error)}
    figures = Figures.of(program, TEXT)
    with tempfile.TemporaryDirectory() as folder:
        session = bench.open(program, Path(folder) / "artifact")
        if program["vision"].outputs == bench.program["vision"].outputs:
            session.seen = bench.seen
        right, held = bench.answers(session, extra)
        session.close()
    return {
        "right": pack(right),
        "visual": [figures.tokens[layer] - TEXT for layer in sorted(figures.tokens)],
        "held": [round(float(h), 3) for h in held],
        "flops": {"vision": figures.vision_flops, "prefill": figures.prefill_flops, "decode": figures.decode_flops},
        "parameters": [[r.name, r.parameters] for r in program.history if r.name != "clean-up"],
    }


def run(path: Path, count: int, until: str, only: Callable[[str], bool] = lambda recipe: True) -> None:
    done = read(path, digest(count))
    left = [(r, e) for r, e in todo(plan(), done) if only(r)]
    print(f"{len(done)} configurations are in {path.name}, {len(left)} to go", flush=True)
    if not left:
        return
    bench, versions, commit, broken = Bench(count), machine(1), revision(), []
    for at, (recipe, extra) in enumerate(left):
        if until and datetime.now(UTC).strftime("%H:%M") >= until:
            print(f"{until} UTC: {len(left) - at} configurations are left for the next run", flush=True)
            return
        start = time.perf_counter()
        try:
            fields = measure(bench, recipe, extra)
        except Exception as error:  # a defect of ours: said at the end, the others are measured
            broken.append(f"{recipe}: {type(error).__name__}: {str(error).splitlines()[0][:300]}")
            print(f"{at + 1}/{len(left)} {broken[-1]}", flush=True)
            continue
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        seconds = round(time.perf_counter() - start, 1)
        about = {"extra": extra, "seconds": seconds, "commit": commit, "date": now, "versions": versions}
        append(path, {"recipe": recipe, "items": digest(count), "n": count, **fields, **about})
        turns = [len(i.turns) for i in bench.items]
        said = fields.get("refused") or f"{100 * item_scores(fields['right'], turns).mean():.1f}%"
        print(f"{at + 1}/{len(left)} {recipe}: {said} ({seconds} s)", flush=True)
    if broken:
        raise RecordError(f"testbed_table: {len(broken)} configurations broke and are not in the record: " + "; ".join(broken))


def revision() -> str:
    """The commit that is measured, with + where files differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short=10", "HEAD") + ("+" if changed else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "latency", "report"])
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--items", type=int, default=612, help="how many test items, slices taking turns")
    parser.add_argument("--until", default="", help="start no configuration after this time, UTC, HH:MM")
    parser.add_argument("--only", default="", help="only recipes with this text in them")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    try:
        if options.what == "run":
            run(options.record, options.items, options.until, lambda recipe: options.only in recipe)
        elif options.what == "latency":
            from benchmarks.testbed_latency import time_all

            time_all(options.record, options.rounds, options.only)
        else:
            from benchmarks.testbed_report import write

            write(options.record)
    except FoveateError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
