"""What choosing tokens costs: the nodes that every reduction method adds, on ONNX Runtime, at 576 visual tokens.

    python -m benchmarks.overhead [--methods prune-divprune ...] [--rounds 5] [--pairs 5]

Per method, against encoder + prefill of the unreduced model (one thread, ratios within one run):

    nodes      time of the nodes that the method adds (scores, top-k, gathers, merges), by ONNX Runtime's own profile: the sum of every
               node's minimum over the rounds; a profile charges each node 1 to 2 us, so this is an upper bound
    pairs      the same by whole runs in turns: the stage with the selection computed, returned and not used, against the stage without it;
               for methods inside the tower, and those with several cuts, there is no such pair
Goal: no vision-side method above 5 %. Methods are found by discovery; a new one is measured the day it lands. The table goes to
docs/methods_overhead.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch

from foveate.export.backends import find
from foveate.graph.capture import capture
from foveate.graph.errors import FoveateError
from foveate.graph.kv_table import derive_kv
from foveate.passes import vision_select
from foveate.passes.base import PassError, discover, make
from foveate.passes.methods.clean_up import CleanUp
from foveate.passes.reduce import Reduce
from foveate.passes.select import Select
from foveate.passes.vision_select import VisionReduce

try:
    from . import node_profile
    from .measure import RESULTS, alternate, machine, save
    from .ort_vs_hf import Ours, lower
    from .shapes import SHAPES, Shape
except ImportError:  # run as a script
    import node_profile
    from measure import RESULTS, alternate, machine, save
    from ort_vs_hf import Ours, lower
    from shapes import SHAPES, Shape

GOAL = 0.05
KEEPS = (64, 144)  # of 576: 11 % and 25 %
REDUCING = ("drop", "prune", "merge", "bypass", "exit")  # the first word of a method's name says what it does
DEEPEST = 32  # layers of the models that defaults were published for
SETTINGS: dict[str, dict[str, Any]] = {  # where a default does not fit a tower of 6 layers, or a prompt of one picture
    "bypass-mod": {"layers": (3, 5, 7, 9)},
    "bypass-vision": {"layers": (1, 3), "keep": (0.7, 0.49)},
    "prune-elip": {"layers": (1, 2, 4), "ahead": (1, 2, 1)},
    "prune-evs": {"frames": 4},
}


def variants(name: str, kind: Any, layers: int) -> list[dict[str, Any]]:
    """Parameters to measure a method with: its defaults, layers scaled to the model, and 64 and 144 tokens where it has one budget."""
    known = {f.name: f.default for f in dataclasses.fields(kind)}
    base = dict(SETTINGS.get(name, {}))
    if issubclass(kind, Reduce):
        for field in ("layer", "layers"):
            value = known.get(field)
            if field in base:
                continue
            if isinstance(value, int) and value >= layers:
                base[field] = value * layers // DEEPEST
            elif isinstance(value, tuple) and max(value) >= layers:
                base[field] = sorted({max(v * layers // DEEPEST, 1) for v in value})
    if isinstance(known.get("keep"), (int, float)) and not issubclass(kind, Reduce):
        return [base | {"keep": keep} for keep in KEEPS]
    if issubclass(kind, Select):
        return [base | {"keep": KEEPS[0]}]
    return [base]


class Vision:
    """The vision stage alone, as a session; the backend's own lowering."""

    def __init__(self, program: Any, folder: Path, images: int) -> None:
        stage = program.clone()
        stage.stages = {"vision": stage["vision"]}
        find("ort").lower(stage, folder, {"threads": 1})
        self.file = folder / "components/vision.onnx"
        self.feeds = _pictures(program, images)
        self.session = node_profile.session(self.file)

    def __call__(self) -> None:
        self.session.run(None, self.feeds)

    def profile(self, rounds: int) -> dict[str, tuple[str, float]]:
        return node_profile.minima(self.file, lambda session: session.run(None, self.feeds), rounds)


class Prefill:
    """The prefill of a whole artifact."""

    def __init__(self, program: Any, folder: Path, prompt: Any) -> None:
        self.run = Ours(lower(program, folder, threads=1), prompt)
        self.file = folder / "components/prefill.onnx"

    def __call__(self) -> None:
        self.run.prefill()

    def profile(self, rounds: int) -> dict[str, tuple[str, float]]:
        return node_profile.prefill(self.run, self.file, rounds)


def _pictures(program: Any, images: int) -> dict[str, np.ndarray]:
    generator = torch.Generator().manual_seed(1)
    feeds, stage = {}, program["vision"]
    for name in stage.inputs:
        val = stage.placeholder(name).meta["val"]
        shape = [s if isinstance(s, int) else images for s in val.shape]
        feeds[name] = torch.randn(shape, generator=generator).to(val.dtype).numpy()
    return feeds


def unused(program: Any, name: str, parameters: dict[str, Any]) -> Any | None:
    """The program with the selection computed and returned, and nothing shorter for it: what a pair measures."""
    kind = discover()[name]
    twin = program.clone()
    if issubclass(kind, VisionReduce):
        stage, count = twin["vision"], 0

        def beside(_reader: Any, _old: Any, new: Any) -> None:
            nonlocal count
            stage.add_output(f"unused.{count}", new)
            count += 1

        with mock.patch.object(vision_select, "reroute", beside):
            make(name, parameters).run(twin)
        return twin
    if issubclass(kind, Select):
        make(name, parameters | {"keep": program.facts.visual_per_image}).run(twin)
        twin.kv = derive_kv(twin)
        return twin
    return None


def measure(name: str, parameters: dict[str, Any], whole: Any, base: dict[str, Any], folder: Path, rounds: int, pairs: int) -> dict[str, Any]:
    kind, method = discover()[name], make(name, parameters)
    program = whole.clone()
    if not method.run(program):
        raise PassError(f"{name}: changed nothing with {parameters}")
    program.kv = derive_kv(program)
    CleanUp().run(program)
    node_profile.mark(program, whole)
    images = getattr(method, "shared", 1)
    where = "prefill" if issubclass(kind, Reduce) else "vision"
    run: Any = Vision(program, folder / "m", images) if where == "vision" else Prefill(program, folder / "m", base["prompt"])
    found = node_profile.added(run.profile(rounds))
    total = images * (base["vision_ms"] + base["prefill_ms"])
    slowest = sorted(found.items(), key=lambda item: -item[1])[:4]
    result = {
        "method": name,
        "parameters": parameters,
        "stage": where,
        "images": images,
        "nodes": len(found),
        "nodes_ms": round(sum(found.values()), 3),
        "overhead_nodes": round(sum(found.values()) / total, 5),
        "slowest": {n: round(ms, 3) for n, ms in slowest},
        "greedy_loops": sum("Loop_" in n for n in found),
    }
    twin = unused(whole, name, parameters) if pairs else None
    if twin is not None:
        CleanUp().run(twin)
        other: Any = Vision(twin, folder / "t", images) if where == "vision" else Prefill(twin, folder / "t", base["prompt"])
        plain = base[where] if images == 1 else Vision(whole, folder / "w", images)
        times = alternate({"plain": plain, "with": other}, pairs)
        result["pairs_ms"] = round(median(b - a for a, b in zip(times["plain"], times["with"], strict=True)), 3)
        result["overhead_pairs"] = round(result["pairs_ms"] / total, 5)
    return result


def compare(shape: Shape, names: list[str], rounds: int, pairs: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    whole, prompt = capture(shape.model()), shape.prompt()
    record: dict[str, Any] = {"shape": dataclasses.asdict(shape), "goal": GOAL, "methods": [], "refused": {}}
    with tempfile.TemporaryDirectory() as top:
        base: dict[str, Any] = {"prompt": prompt, "vision": Vision(whole, Path(top) / "v", 1), "prefill": Prefill(whole, Path(top) / "p", prompt)}
        times = alternate({"vision": base["vision"], "prefill": base["prefill"]}, max(rounds, 5))
        base |= {"vision_ms": min(times["vision"]), "prefill_ms": min(times["prefill"])}
        record |= {"encoder_ms": round(base["vision_ms"], 3), "prefill_ms": round(base["prefill_ms"], 3)}
        print(f"encoder {base['vision_ms']:.1f} ms + prefill {base['prefill_ms']:.1f} ms", flush=True)
        for name in names:
            for parameters in variants(name, discover()[name], shape.layers):
                with tempfile.TemporaryDirectory() as folder:
                    try:
                        found = measure(name, parameters, whole, base, Path(folder), rounds, pairs)
                    except FoveateError as refusal:
                        record["refused"][name] = str(refusal)
                        print(f"{name}: refused: {refusal}", flush=True)
                        continue
                record["methods"].append(found)
                pair = f", pairs {100 * found['overhead_pairs']:.2f} %" if "overhead_pairs" in found else ""
                print(f"{name} {parameters}: {found['nodes']} nodes {found['nodes_ms']:.2f} ms = {100 * found['overhead_nodes']:.2f} %{pair}  "
                      f"{found['slowest']}", flush=True)
    record["met"] = all(charged(m) <= GOAL for m in record["methods"] if m["stage"] == "vision")
    return record


def charged(row: dict[str, Any]) -> float:
    """What counts for the goal: by nodes, but by pairs for a greedy loop, in which the profile charges every node of every round."""
    return row["overhead_pairs"] if row["greedy_loops"] and "overhead_pairs" in row else row["overhead_nodes"]


def table(record: dict[str, Any]) -> str:
    """docs/methods_overhead.md"""
    shape, hardware, rows = record["shape"], record["machine"], record["methods"]
    lines = [
        "# What choosing costs",
        "",
        "Made by `python -m benchmarks.overhead`; do not edit. Time of the nodes that a method adds, as a share of encoder + prefill of the "
        f"unreduced model ({record['encoder_ms']:.1f} + {record['prefill_ms']:.1f} ms).",
        "",
        f"- Model: {shape['layers']} layers of {shape['width']}, {shape['heads']} heads; tower of {shape['vision_layers']} layers of "
        f"{shape['vision_width']}; {shape['side'] ** 2} visual and {shape['text']} text tokens; random weights.",
        f"- ONNX Runtime {hardware['onnxruntime']} on {hardware['cpu']}, one thread, load average {hardware['load_average']} when it ended; "
        f"{record['date']}.",
        "- nodes: sum over the added nodes of their fastest of the rounds, by ONNX Runtime's profile (an upper bound: a profile charges a node "
        "1 to 2 us). pairs: whole runs with and without the selection in turns, nothing saved by it; negative is noise; - where a method works "
        "inside the tower or cuts several times.",
        "- loop: greedy choices, one round of an ONNX Loop per token kept. A profile charges every node of every round, so pairs count there.",
        f"- Goal: no vision-side method above {100 * record['goal']:.0f} %: **{'met' if record['met'] else 'short'}**.",
        "",
        "| method | parameters | stage | nodes | ms | share | by pairs | slowest node |",
        "|---|---|---|---:|---:|---:|---:|---|",
    ]
    for row in sorted(rows, key=lambda r: (r["stage"], r["method"], str(r["parameters"]))):
        parameters = ", ".join(f"{k}={json.dumps(v)}" for k, v in row["parameters"].items()) or "defaults"
        pairs = f"{100 * row['overhead_pairs']:.2f} %" if "overhead_pairs" in row else "-"
        loop = " + loop" if row["greedy_loops"] else ""
        worst = next((f"{n.split('_')[0]} {ms:.2f} ms" for n, ms in row["slowest"].items()), "-")
        images = f", {row['images']} pictures" if row["images"] > 1 else ""
        lines.append(f"| {row['method']} | {parameters}{images} | {row['stage']} | {row['nodes']}{loop} | {row['nodes_ms']:.2f} | "
                     f"{100 * row['overhead_nodes']:.2f} % | {pairs} | {worst} |")
    for name, reason in record["refused"].items():
        lines.append(f"| {name} | | | | | refused | | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    import datetime

    reducing = [n for n in discover() if n.split("-")[0] in REDUCING]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=[*SHAPES], default="llava-like")
    parser.add_argument("--methods", nargs="*", choices=reducing, default=reducing)
    parser.add_argument("--rounds", type=int, default=5, help="of profiling")
    parser.add_argument("--pairs", type=int, default=5, help="paired runs; 0 leaves them out")
    options = parser.parse_args()
    record = compare(SHAPES[options.shape], options.methods, options.rounds, options.pairs)
    record = {"date": datetime.date.today().isoformat(), "machine": machine(1), **record}
    if options.methods == reducing:
        print(save("overhead", record).name)
        (RESULTS.parents[1] / "docs" / "methods_overhead.md").write_text(table(record))
    print("goal met" if record["met"] else "short of the goal")


if __name__ == "__main__":
    main()
