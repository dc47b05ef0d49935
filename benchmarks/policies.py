"""Runtime policies on the testbed, against every fixed recipe of the methods table.

    python -m benchmarks.policies run [--work DIR] [--only TEXT]   # artifacts, calibration on val, the table's 612 test items, variants on val
    python -m benchmarks.policies latency [--work DIR]             # milliseconds per request, in turns; wants a quiet machine
    python -m benchmarks.policies report                           # the tables in docs/policies.md from benchmarks/results/policies.json

Thresholds are found on the 612 `val` items without their answers, for several mean costs; what is chosen by hand (buckets, signal, measure) was
chosen on val too. Cost: FLOPs of the cost model over all runs of a question (encoder, prefill, decode steps), 16 text tokens and one picture
per request as in the methods table; fixed recipes pay the decode steps of the unreduced model's answers.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.measure import RESULTS, alternate, machine
from benchmarks.testbed_table import NONE, RECORD, ROOM, TEXT, Line, digest, item_scores, pack, read, revision
from examples.testbed import make_data
from examples.testbed.dataset import Item, score
from examples.testbed.evaluate import CHECKPOINT, messages
from foveate.api import optimize_model
from foveate.export.artifact import MANIFEST
from foveate.runtime.policies import CoarseToFine, DensityBudget, Policy
from foveate.runtime.policies.calibrate import fit, follow
from foveate.runtime.session import Session, load

RECIPES = {
    "tome33": "merge-tome{r=33}, clean-up",
    "tome27": "merge-tome{r=27}, clean-up",
    "uniform50": "prune-uniform{keep=0.5,by=grid}, clean-up",
    "none": NONE,
    "divprune25": "prune-divprune{keep=0.25}, clean-up",
    "divprune25-late": "prune-divprune{keep=0.25}, drop-fastv{layer=6,keep=0.25}, clean-up",
    "uniform25-llm": "drop-uniform{layer=0,keep=0.25,staggered=True}, clean-up",
    "uniform50-llm": "drop-uniform{layer=0,keep=0.5,staggered=True}, clean-up",
}
COSTS = (0.34, 0.4, 0.45, 0.5, 0.55, 0.6)  # mean FLOPs that are asked for, shares of the unreduced model's
VAL, TEST, BATCH = 612, 612, 18


@dataclass(frozen=True)
class Plan:
    """A policy to be calibrated. `main`: measured on test, at several costs; the others are variants that are compared on val."""

    kind: type[Policy]
    buckets: tuple[str, ...]
    options: dict[str, str]
    main: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind.name} {' > '.join(self.buckets)} ({', '.join(self.options.values())})"

    def open(self, work: Path, thresholds: Sequence[float] | None = None) -> Policy:
        return self.kind([artifact(work, b) for b in self.buckets], thresholds, **self.options)


PLANS = (
    Plan(CoarseToFine, ("tome27", "uniform50"), {"measure": "margin", "over": "answer"}, main=True),
    Plan(CoarseToFine, ("tome33", "tome27", "uniform50"), {"measure": "margin", "over": "answer"}, main=True),
    Plan(CoarseToFine, ("tome27", "none"), {"measure": "margin", "over": "answer"}, main=True),
    Plan(DensityBudget, ("tome27", "uniform50"), {"signal": "detail"}, main=True),
    Plan(DensityBudget, ("tome33", "tome27", "uniform50"), {"signal": "detail"}, main=True),
    Plan(CoarseToFine, ("tome27", "uniform50"), {"measure": "entropy", "over": "answer"}),
    Plan(CoarseToFine, ("tome27", "uniform50"), {"measure": "margin", "over": "first"}),
    Plan(CoarseToFine, ("tome27", "uniform50"), {"measure": "entropy", "over": "first"}),
    Plan(CoarseToFine, ("divprune25", "none"), {"measure": "margin", "over": "answer"}),
    Plan(CoarseToFine, ("uniform25-llm", "none"), {"measure": "margin", "over": "answer"}),
    Plan(CoarseToFine, ("divprune25-late", "none"), {"measure": "margin", "over": "answer", "mode": "finer"}),
    Plan(CoarseToFine, ("divprune25-late", "none"), {"measure": "margin", "over": "answer", "mode": "crop-beside"}),
    Plan(CoarseToFine, ("divprune25-late", "none"), {"measure": "margin", "over": "answer", "mode": "crop-alone"}),
    Plan(DensityBudget, ("tome27", "uniform50"), {"signal": "edges"}),
    Plan(DensityBudget, ("tome27", "uniform50"), {"signal": "dissimilarity"}),
    Plan(DensityBudget, ("uniform25-llm", "uniform50-llm", "none"), {"signal": "detail"}),
    Plan(DensityBudget, ("uniform25-llm", "uniform50-llm", "none"), {"signal": "dissimilarity"}),
    Plan(DensityBudget, ("uniform25-llm", "uniform50-llm", "none"), {"signal": "rank"}),
    Plan(DensityBudget, ("uniform25-llm", "uniform50-llm", "none"), {"signal": "mass"}),
)


def artifact(work: Path, name: str) -> Session:
    """The artifact of a recipe, built once."""
    path = work / name
    if not (path / MANIFEST).is_file():
        recipe = RECIPES[name]
        optimize_model(str(CHECKPOINT), None if recipe == NONE else recipe, output=path, text_tokens=TEXT, golden=False, threads=1)
    return load(path, verify=False)


# -- answering


@dataclass(frozen=True)
class Outcome:
    """What one policy or session made of items."""

    right: list[bool]  # per question, items in order
    flops: np.ndarray  # [items], mean over questions
    buckets: list[int]  # per question
    answers: dict[str, list[str]]


def answered(session: Any, items: Sequence[Item]) -> Outcome:
    """Every turn of every item, batch by batch; later turns carry the answers given before."""
    said: dict[str, list[str]] = {i.id: [] for i in items}
    flops: dict[str, list[float]] = {i.id: [] for i in items}
    bucket: dict[str, list[int]] = {i.id: [] for i in items}
    for turn in range(max(len(i.turns) for i in items)):
        asked = [i for i in items if len(i.turns) > turn]
        for at in range(0, len(asked), BATCH):
            part = asked[at : at + BATCH]
            made = session.generate([i.images for i in part], messages=[messages(i, said[i.id]) for i in part], max_new_tokens=ROOM, do_sample=False)
            for k, item in enumerate(part):
                said[item.id].append(made.texts[k])
                flops[item.id].append(made.flops[k])
                bucket[item.id].append(made.buckets[k])
    right = [score(a, t.answer, i.metric) == 1 for i in items for a, t in zip(said[i.id], i.turns, strict=True)]
    return Outcome(right, np.array([np.mean(flops[i.id]) for i in items]), [b for i in items for b in bucket[i.id]], said)


def unlabelled(items: Sequence[Item]) -> list[tuple[Any, Any]]:
    """Pictures and first questions; answers are left behind here."""
    return [(i.images, messages(i, [])) for i in items]


# -- run


def run(work: Path, only: str) -> None:
    val, test, path = list(make_data.items("val", VAL)), list(make_data.items("test", TEST)), RESULTS / "policies.json"
    record = json.loads(path.read_text()) if path.is_file() else {"policies": {}, "variants": {}}
    record |= {"items": digest(TEST), "n": TEST, "calibrated_on": f"{VAL} val items, first questions, no answers", "commit": revision(),
               "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "machine": machine(1)}
    for plan in PLANS:
        if only not in plan.name:
            continue
        start, policy = time.perf_counter(), plan.open(work)
        trace = follow(policy, unlabelled(val), artifact(work, "none"), BATCH, ROOM, lambda line: None)
        unreduced = read(RECORD)[NONE]
        full = unreduced.flops["vision"] + unreduced.flops["prefill"]
        rows = []
        for cost in COSTS:
            if cost * full < trace.flops.min(0).mean():
                continue
            thresholds = fit(policy, trace, None, cost * full / trace.full)
            equal, flops, bucket = trace.at(policy, thresholds)
            row = {"asked": cost, "thresholds": [float(t) for t in thresholds], "val": {"agreement": equal, "flops": flops, "share": _shares(bucket, policy)}}
            if plan.main:
                found = answered(plan.open(work, thresholds), test)
                row["test"] = {"right": pack(found.right), "flops": float(found.flops.mean()), "share": _shares(found.buckets, policy)}
            rows.append(row)
        kind = "policies" if plan.main else "variants"
        record[kind][plan.name] = {"policy": plan.kind.name, "buckets": [RECIPES[b] for b in plan.buckets], **plan.options, "alone": [round(float(a), 4) for a in trace.agree.mean(1)], "points": rows}
        path.write_text(json.dumps(record, indent=1) + "\n")
        said = "  ".join(f"{r['asked']}: {100 * r['val']['agreement']:.1f}%" + _test(r, test) for r in rows)
        print(f"{plan.name}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)


def _shares(bucket: Any, policy: Policy) -> list[float]:
    return [round(float((np.asarray(bucket) == k).mean()), 4) for k in range(len(policy.buckets))]


def _test(row: dict[str, Any], items: Sequence[Item]) -> str:
    if "test" not in row:
        return ""
    return f" (test {100 * item_scores(row['test']['right'], [len(i.turns) for i in items]).mean():.2f}% at {row['test']['flops'] / 1e6:.0f} MFLOPs)"


# -- latency


def latency(work: Path, rounds: int, items: int) -> None:
    """Wall-clock milliseconds of one request after the other: mean over items, median over rounds; every candidate in turns."""
    path = RESULTS / "policies.json"
    record = json.loads(path.read_text())
    todo = list(make_data.items("test", items))
    candidates: dict[str, Any] = {n: artifact(work, n) for n in ("tome27", "divprune25", "uniform50", "none")}
    for name, found in record["policies"].items():
        plan = next(p for p in PLANS if p.name == name)
        for row in found["points"]:
            if row["asked"] in (0.45, 0.5):
                candidates[f"{name} at {row['asked']}"] = plan.open(work, row["thresholds"])

    def go(session: Any) -> None:
        for item in todo:
            session.generate(item.images, messages=messages(item, []), max_new_tokens=ROOM, do_sample=False)

    times = alternate({n: (lambda s=s: go(s)) for n, s in candidates.items()}, rounds, warm_up=1)
    record["latency"] = {"items": items, "rounds": rounds, "commit": revision(), "machine": machine(1),
                         "ms": {n: {"median": round(float(np.median(t)) / items, 3), "min": round(min(t) / items, 3)} for n, t in times.items()}}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["latency"]["ms"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "latency", "report"])
    parser.add_argument("--work", type=Path, default=Path("build/policies"), help="folder of the artifacts")
    parser.add_argument("--only", default="", help="only policies with this text in their name")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=57, help="test items that are timed")
    options = parser.parse_args()
    if options.what == "run":
        run(options.work, options.only)
    elif options.what == "latency":
        latency(options.work, options.rounds, options.items)
    else:
        from benchmarks.policies_report import report

        report()


if __name__ == "__main__":
    main()
