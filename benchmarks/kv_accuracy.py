"""What a smaller KV cache costs in answers, on the testbed.

    python -m benchmarks.kv_accuracy [--items 300] [--pairs 1200] [--only NAME ...] [--parts PART ...]    # goes on where it stopped
    python -m benchmarks.kv_accuracy --speed                                            # milliseconds of CPU
    python -m benchmarks.kv_accuracy --export build/kv_questions.npz                    # for kv_theirs.py, which runs elsewhere
    python -m benchmarks.kv_accuracy --theirs build/kv_theirs.json                      # what that wrote: scores, intervals

Two protocols, a question each, greedy, exact match, paired with the float cache:

    second question   picture and first question are prefilled; its reference answer and the second question follow token by token, so that all
                      that the answer knows of the picture comes out of what was stored before the question was known
    in the prompt     picture and question are prefilled (exactly), all but the last token; that one and the answer are read through the cache

The first is where a cache can lose something; most answers of the second are one word. Second questions are the generator's, from a seed that
nothing was chosen on and that no earlier record used. Constants were chosen on `val` (docs/kv.md).
Prompts are short here (about 150 tokens), so scales and centres weigh more than they would behind a long prompt. Compression counts them, as they
would be in 16-bit floats ("of_fp16") and as they are held ("of_float32"): behind the prompt, at the end of the answer ("end"), and as it would be
behind 4,096 tokens and 32 more ("at_4k").
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.measure import RESULTS, machine, save
from benchmarks.testbed_table import Bench, Reader, apply, digest, pack, recipe_of, unpack
from examples.testbed import make_data
from examples.testbed.dataset import Item, score
from examples.testbed.evaluate import messages
from foveate.graph.kv_format import FLOAT, KVFormat
from foveate.graph.program import Program
from foveate.runtime.prompts import Sample
from foveate.runtime.session import Session
from foveate.runtime.stats import Differences, interval, wilson

NAME = "kv_accuracy"
PARTS = ("second_question", "dropping", "in_the_prompt")
ROOM, BATCH = 8, 30  # new tokens at most (the longest answer has four words), samples at once
SEED = 52001  # of the second questions; the test split's is 3001, of which earlier records used the first 600
LONG, LATER = 4096, 32  # tokens of a prompt, and behind it, that "at_4k" is for
NONE = "clean-up{optional=true}"
FIRST_LAYER = "kv-int4{layers=[0]}"  # two bits cost most there, by far
OURS = {
    "float": NONE,
    "int8": "kv-int8",
    "int4 centred": "kv-int4",
    "zipcache int4/int2, 0.22": f"{FIRST_LAYER} kv-zipcache{{text=false,important=0.22,recent=1}}",
    "2 bits": "kv-zipcache{layers=[0],text=false,important=0.5,recent=1} kv-int2{v_per=channel}",
    "evict-snapkv, 0.27": "evict-snapkv{text=false,keep=0.27}",
    "int4 centred, appended int4": "kv-int4{appended=int4}",
    "evict-snapkv, 0.5": "evict-snapkv{text=false,keep=0.5}",
    "evict-h2o, 0.27": "evict-h2o{text=false,keep=0.27}",
    "mikv int8/int2": "kv-mikv{text=false,important=0.25}",
    "kivi 4 bit": "kv-kivi{group=32,residual=32}",
}
IN_THE_PROMPT = ("float", "int8", "int4 centred", "zipcache int4/int2, 0.22")
TIMED = ("float", "int8", "int4 centred", "zipcache int4/int2, 0.22", "2 bits", "evict-snapkv, 0.5", "evict-snapkv, 0.27")
TWO_TURNS = {
    "nothing dropped": NONE,
    "plain drop": "drop-fastv{layer=2,keep=0.25}",
    "drop, keep int8+int4": "drop-fastv{layer=2,keep=0.25} kv-keep-dropped{hi=int8,lo=int4}",
    "plain drop, 1/8": "drop-fastv{layer=2,keep=0.125}",
    "drop 7/8, keep int8+int4": "drop-fastv{layer=2,keep=0.125} kv-keep-dropped{hi=int8,lo=int4}",
}
EQUAL_BYTES = {  # theirs -> ours of as few bytes or fewer
    "quanto 4 bit": "int4 centred",
    "quanto 2 bit": "2 bits",
    **{f"kvpress {name}, 0.27": "int4 centred" for name in ("snapkv", "knorm", "expected attention")},
}
EQUAL_ROWS = {f"kvpress {name}, {keep}": f"evict-snapkv, {keep}" for name in ("snapkv", "knorm", "expected attention") for keep in (0.5, 0.27)}


@dataclass(frozen=True)
class Ask:
    """Tokens that the prefill reads, tokens that decode reads, and what is to be answered."""

    prompt: Sample
    rest: np.ndarray
    answer: str


# ** questions **


def in_the_prompt(bench: Bench) -> list[Ask]:
    """The first question of every item with one picture."""
    found = []
    for item in (i for i in bench.items if len(i.sources) == 1):
        whole = bench.sample(item, [])
        found.append(Ask(dataclasses.replace(whole, tokens=whole.tokens[:-1]), whole.tokens[-1:], str(item.turns[0].answer)))
    return found


def second_questions(bench: Bench, count: int) -> list[Ask]:
    """Conversations with two questions, with the test split's digits; the first is answered as the reference says."""
    found = []
    two = make_data.SLICES.index("two_turn")
    for i in range(two, two + count * len(make_data.SLICES), len(make_data.SLICES)):
        pictures, turns = make_data.draw(np.random.default_rng([SEED, i]), "two_turn", "test")
        asked = tuple(make_data.Turn(t.question, t.answer) for t in turns)
        item = Item(str(i), tuple(make_data.Image.fromarray(p.pixels) for p in pictures), asked, "two_turn")
        first, second = (Session.prepare(bench, [item.images], messages=[messages(item, said)])[0] for said in ([], [turns[0].answer]))
        cut = len(first.tokens)
        if not np.array_equal(second.tokens[:cut], first.tokens):
            raise SystemExit("kv_accuracy: the second prompt does not begin with the first; this chat template cannot be continued")
        found.append(Ask(first, second.tokens[cut:], turns[1].answer))
    return found


def batches(asks: Sequence[Ask]) -> Iterator[list[int]]:
    """Places of asks with prompts of one length."""
    for length in sorted({len(a.prompt.tokens) for a in asks}):
        group = [i for i, a in enumerate(asks) if len(a.prompt.tokens) == length]
        yield from (group[at : at + BATCH] for at in range(0, len(group), BATCH))


def export(asks: Sequence[Ask], path: Path) -> None:
    """The questions as arrays: tokens, padded, with their lengths; pixels; a digest of both."""
    made: dict[str, np.ndarray] = {}
    for name, rows in (("prompt", [a.prompt.tokens for a in asks]), ("rest", [a.rest for a in asks])):
        made[f"{name}_lengths"] = np.array([len(r) for r in rows])
        made[name] = np.stack([np.pad(r, (0, made[f"{name}_lengths"].max() - len(r))) for r in rows])
    shape = asks[0].prompt.vision["pixel_values"].shape[-3:]
    made["pixel_values"] = np.concatenate([a.prompt.vision["pixel_values"].reshape(-1, *shape) for a in asks]).astype(np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, digest=digest_of(asks), **made)


def digest_of(asks: Sequence[Ask]) -> str:
    sha = hashlib.sha256()
    for a in asks:
        for array in (a.prompt.tokens, a.rest, np.asarray(a.prompt.vision["pixel_values"], np.float32)):
            sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def answer(asks: Sequence[Ask], start: Callable[[list[Ask]], Callable[[np.ndarray, int], np.ndarray]], eos: Sequence[int], text_of: Any) -> np.ndarray:
    """bool[asks]: right or not. start: prompts -> step(tokens[B, 1], number) -> logits[B, V]"""
    right = np.zeros(len(asks), bool)
    for places in batches(asks):
        now = [asks[i] for i in places]
        step, made = start(now), [[] for _ in now]
        token = np.array([a.rest[0] for a in now])
        for i in range(max(len(a.rest) for a in now) + ROOM):
            chosen = step(token[:, None], i).argmax(-1)
            for b, a in enumerate(now):
                if i + 1 >= len(a.rest) and not (made[b] and made[b][-1] in eos):
                    made[b].append(int(chosen[b]))
            token = np.array([a.rest[i + 1] if i + 1 < len(a.rest) else chosen[b] for b, a in enumerate(now)])
            if all(m and m[-1] in eos for m in made):
                break
        for place, a, tokens in zip(places, now, made, strict=True):
            right[place] = score(text_of(np.array(tokens)), a.answer, "exact") == 1
    return right


# ** ours **


class Ours:
    """A recipe as an ONNX Runtime session."""

    def __init__(self, bench: Bench, recipe: str, folder: str) -> None:
        self.program = bench.program.clone()
        for text in recipe.split(" "):
            apply(self.program, recipe_of(text))
        self.session: Reader = bench.open(self.program, Path(folder) / "artifact")
        self.session.seen = bench.seen
        self.rows: list[list[dict[str, np.ndarray]]] = []  # of every batch: valid rows behind the prompt, and now

    def start(self, asks: list[Ask]) -> Callable[[np.ndarray, int], np.ndarray]:
        seen = self.session.encode([a.prompt for a in asks])
        _, cache = self.session.engine.prefill(seen.batch.feeds, seen.batch.length + max(len(a.rest) for a in asks) + ROOM)
        rows = [_rows(cache), _rows(cache)]
        self.rows.append(rows)

        def step(token: np.ndarray, i: int) -> np.ndarray:
            logits = self.session.engine.decode(cache, token, seen.batch.step_positions(i))
            rows[1] = _rows(cache)
            return logits

        return step

    def answers(self, asks: Sequence[Ask]) -> np.ndarray:
        self.rows.clear()
        return answer(asks, self.start, self.session.eos, self.session.text_of)

    def compression(self) -> dict[str, Any]:
        """How much smaller than floats of as many tokens the caches are: all overheads counted, valid rows only, mean over batches."""
        prompt, end = ([held(self.program, rows[i]) for rows in self.rows] for i in range(2))
        return {**_smaller(prompt), "end": _smaller(end), "at_4k": _smaller([held(self.program, rows[0], long=True) for rows in self.rows])}


def _rows(cache: Any) -> dict[str, np.ndarray]:
    return {n: rows.copy() for n, rows in cache.parts.items()} | {"tokens": cache.slot.copy()}


def held(program: Program, rows: dict[str, np.ndarray], long: bool = False) -> tuple[float, float]:
    """Bytes of these rows over those of as many tokens in floats, with scales and floats of 2 and of 4 bytes.

    long: as they would be behind a prompt of LONG tokens and LATER more, of which a partition with a fixed number of rows keeps that number.
    """
    found, tokens = [], float(rows["tokens"].mean())
    for element in (2, 4):
        have = whole = 0.0
        for row, e in enumerate(program.kv):
            form = e.format or FLOAT
            count = {p.name: float(rows[f"lengths{p.suffix()}"][row].mean()) for p in form.partitions}
            if long:
                count = _lengthened(form, count, LONG / tokens)
            have += form.bytes(count, e.heads, e.head_dim, e.value_dim, element)
            whole += (LONG + LATER if long else tokens) * e.heads * (e.head_dim + e.value_dim) * element
        found.append(have / whole)
    return found[0], found[1]


def _lengthened(form: KVFormat, count: dict[str, float], times: float) -> dict[str, float]:
    """Rows of a layer that holds `times` as many, LATER more of them appended."""
    fixed = {p.name for p in form.partitions if p.rows.isdigit()}
    grown, kept = (sum(n for name, n in count.items() if (name in fixed) == which) for which in (False, True))
    more = ((grown + kept) * times - kept) / grown
    return {name: n * (1 if name in fixed else more) + (0 if name else LATER) for name, n in count.items()}


def _smaller(shares: Sequence[tuple[float, float]]) -> dict[str, float]:
    return {name: round(1 / float(np.mean([s[i] for s in shares])), 2) for i, name in enumerate(("of_fp16", "of_float32"))}


def speed(ours: Ours, asks: Sequence[Ask], questions: int = 11, steps: int = 12) -> dict[str, float]:
    """Medians of a prefill, its picture included, and of a step behind it, one question at a time, as kv_theirs.py: milliseconds of this one thread
    (CPU time: the machine may be busy)."""
    ours.session.seen = None
    prefills, decodes = [], []
    for ask in asks[:questions]:
        begin = time.process_time()
        step = ours.start([ask])
        prefills.append(1e3 * (time.process_time() - begin))
        for i in range(steps):
            begin = time.process_time()
            step(np.array([[5]]), i)
            decodes.append(1e3 * (time.process_time() - begin))
    return {"prefill_ms": round(median(prefills[1:]), 3), "step_ms": round(median(decodes[steps:]), 3)}  # the first question warms up


# ** theirs **


def theirs(bench: Bench, asks: Sequence[Ask], path: Path, record: dict[str, Any]) -> None:
    """What kv_theirs.py answered, scored: against the float cache, and against ours at equal bytes and at equal rows."""
    told = json.loads(path.read_text())
    if told["digest"] != digest_of(asks):
        raise SystemExit(f"kv_accuracy: {path.name} answers other questions ({told['digest']}, here {digest_of(asks)}); export them again")
    text_of = lambda tokens: bench.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()  # noqa: E731
    lines = record["second_question"]
    record["theirs"], record["their_versions"] = {}, told["versions"]
    for name, one in told["answers"].items():
        right = np.array([score(text_of(t), a.answer, "exact") == 1 for t, a in zip(one["tokens"], asks, strict=True)])
        smaller = {part: {k: round(1 / v, 2) for k, v in share.items()} for part, share in one["share"].items()}
        made = line(right, unpack(lines["float"]["right"], len(asks)), {**smaller["prompt"], "end": smaller["end"]}, one["seconds"])
        for kind, table in (("equal_bytes", EQUAL_BYTES), ("equal_rows", EQUAL_ROWS)):
            if (mate := table.get(name)) in lines:
                made[f"ours_at_{kind}"] = {"ours": mate, "points": points(unpack(lines[mate]["right"], len(asks)), right)}
        record["theirs"][name] = made | ({"speed": told["speed"][name]} if name in told["speed"] else {})
        show(name, record["theirs"][name])


# ** all of it **


def points(right: np.ndarray, base: np.ndarray) -> dict[str, float]:
    """The paired difference in points, and its 95% interval."""
    low, high = interval(Differences.of(right.astype(float) - base), 0.975)
    return {k: round(100 * float(v), 2) for k, v in {"difference": right.mean() - base.mean(), "low": low, "high": high}.items()}


def line(right: np.ndarray, base: np.ndarray, compression: dict[str, Any], seconds: float) -> dict[str, Any]:
    return {
        "accuracy": round(100 * float(right.mean()), 2),
        "interval": [round(100 * x, 2) for x in wilson(float(right.sum()), len(right), 0.95)],
        "points": points(right, base),
        "gained": int((right & ~base).sum()),
        "lost": int((~right & base).sum()),
        "compression": compression,
        "seconds": round(seconds, 1),
        "right": pack(right),
    }


def measure(bench: Bench, recipes: dict[str, str], asks: Sequence[Ask], part: str, record: dict[str, Any]) -> np.ndarray:
    """Lines of one protocol; what the record has already is not computed again. The first recipe is what the others are compared with."""
    base: np.ndarray | None = None
    for name, recipe in recipes.items():
        known = record[part].get(name)
        if known and known["recipe"] == recipe:
            right = unpack(known["right"], len(asks))
            base = right if base is None else base
            continue
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            run = Ours(bench, recipe, folder)
            right = run.answers(asks)
            base = right if base is None else base
            record[part][name] = {"recipe": recipe} | line(right, base, run.compression(), time.perf_counter() - start)
            run.session.close()
        show(name, record[part][name])
        save(NAME, record)
    if base is None:
        raise SystemExit("kv_accuracy: nothing was asked for")
    return base


def show(name: str, line: dict[str, Any]) -> None:
    print(f"{name:28s} {line['accuracy']:6.2f}  {line['points']}  {line['compression']}  {line['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=1200)
    parser.add_argument("--only", nargs="+", help="of the names of our recipes; the first is what the others are compared with")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--export", type=Path)
    parser.add_argument("--theirs", type=Path)
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    chosen = {n: r for n, r in OURS.items() if not options.only or n in options.only}
    bench = Bench(options.items)
    second = second_questions(bench, options.pairs)
    if options.export:
        export(second, options.export)
        return
    questions = {"second_question": len(second), "seed": SEED, "digest": digest_of(second), "checkpoint_and_items": digest(options.items)}
    path = RESULTS / f"{NAME}.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    if record.get("questions") != questions:
        record = {"questions": questions, **{part: {} for part in (*PARTS, "theirs", "speed")}}
    if options.theirs:
        theirs(bench, second, options.theirs, record)
    elif options.speed:
        for name in TIMED:
            with tempfile.TemporaryDirectory() as folder:
                record["speed"][name] = speed(Ours(bench, OURS[name], folder), second)
                print(name, record["speed"][name], flush=True)
    else:
        record |= {"machine": machine(1), "date": time.strftime("%Y-%m-%d")}
        record["tokens_of_a_prompt"] = round(float(np.mean([len(a.prompt.tokens) for a in second])))
        if "second_question" in options.parts:
            measure(bench, chosen, second, "second_question", record)
        if "dropping" in options.parts:
            measure(bench, TWO_TURNS, second, "dropping", record)
            record["recovered"] = recovered(record["dropping"])
        if "in_the_prompt" in options.parts:
            first = in_the_prompt(bench)
            record["in_the_prompt_questions"] = len(first)
            measure(bench, {n: OURS[n] for n in IN_THE_PROMPT}, first, "in_the_prompt", record)
    print(save(NAME, record).name)


def recovered(lines: dict[str, Any]) -> dict[str, float | None]:
    """Of what plain dropping loses, the share that the kept keys and values bring back; None where it loses nothing."""
    whole, found = lines["nothing dropped"]["accuracy"], {}
    for name, plain in (("drop, keep int8+int4", "plain drop"), ("drop 7/8, keep int8+int4", "plain drop, 1/8")):
        lost = whole - lines[plain]["accuracy"]
        found[name] = round((lines[name]["accuracy"] - lines[plain]["accuracy"]) / lost, 3) if lost > 0 else None
    return found


if __name__ == "__main__":
    main()
