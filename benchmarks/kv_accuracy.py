"""What a smaller KV cache costs in answers, on the testbed.

    python -m benchmarks.kv_accuracy [--items 300] [--pairs 400] [--only NAME ...]

Two protocols, a question each, greedy, exact match, paired with the float cache:

    in the prompt     picture and question are prefilled (exactly), all but the last token; that one and the answer are read through the cache
    second question   picture and first question are prefilled; its reference answer and the second question follow token by token, so that all
                      that the answer knows of the picture comes out of codes that were made before the question was known

The second is where a cache can lose something; most answers of the first are one word. Theirs: transformers' QuantizedCache (quanto) and kvpress,
the same tokens in the same steps, where `optimum-quanto` and `kvpress` can be imported; otherwise the record says that they were missing.
Prompts are short here (about 170 tokens), so scales and centres weigh more than they would behind a long prompt; compression counts them, as they
would be in 16-bit floats ("of_fp16") and as they are held ("of_float32").
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from benchmarks.measure import RESULTS, machine, save
from benchmarks.testbed_table import Bench, Reader, apply, digest, pack, recipe_of, unpack
from examples.testbed import make_data
from examples.testbed.dataset import Item, score
from examples.testbed.evaluate import messages
from foveate.graph.kv_format import FLOAT
from foveate.graph.program import Program
from foveate.runtime.prompts import Sample
from foveate.runtime.session import Session
from foveate.runtime.stats import Differences, interval, wilson

NAME = "kv_accuracy"
ROOM, BATCH = 8, 30  # new tokens at most (the longest answer has four words), samples at once
NONE = "clean-up{optional=true}"
OURS = {
    "float": NONE,
    "int8": "kv-int8",
    "int4 centred": "kv-int4",
    "zipcache int4/int2, 0.38": "kv-zipcache{text=false,important=0.38}",
    "kivi 4 bit": "kv-kivi{group=32,residual=32}",
    "mikv int8/int2": "kv-mikv{text=false,important=0.25}",
    "int4 symmetric": "kv-int4{centred=false}",
    "zipcache int4/int2, 0.6": "kv-zipcache{text=false,important=0.6}",
}
TWO_TURNS = {
    "nothing dropped": NONE,
    "plain drop": "drop-fastv{layer=2,keep=0.25}",
    "drop, keep int8+int4": "drop-fastv{layer=2,keep=0.25} kv-keep-dropped{hi=int8,lo=int4}",
    "plain drop, 1/8": "drop-fastv{layer=2,keep=0.125}",
    "drop 7/8, keep int8+int4": "drop-fastv{layer=2,keep=0.125} kv-keep-dropped{hi=int8,lo=int4}",
}
EQUAL_BYTES = {"quanto 4 bit": "int4 centred", "quanto 2 bit": "zipcache int4/int2, 0.38", "kvpress snapkv": "int4 centred", "kvpress knorm": "int4 centred"}


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
    """Conversations with two questions, those of the test split first and more by the same generator; the first is answered as the reference
    says."""
    seed, found = make_data.SPLITS["test"][0], []
    two = make_data.SLICES.index("two_turn")
    for i in range(two, two + count * len(make_data.SLICES), len(make_data.SLICES)):
        pictures, turns = make_data.draw(np.random.default_rng([seed, i]), "two_turn", "test")
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
        self.bytes: list[tuple[float, float]] = []

    def start(self, asks: list[Ask]) -> Callable[[np.ndarray, int], np.ndarray]:
        seen = self.session.encode([a.prompt for a in asks])
        _, cache = self.session.engine.prefill(seen.batch.feeds, seen.batch.length + max(len(a.rest) for a in asks) + ROOM)
        self.bytes.append(bits(self.program, cache))
        return lambda token, i: self.session.engine.decode(cache, token, seen.batch.step_positions(i))

    def answers(self, asks: Sequence[Ask]) -> np.ndarray:
        return answer(asks, self.start, self.session.eos, self.session.text_of)


def bits(program: Program, cache: Any) -> tuple[float, float]:
    """Bytes of a cache's valid rows, all overheads counted, over those of as many float16 and float32 rows: (fp16 scales, float32 scales)."""
    found = []
    for element in (2, 4):
        have = sum(_bytes(e.format or FLOAT, e, _rows(cache, e, row), element) for row, e in enumerate(program.kv))
        found.append(have / _tokens(program, cache) / element)
    return found[0], found[1]


def _rows(cache: Any, entry: Any, row: int) -> dict[str, float]:
    return {p.name: float(cache.parts[f"lengths{p.suffix()}"][row].mean()) for p in (entry.format or FLOAT).partitions}


def _bytes(form: Any, entry: Any, rows: dict[str, float], element: int) -> float:
    return form.bytes(rows, entry.heads, entry.head_dim, entry.value_dim, element)


def _tokens(program: Program, cache: Any) -> float:
    """Numbers that all prompt tokens have in all layers: what nothing dropped, nothing quantized would hold."""
    length = float(cache.slot.mean())
    return sum(length * e.heads * (e.head_dim + e.value_dim) for e in program.kv)


# ** theirs **


class Theirs:
    """transformers' own model with a cache, or a press, of its world; one token at a time as ours."""

    def __init__(self, bench: Bench, cache: Callable[[Any], Any], press: Any = None) -> None:
        self.model, self.processor, self.cache, self.press = bench.model, bench.processor, cache, press
        self.bytes: list[tuple[float, float]] = []

    @torch.no_grad()
    def start(self, asks: list[Ask]) -> Callable[[np.ndarray, int], np.ndarray]:
        ids = torch.from_numpy(np.stack([a.prompt.tokens for a in asks]))
        pixels = torch.from_numpy(np.concatenate([a.prompt.vision["pixel_values"].reshape(-1, *a.prompt.vision["pixel_values"].shape[-3:]) for a in asks]))
        cache = self.cache(self.model)
        with self.press(self.model) if self.press else nullcontext():
            self.model(input_ids=ids, pixel_values=pixels, past_key_values=cache, use_cache=True)
        self.bytes.append(held(cache, ids.shape[1]))

        @torch.no_grad()
        def step(token: np.ndarray, i: int) -> np.ndarray:
            positions = torch.full((len(token), 1), ids.shape[1] + i)
            return self.model(input_ids=torch.from_numpy(token), past_key_values=cache, position_ids=positions, use_cache=True).logits[:, -1].numpy()

        return step

    def answers(self, asks: Sequence[Ask]) -> np.ndarray:
        eos = self.model.generation_config.eos_token_id
        text = lambda tokens: self.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()  # noqa: E731
        return answer(asks, self.start, eos if isinstance(eos, list) else [eos], text)


def held(cache: Any, length: int) -> tuple[float, float]:
    """As `bits`: what transformers' cache holds, packed as it would be, per number of all prompt tokens."""
    found = []
    for element in (2, 4):
        have, tokens = 0.0, 0.0
        for layer in cache.layers:
            for which in ("keys", "values"):
                kept = getattr(layer, which)
                stored = getattr(layer, f"_quantized_{which}", None)
                shape = stored.shape if stored is not None else kept.shape
                tokens += shape[0] * shape[1] * length * shape[3]
                count = float(np.prod(shape))
                have += count * (layer.nbits / 8 + 2 * element / layer.q_group_size) if stored is not None else count * element
        found.append(have / tokens / element)
    return found[0], found[1]


def theirs(bench: Bench) -> dict[str, Callable[[], Theirs] | str]:
    """name -> how to make it, or why it cannot be."""
    found: dict[str, Callable[[], Theirs] | str] = {}
    if find_spec("optimum") is None or find_spec("optimum.quanto") is None:
        found |= dict.fromkeys(("quanto 4 bit", "quanto 2 bit"), "optimum-quanto is not installed")
    else:
        from transformers import QuantizedCache

        def quantized(nbits: int) -> Callable[[], Theirs]:
            return lambda: Theirs(bench, lambda model: QuantizedCache("quanto", model.config.get_text_config(), nbits=nbits))

        found |= {"quanto 4 bit": quantized(4), "quanto 2 bit": quantized(2)}
    if reason := unfit("kvpress", "transformers"):
        found |= dict.fromkeys(("kvpress snapkv", "kvpress knorm"), reason)
    else:
        import kvpress
        from transformers import DynamicCache

        def pressed(kind: str, **options: Any) -> Callable[[], Theirs]:
            return lambda: Theirs(bench, lambda model: DynamicCache(), getattr(kvpress, kind)(compression_ratio=0.72, **options))

        found |= {"kvpress snapkv": pressed("SnapKVPress", window_size=16), "kvpress knorm": pressed("KnormPress")}
    return found


def unfit(package: str, needs: str) -> str:
    """Why `package` cannot run beside the installed `needs`; empty if it can."""
    try:
        wanted = [Requirement(r) for r in metadata.requires(package) or []]
    except metadata.PackageNotFoundError:
        return f"{package} is not installed"
    limits = next((r.specifier for r in wanted if r.name == needs), SpecifierSet())
    have = metadata.version(needs)
    return "" if have in limits else f"{package} {metadata.version(package)} runs with {needs} {limits}, here is {have}"


# ** speed: a step of both, in turns **


def speed(ours: Ours, other: Theirs, asks: list[Ask], rounds: int = 3) -> dict[str, float]:
    """Median milliseconds of a decode step with these prompts, one sample at a time."""
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(rounds):
        for name, run in (("ours", ours), ("theirs", other)):
            step = run.start(asks[:1])
            step(np.array([[5]]), 0)
            for i in range(8):
                begin = time.perf_counter()
                step(np.array([[5]]), i + 1)
                times[name].append(1e3 * (time.perf_counter() - begin))
    return {n: round(median(t), 3) for n, t in times.items()} | {"times_faster": round(median(times["theirs"]) / median(times["ours"]), 2)}


# ** all of it **


def line(right: np.ndarray, base: np.ndarray, made: Any, seconds: float) -> dict[str, Any]:
    low, high = interval(Differences.of(right.astype(float) - base), 0.975)
    w = wilson(float(right.sum()), len(right), 0.95)
    fp16, fp32 = (float(np.mean([b[i] for b in made.bytes])) for i in (0, 1))
    points = {"difference": right.mean() - base.mean(), "low": low, "high": high}
    return {
        "accuracy": round(100 * float(right.mean()), 2),
        "interval": [round(100 * x, 2) for x in w],
        "points": {k: round(100 * float(v), 2) for k, v in points.items()},
        "changed": int((right != base).sum()),
        "compression": {"of_fp16": round(1 / fp16, 2), "of_float32": round(1 / fp32, 2)},
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
            record[part][name] = {"recipe": recipe} | line(right, base, run, time.perf_counter() - start)
            run.session.close()
        show(name, record[part][name])
        save(NAME, record)
    if base is None:
        raise SystemExit("kv_accuracy: nothing was asked for")
    return base


def compare(bench: Bench, asks: Sequence[Ask], base: np.ndarray, record: dict[str, Any]) -> None:
    """The caches of others, and a step of theirs against ours at about the same bytes."""
    for name, make in theirs(bench).items():
        if "right" in record["theirs"].get(name, {}):
            continue
        if isinstance(make, str):
            record["theirs"][name] = {"missing": make}
            continue
        start, same = time.perf_counter(), EQUAL_BYTES[name]
        run = make()
        record["theirs"][name] = line(run.answers(asks), base, run, time.perf_counter() - start) | {"equal_bytes": same}
        show(name, record["theirs"][name])
        with tempfile.TemporaryDirectory() as folder:
            record["speed"][name] = {"ours": same} | speed(Ours(bench, OURS[same], folder), run, list(asks))
        print(record["speed"][name], flush=True)
        save(NAME, record)


def show(name: str, line: dict[str, Any]) -> None:
    print(f"{name:28s} {line['accuracy']:6.2f}  {line['points']}  {line['compression']}  {line['seconds']} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=400)
    parser.add_argument("--only", nargs="+", help="of the names of our recipes; the first is what the others are compared with")
    parser.add_argument("--skip-theirs", action="store_true")
    options = parser.parse_args()
    chosen = {n: r for n, r in OURS.items() if not options.only or n in options.only}
    bench = Bench(options.items)
    first, second = in_the_prompt(bench), second_questions(bench, options.pairs)
    questions = {"in_the_prompt": len(first), "second_question": len(second), "checkpoint_and_items": digest(options.items)}
    path = RESULTS / f"{NAME}.json"
    record = json.loads(path.read_text()) if path.is_file() else {}
    if record.get("questions") != questions:
        record = {"questions": questions, **{part: {} for part in ("second_question", "dropping", "in_the_prompt", "theirs", "speed")}}
    record |= {"machine": machine(1), "date": time.strftime("%Y-%m-%d"), "tokens_of_a_prompt": round(float(np.mean([len(a.prompt.tokens) for a in second])))}
    base = measure(bench, chosen, second, "second_question", record)
    measure(bench, TWO_TURNS, second, "dropping", record)
    record["recovered"] = recovered(record["dropping"])
    print(record["recovered"], flush=True)
    if not options.skip_theirs:
        compare(bench, second, base, record)
    measure(bench, {n: r for n, r in chosen.items() if "symmetric" not in n}, first, "in_the_prompt", record)
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
