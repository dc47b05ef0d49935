"""The main job on the shipped test model: optimize it, show before and after, answer a question, draw what was kept, build TensorRT-RTX engines.

    make demo        or        python examples/demo.py --output out/demo

Everything that is printed is measured in this run and saved as summary.json in the output folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # runs from a checkout too, and finds examples.testbed

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.simplefilter("ignore")

RECIPE = "drop-fastv{layer=5,keep=72}, clean-up"  # half of the picture from layer 5 of 8 on
QUESTIONS = 320
STAGES = (("encoder", "encoder ms"), ("prefill", "prefill ms"), ("decode", "decode ms per token"), ("ttft", "time to first token ms"))


def main() -> int:
    options = arguments()
    start = time.perf_counter()
    out: Path = options.output
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    import foveate

    say("1. optimize for ONNX Runtime", options)
    baseline = foveate.optimize_model(options.checkpoint, target="ort", output=out / "baseline", threads=options.threads)
    reduced = foveate.optimize_model(options.checkpoint, recipe=options.recipe, target="ort", output=out / "reduced", threads=options.threads)
    print(reduced.report)

    say("2. latency, both in turns", options)
    timing = bench(baseline, reduced, options)
    print(timing)

    say(f"3. accuracy on {options.questions} held-out items", options)
    scores = accuracy({"before": baseline, "after": reduced}, options)
    for line in compare(scores):
        print(line)

    say("4. a question about a picture", options)
    example = answer(reduced, options)

    summary = {"report": reduced.report.as_dict(), "bench": timing.as_dict(), "accuracy": scores, "example": example}
    if not options.no_engines:
        say("5. TensorRT-RTX engines, no GPU needed", options)
        summary["engines"] = engines(options)
    summary["seconds"] = round(time.perf_counter() - start, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    print(f"\ndone in {summary['seconds']} s; everything is in {out}")
    return 0


def arguments() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, default=ROOT / "out" / "demo")
    p.add_argument("--checkpoint", type=Path, default=ROOT / "examples" / "testbed" / "checkpoint", help="model folder")
    p.add_argument("--data", type=Path, help="data set folder with items.jsonl; made from the generator when left out")
    p.add_argument("--recipe", default=RECIPE)
    p.add_argument("--questions", type=int, default=QUESTIONS)
    p.add_argument("--threads", type=int, default=0, help="of ONNX Runtime; 0 = its own choice")
    p.add_argument("--repeat", type=int, default=15, help="timed repetitions")
    p.add_argument("--no-engines", action="store_true", help="leave the TensorRT-RTX build out")
    options = p.parse_args()
    if not (options.checkpoint / "config.json").is_file():
        p.error(f"no model in {options.checkpoint}")
    return options


def say(what: str, options: argparse.Namespace) -> None:
    print(f"\n== {what}", flush=True)


def bench(baseline: Any, reduced: Any, options: argparse.Namespace) -> Any:
    from foveate.runtime.bench import Request, measure

    item = dataset(options)[0]
    session = reduced.session
    request = Request.of(session, item.pictures()[:1], None if has_template(session) else f"<image> {item.turns[0].question}", batch=1, new_tokens=17)
    return measure({"artifact": session, "baseline": baseline.session}, request, repeat=options.repeat, warmup=3)


def has_template(session: Any) -> bool:
    return bool(getattr(session.processor, "chat_template", None))


def dataset(options: argparse.Namespace) -> list[Any]:
    """The first held-out items, balanced over the kinds of question; written by the generator once."""
    from foveate.runtime.datasets import load_items

    folder = options.data
    if folder is None:
        folder = options.output / "data"
        if not folder.exists():
            from examples.testbed.make_data import write

            write("test", folder, options.questions)
    return load_items(folder, limit=options.questions)


def accuracy(models: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """name -> {"score", "items", "slices": {slice: score}}; the same items in the same batches for each."""
    from foveate.runtime.evaluate import Settings, evaluate

    items = dataset(options)
    found = {}
    for name, model in models.items():
        run = evaluate(model.session, items, options.output / f"answers-{name}.jsonl", Settings(max_new_tokens=40, batch=8), name=name)
        slices: dict[str, list[float]] = {}
        for result in run.results.values():
            slices.setdefault(result.slice, []).append(result.score)
        everything = [s for scores in slices.values() for s in scores]
        found[name] = {"score": sum(everything) / len(everything), "items": len(everything), "slices": {k: sum(v) / len(v) for k, v in sorted(slices.items())}}
    return found


def compare(scores: dict[str, Any]) -> list[str]:
    before, after = scores["before"], scores["after"]
    lines = [f"exact match on {before['items']} items: before {before['score']:.1%}, after {after['score']:.1%}"]
    return lines + [f"  {name:14s} {value:6.1%} -> {after['slices'][name]:6.1%}" for name, value in before["slices"].items()]


def answer(model: Any, options: argparse.Namespace) -> dict[str, Any]:
    """One question answered, and the tokens that were kept for it as a PNG."""
    item = next(i for i in dataset(options) if len(i.images) == 1 and len(i.turns[0].answers) > 0)
    pictures, question = item.pictures(), item.turns[0].question
    if has_template(model.session):
        result = model.generate(pictures, messages=[{"role": "user", "content": question}], max_new_tokens=40)
    else:
        result = model.generate(pictures, f"<image> {question}", max_new_tokens=40)
    path = result.overlay(options.output / "kept.png")
    print(f"question: {question}\nanswer:   {result.text}   (expected: {item.turns[0].answers[0]})\noverlay:  {path}")
    return {"question": question, "answer": result.text, "expected": item.turns[0].answers[0], "overlay": str(path), "timings": result.timings.as_dict()}


def engines(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Vision, prefill and decode as TensorRT-RTX engines; sizes and build seconds."""
    import foveate

    start = time.perf_counter()
    built = foveate.optimize_model(options.checkpoint, recipe=options.recipe, target="tensorrt-rtx", output=options.output / "engines")
    rows = []
    for stage, component in built.artifact.manifest["components"].items():
        size = (built.path / component["file"]).stat().st_size
        rows.append({"stage": stage, "file": component["file"], "bytes": size, "compute_capability": component["compute_capability"],
                     "precision": component["precision"]})
        print(f"{stage:8s} {size / 1e6:7.2f} MB, {component['precision']}, compute capability {component['compute_capability']}")
    if len(rows) != 3:
        raise SystemExit(f"demo: {len(rows)} engines were built, 3 were expected")
    print(f"built in {time.perf_counter() - start:.1f} s with capture and passes")
    return rows


if __name__ == "__main__":
    sys.exit(main())
