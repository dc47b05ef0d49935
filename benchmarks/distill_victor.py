"""Registers by distillation on the testbed: Victor against its controls at equal training budget. One configuration after another, resumable.

    python benchmarks/distill_victor.py --work build/distill --data-only      # the teacher answers the training questions (once)
    python benchmarks/distill_victor.py --work build/distill                  # train and judge what is left to do, most informative first
    python benchmarks/distill_victor.py --only victor-m8-k2 --seconds 600     # one of them, with another budget
    python benchmarks/distill_victor.py --table                               # benchmarks/results/distill_victor.jsonl -> docs/distill_victor.md

Training sees pictures and questions only; answers are the original model's own. Judged on labelled `test` items (other digits) through the ONNX
Runtime artifact and greedy decoding, with Wilson intervals, by slice.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.testbed import make_data
from examples.testbed.evaluate import messages
from examples.testbed.questions import PAGE, PAIR, SCENE, TRAINING_ONLY, ask, pick
from examples.testbed.scenes import page, scene
from foveate.distill_data import Source

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples/testbed/checkpoint"
SEED, QUESTIONS = 7002, 10


def source(number: int) -> Source:
    """Picture `number` of the training stream (a fifth are pages, an eighth are pairs), and what is asked about it: a function of the number alone.

    No answer is kept.
    """
    rng = np.random.default_rng([SEED, number])
    draw = rng.random()
    if draw < 0.2:
        pictures, kinds = [page(rng)], list(PAGE)
    elif draw < 0.325:
        pictures, kinds = [scene(rng, "train"), scene(rng, "train")], list(PAIR)
    else:
        pictures, kinds = [scene(rng, "train")], [k for k in SCENE if k not in TRAINING_ONLY]
    asked: dict[str, None] = {}
    for _ in range(60):
        found = ask(rng, pick(rng, kinds), *(p.things for p in pictures))
        if found:
            asked.setdefault(found.question)
        if len(asked) == QUESTIONS:
            break
    return Source(tuple(Image.fromarray(p.pixels) for p in pictures), tuple(asked))


# ---- what is tried. T0: registers alone; T1: with adapters (LoRA, rank 64, on all linear layers, merged afterwards)

LORA = "lora{rank=64}"
SIZES = (4, 8, 16, 32)
VISION = ("space-to-depth", "matryoshka-mix")  # they change what the vision stage returns: pixels are cached too
ELASTIC = {"elastic": list(SIZES)}  # one training for all of them


LONG, LONGER, FOCUS = {"steps": 2000}, {"steps": 6000}, {"focus": 0.5}
RANDOM = f"drop-random{{layer=2,keep=8}}, {LORA}"


def t1(layer: int, registers: int = 8, more: str = ",content=visual") -> str:
    return f"victor{{registers={registers},layer={layer}{more}}}, {LORA}"


BLIND, PREFUSION = t1(4, 32, ",content=visual,question_blind=true"), "prefusion{registers=8,layer=2,content=visual}"
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "victor-m8-k2": (t1(2), LONG),
    "elastic-k2": (t1(2), LONG | ELASTIC),
    "elastic-k2-focus": (t1(2), LONGER | ELASTIC | FOCUS),
    "none-m0-k2": (t1(2, 0, ""), LONG),
    "random8-k2": (RANDOM, LONG),
    "attention8-k2": (f"drop-fastv{{layer=2,keep=8}}, {LORA}", {"packed": False, "steps": 500}),  # questions alone: as many CPU seconds, not rows
    "victor-m8-k2-long": (t1(2), LONGER),
    "victor-m8-k2-focus": (t1(2), LONGER | FOCUS),
    "random8-k2-focus": (RANDOM, LONGER | FOCUS),
    "none-m0-k2-focus": (t1(2, 0, ""), LONGER | FOCUS),
    "none-m0-k2-long": (t1(2, 0, ""), LONGER),
    "random8-k2-long": (RANDOM, LONGER),
    "words-m8-k2": (t1(2, 8, ""), LONG),  # registers that hold nothing of the image at first, as published
    "blind-m32-k4": (BLIND, LONG),
    "blind-m32-k4-focus": (BLIND, LONGER | FOCUS),
    "elastic-k1": (t1(1), ELASTIC),
    "none-m0-k1": (t1(1, 0, ""), {}),
    "prefusion-m8-k2": (PREFUSION, {"steps": 1200}),
    "prefusion-m8-k2-focus": (PREFUSION, LONGER | FOCUS),
    "space-to-depth-36": (f"space-to-depth{{side=2}}, {LORA}", {"sources": 3200, "steps": 1200}),
    "matryoshka-mix-36": (f"matryoshka-mix{{tokens=36}}, {LORA}", {"sources": 3200, "steps": 1200}),
    "exit-router": ("exit-router{layers=[2,4,6]}", {"sources": 640}),
    "elastic-k4": (t1(4), ELASTIC),
    "none-m0-k4": (t1(4, 0, ""), {}),
    "elastic-k3": (t1(3), ELASTIC),
    "none-m0-k3": (t1(3, 0, ""), {}),
    "blind-m8-k4": (t1(4, 8, ",content=visual,question_blind=true"), LONG),
    "elastic-k2-t0": ("victor{registers=8,layer=2,content=visual}", ELASTIC),
    "elastic-k4-t0": ("victor{registers=8,layer=4,content=visual}", ELASTIC),
    "elastic-k1-t0": ("victor{registers=8,layer=1,content=visual}", ELASTIC),
    "elastic-k3-t0": ("victor{registers=8,layer=3,content=visual}", ELASTIC),
    "victor-m32-k2": (t1(2, 32), LONG),
    "victor-m4-k2": (t1(2, 4), LONG),
    "victor-m16-k2": (t1(2, 16), LONG),
    "victor-m4-k2-focus": (t1(2, 4), LONGER | FOCUS),
}
UNTRAINED = {"original": None, "attention8-k2-untrained": "drop-fastv{layer=2,keep=8}", "random8-k2-untrained": "drop-random{layer=2,keep=8}",
             "none-m0-k2-untrained": "victor{registers=0,layer=2}"}
SHIPPED = {  # name in examples/testbed/learned -> the training whose weights it has
    "victor-8": "victor-m8-k2-focus",
    "victor-blind-32": "blind-m32-k4-focus",
    "prefusion-8": "prefusion-m8-k2",
    "space-to-depth-36": "space-to-depth-36",
    "matryoshka-mix-36": "matryoshka-mix-36",
    "exit-router": "exit-router",
}
LEARNED = ROOT / "examples/testbed/learned"
MORE = ROOT / "benchmarks/results/distill_victor_more.json"
RESULTS, TABLE = ROOT / "benchmarks/results/distill_victor.jsonl", ROOT / "docs/distill_victor.md"


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [l.partition(":")[2].strip() for l in info.read_text().splitlines() if l.startswith("model name")] if info.is_file() else []
    return names[0] if names else platform.processor() or "unknown CPU"


def judge(recipe: Any, weights: Path | None, work: Path, name: str, count: int) -> dict[str, Any]:
    """Accuracy on labelled `test` items through ONNX Runtime and greedy decoding: mark -> score, low, high, n."""
    import foveate
    from foveate.runtime.metrics import score
    from foveate.runtime.stats import wilson

    artifact = work / name / "artifact"
    foveate.optimize_model(str(CHECKPOINT), recipe, output=artifact, weights=weights, overwrite=True)
    marks: dict[str, list[float]] = {}
    items = list(make_data.items("test", count))
    with foveate.load(artifact) as session:
        for begin in range(0, count, 18):
            some = items[begin : begin + 18]
            said: list[list[str]] = [[] for _ in some]
            for turn in range(max(len(i.turns) for i in some)):
                now = [k for k, i in enumerate(some) if len(i.turns) > turn]
                chats = [messages(some[k], said[k]) for k in now]
                made = session.generate([list(some[k].images) for k in now], messages=chats, max_new_tokens=12, do_sample=False)
                for place, k in enumerate(now):
                    said[k].append(made.texts[place])
            for item, answers in zip(some, said, strict=True):
                right = [score(a, [t.answer], "exact") for a, t in zip(answers, item.turns, strict=True)]
                marks.setdefault(item.slice, []).append(sum(right) / len(right))
    everything = [m for part in marks.values() for m in part]

    def line(scores: list[float]) -> dict[str, Any]:
        low, high = wilson(sum(scores), len(scores), 0.95)
        return {"score": sum(scores) / len(scores), "low": low, "high": high, "n": len(scores)}

    return {"overall": line(everything), "slices": {k: line(v) for k, v in sorted(marks.items())}}


def train(name: str, args: argparse.Namespace, program: Any, processor: Any) -> dict[str, Any]:
    """One configuration to the end (a killed one goes on at its checkpoint), and its judgement."""
    import foveate

    text, more = CONFIGS[name][0], dict(CONFIGS[name][1])
    count = more.pop("sources", args.sources)
    data = [source(i) for i in range(count)]
    cache = args.work / ("teacher" if count == args.sources else f"teacher-{count}{'-pixels' if text.startswith(VISION) else ''}")
    told, resumed = {"last": 0.0}, (args.work / name / "state.pt").is_file()
    start = time.process_time()

    def say(stage: str, line: Any) -> None:
        if stage == "teacher" or "agreement" in line or time.monotonic() - told["last"] > 30:
            told["last"] = time.monotonic()
            print(f"{name} {line}", flush=True)

    settings = {"steps": args.steps, "batch": 4, "lr": 3e-3, "max_new_tokens": 16, "held_out": 64, "evaluate_every": 400, "save_every": 100, **more}
    done = foveate.distill(program, data, text, processor=processor, output=args.work / name, cache=cache, progress=say, **settings)
    seconds = time.process_time() - start
    report = done.report
    kept = {k: report.get(k) for k in ("steps", "agreement", "rows", "held_out_questions", "parameters", "students", "layers")}
    found = {"recipe": done.recipe.read_text(encoding="utf-8"), "seconds_cpu": None if resumed else round(seconds, 1),
             "rows_seen": settings["steps"] * settings["batch"], **kept}
    return {} if args.train_only else {n: {**found, **judge(r, done.weights, args.work, n, args.items)} for n, r in served(name, done.recipe).items()}


def served(name: str, recipe: Path) -> dict[str, Any]:
    """The recipes that one training serves: itself, or one for every number of registers."""
    from foveate.distillation import _with
    from foveate.passes.recipe import load

    if "elastic" not in CONFIGS[name][1]:
        return {name: str(recipe)}
    return {f"elastic-m{m}-{name.removeprefix('elastic-')}": _with(load(str(recipe)), registers=m, table=max(SIZES)) for m in SIZES}


def more(args: argparse.Namespace) -> None:
    """Points that the shipped registers lose, overall and by slice, and how many items a slice has -> `MORE`."""
    shipped = {"original": (None, None), "victor-8": (str(LEARNED / "victor-8.yaml"), LEARNED / "victor-8.safetensors")}
    found = {n: judge(recipe, weights, args.work, f"{n}-more", args.more) for n, (recipe, weights) in shipped.items()}
    one, other = found["original"], found["victor-8"]
    lost = {k: round(100 * (one["slices"][k]["score"] - other["slices"][k]["score"]), 1) for k in one["slices"]}
    record = {"items": args.more, "items_of_a_slice": min(v["n"] for v in one["slices"].values()), **{n: f["overall"] for n, f in found.items()},
              "lost": round(100 * (one["overall"]["score"] - other["overall"]["score"]), 2), "lost_by_slice": lost,
              "date": time.strftime("%Y-%m-%d"), "machine": f"{processor_name()}, 1 thread, shared"}
    MORE.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(record["lost"], max(lost.items(), key=lambda x: x[1]))


def ship(work: Path) -> None:
    """Recipes and weights for the testbed's checkpoint, in half precision."""
    from dataclasses import replace

    from safetensors.torch import load_file, save_file

    from foveate.passes.recipe import load

    LEARNED.mkdir(exist_ok=True)
    done = {r["name"]: r for r in map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())}
    for name, training in SHIPPED.items():
        recipe, row = load(str(work / training / "recipe.yaml")), done[training]
        told = (f"trained for examples/testbed/checkpoint on {row['rows_seen']} rows; {percent(row['overall']['score'])}% of {row['items']} test items, "
                f"original {percent(done['original']['overall']['score'])}%")
        (LEARNED / f"{name}.yaml").write_text(replace(recipe, name=name, description=told).yaml(), encoding="utf-8")
        tensors = load_file(str(work / training / "weights.safetensors"))
        save_file({n: t.half().contiguous() for n, t in tensors.items()}, str(LEARNED / f"{name}.safetensors"))


HEAD = """
# Learned compression by distillation on the testbed

Made by `benchmarks/distill_victor.py` from `benchmarks/results/distill_victor.jsonl`. The testbed model has 8 layers and 144 visual tokens. k: the
layer at whose entry visual tokens leave; m: how many registers (or kept tokens) stay. Trained on unlabelled pictures ({sources} of them, about ten
questions each) against the model's own answers; a row is a picture with all its questions, a step sees four of them. t0: registers alone; all others
with adapters of rank 64 on every linear layer, merged afterwards (prefusion: copies of the first layers instead). elastic: one training for 4, 8, 16
and 32 registers, each step draws one. long: 6,000 steps; focus: as many, half of their rows drawn by how far the student still was from the original,
and of elastic ones the number of registers alike.
attention8 is trained on questions alone, as it looks at them when it chooses, for about as many CPU seconds.
Judged on labelled held-out items (other digits) by greedy decoding through ONNX Runtime. Intervals are Wilson's at 95%; one seed each. agreement:
share of held-out questions that get the original's answer, the best evaluation, whose weights are judged (of elastic ones: with 8 registers; with
focus: the mean of the four numbers).
"""


def percent(x: float) -> str:
    return f"{100 * x:.1f}"


def table() -> str:
    rows = [json.loads(l) for l in RESULTS.read_text(encoding="utf-8").splitlines()]
    by_name = {r["name"]: r for r in rows}
    base = by_name["original"]
    lines = [HEAD.strip().format(sources=5824), "", *_grid(by_name), "",
             "| configuration | rows seen | agreement | accuracy | 95% interval | lost | worst slice, lost |",
             "|---|--:|--:|--:|--:|--:|---|"]
    for r in rows:
        o, drops = r["overall"], {k: base["slices"][k]["score"] - v["score"] for k, v in r["slices"].items()}
        worst = f"{max(drops, key=drops.get)} {percent(max(drops.values()))}" if r is not base else ""
        lines.append(f"| {r['name']} | {r.get('rows_seen', '')} | {percent(r['agreement']) if 'agreement' in r else ''} | {percent(o['score'])} | "
                     f"{percent(o['low'])} to {percent(o['high'])} | {percent(base['overall']['score'] - o['score'])} | {worst} |")
    slices = sorted({k for r in rows for k in r["slices"]})
    lines += ["", f"Slices ({base['slices'][slices[0]]['n']} items each), accuracy in percent:", ""]
    lines += ["| configuration | " + " | ".join(slices) + " |", "|---|" + "--:|" * len(slices)]
    lines += [f"| {r['name']} | " + " | ".join(f"{100 * r['slices'][k]['score']:.0f}" for k in slices) + " |" for r in rows]
    last = rows[-1]
    lines += ["", f"{last['date']}, {last['machine']}, {last['items']} items per row of the tables.", ""]
    return "\n".join(lines)


def _grid(rows: dict[str, Any]) -> list[str]:
    """Accuracy by layer and number of registers."""
    lines = [f"Accuracy in percent of elastic registers by cut and number (original {percent(rows['original']['overall']['score'])}):", "",
             "| k | m = 0 | " + " | ".join(f"m = {m}" for m in SIZES) + " | " + " | ".join(f"t0, m = {m}" for m in SIZES) + " |", "|--:|" + "--:|" * 9]
    for layer in (1, 2, 3, 4):
        names = [f"none-m0-k{layer}", *(f"elastic-m{m}-k{layer}" for m in SIZES), *(f"elastic-m{m}-k{layer}-t0" for m in SIZES)]
        lines.append(f"| {layer} | " + " | ".join(percent(rows[n]["overall"]["score"]) if n in rows else "" for n in names) + " |")
    return lines


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, default=ROOT / "build/distill")
    p.add_argument("--sources", type=int, default=5824)
    p.add_argument("--steps", type=int, default=800)
    p.add_argument("--items", type=int, default=612, help="test items to judge by; slices take turns")
    p.add_argument("--only", action="append", choices=[*CONFIGS, *UNTRAINED])
    p.add_argument("--data-only", action="store_true")
    p.add_argument("--train-only", action="store_true", help="train, and judge in a later run")
    p.add_argument("--more", type=int, metavar="ITEMS", help="judge the original and the shipped registers on so many items: slices of 34 are coarse")
    p.add_argument("--table", action="store_true")
    p.add_argument("--ship", action="store_true", help="copy recipes and weights of finished trainings to examples/testbed/learned")
    args = p.parse_args()
    if args.ship:
        ship(args.work)
        return
    if args.table:
        TABLE.write_text(table(), encoding="utf-8")
        return
    import torch

    from foveate.graph.capture import capture
    from foveate.graph.families import load_model

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    if args.more:
        more(args)
        return
    model, processor = load_model(str(CHECKPOINT), dtype="auto", device="cpu")
    program = capture(model, processor)
    if args.data_only:
        from foveate.distill_data import Cache
        from foveate.distill_train import Settings
        from foveate.distillation import making_of

        Cache.build(program, processor, [source(i) for i in range(args.sources)], args.work / "teacher", making_of(program, Settings(max_new_tokens=16)), print)
        return
    finished = {json.loads(l)["name"] for l in RESULTS.read_text(encoding="utf-8").splitlines()} if RESULTS.is_file() else set()
    for name in args.only or [*([] if args.train_only else UNTRAINED), *CONFIGS]:
        if finished & {name, name.replace("elastic-", f"elastic-m{SIZES[0]}-")}:
            continue
        rows = train(name, args, program, processor) if name in CONFIGS else {name: judge(UNTRAINED[name], None, args.work, name, args.items)}
        for label, found in rows.items():
            line = {"name": label, **found, "items": args.items, "date": time.strftime("%Y-%m-%d"), "machine": f"{processor_name()}, 1 thread, shared"}
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
            print(f"{label}: {100 * found['overall']['score']:.1f}", flush=True)
        if rows and "original" in finished | {name}:
            TABLE.write_text(table(), encoding="utf-8")


if __name__ == "__main__":
    main()
