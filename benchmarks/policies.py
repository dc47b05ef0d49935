"""Runtime policies on the testbed, against every fixed recipe of the methods table.

    python -m benchmarks.policies run [--work DIR]       # artifacts, what each says, calibration on val, the table's 612 test items, variants
    python -m benchmarks.policies check [--work DIR]     # the policies themselves on test: the same answers and costs as `run` says?
    python -m benchmarks.policies latency [--work DIR]   # milliseconds per request, in turns; wants a quiet machine
    python -m benchmarks.policies report                 # the tables in docs/policies.md from benchmarks/results/policies.json

Thresholds are found on the 612 `val` items without their answers, for several mean costs; what is chosen by hand (buckets, signal, measure) was
chosen on val too. Every artifact answers every question once, and a policy's answer to a first question is the one of the artifact that its
thresholds choose; second questions, whose prompts hold the policy's own answers, are asked of the policy. `check` asks it everything.
Cost: FLOPs of the cost model over all runs of a question (encoder, prefill, decode steps), 16 text tokens and one picture per request as in the
methods table; fixed recipes pay the decode steps of the unreduced model's answers.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from benchmarks.measure import RESULTS, alternate, machine, save
from benchmarks.testbed_table import NONE, RECORD, ROOM, TEXT, digest, item_scores, pack, read, revision
from examples.testbed import make_data
from examples.testbed.dataset import Item, score
from examples.testbed.evaluate import CHECKPOINT, messages
from foveate.api import optimize_model
from foveate.export.artifact import MANIFEST
from foveate.runtime.policies import CoarseToFine, DensityBudget, Policy, Run
from foveate.runtime.policies.calibrate import Trace, fit, follow
from foveate.runtime.policies.coarse_to_fine import MEASURES, Watch
from foveate.runtime.policies.density import FROM_FEATURES, FROM_PICTURE, of_features, of_picture
from foveate.runtime.result import Timings
from foveate.runtime.sampling import greedy
from foveate.runtime.session import Session, Stop, load

RECIPES = {
    "tome33": "merge-tome{r=33}, clean-up",
    "tome27": "merge-tome{r=27}, clean-up",
    "uniform50": "prune-uniform{keep=0.5,by=grid}, clean-up",
    "none": NONE,
    "divprune25-late": "prune-divprune{keep=0.25}, drop-fastv{layer=6,keep=0.25}, clean-up",
    "uniform25-llm": "drop-uniform{layer=0,keep=0.25,staggered=True}, clean-up",
}
COSTS = (0.34, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7)  # mean FLOPs that are asked for, shares of the unreduced model's
VAL, TEST, BATCH = 612, 612, 18
CROPPED = 204  # val items that variants with a crop are asked


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
    Plan(CoarseToFine, ("uniform25-llm", "none"), {"measure": "margin", "over": "answer"}),
    Plan(CoarseToFine, ("divprune25-late", "none"), {"measure": "margin", "over": "answer", "mode": "finer"}),
    Plan(CoarseToFine, ("divprune25-late", "none"), {"measure": "margin", "over": "answer", "mode": "crop-beside"}),
    Plan(CoarseToFine, ("divprune25-late", "none"), {"measure": "margin", "over": "answer", "mode": "crop-alone"}),
    Plan(DensityBudget, ("tome27", "uniform50"), {"signal": "edges"}),
    Plan(DensityBudget, ("tome27", "uniform50"), {"signal": "dissimilarity"}),
    Plan(DensityBudget, ("uniform25-llm", "none"), {"signal": "detail"}),
    Plan(DensityBudget, ("uniform25-llm", "none"), {"signal": "dissimilarity"}),
    Plan(DensityBudget, ("uniform25-llm", "none"), {"signal": "rank"}),
    Plan(DensityBudget, ("uniform25-llm", "none"), {"signal": "mass"}),
)


def artifact(work: Path, name: str) -> Session:
    """The artifact of a recipe, built once."""
    path = work / name
    if not (path / MANIFEST).is_file():
        recipe = RECIPES[name]
        optimize_model(str(CHECKPOINT), None if recipe == NONE else recipe, output=path, text_tokens=TEXT, golden=False, threads=1)
    return load(path, verify=False)


# -- what every artifact says


@dataclass(frozen=True)
class Said:
    """One artifact's answers to n first questions."""

    tokens: list[list[int]]
    texts: list[str]
    sure: dict[str, np.ndarray]  # "measure/over" -> [n]
    dense: dict[str, np.ndarray]  # signal -> [n]; of features: what this artifact's vision stage makes


def collect(work: Path, name: str, split: str, count: int) -> Said:
    """Asked once, then read from a file beside the artifacts."""
    path = work / f"{name}-{split}-{count}.json"
    if not path.is_file():
        session, items, rows = artifact(work, name), list(make_data.items(split, count)), []
        for at in range(0, count, BATCH):
            rows += _asked(session, items[at : at + BATCH])
        path.write_text(json.dumps(rows))
        print(f"{name}: asked the {count} first questions of {split}", flush=True)
    rows = json.loads(path.read_text())
    columns = {k: [r[k] for r in rows] for k in rows[0]}
    arrays = [{n: np.array([v[n] for v in columns[k]]) for n in columns[k][0]} for k in ("sure", "dense")]
    return Said(columns["tokens"], columns["texts"], *arrays)


def _asked(session: Session, items: Sequence[Item]) -> list[dict[str, Any]]:
    samples = session.prepare([i.images for i in items], messages=[messages(i, []) for i in items])
    seen, watches = session.encode(samples), {m: Watch(m) for m in MEASURES}
    read = session.read(samples, seen, ROOM)
    choose = greedy
    for watch in watches.values():
        choose = watch(choose)
    made = session.answer(read, choose, Stop(ROOM), Timings())
    lengths = [len(t) for t in made.tokens]
    whole = {f"{m}/answer": w.least(lengths) for m, w in watches.items()} | {f"{m}/first": w.steps[0] for m, w in watches.items()}
    out = []
    for b, sample in enumerate(samples):
        parts = np.split(seen.features["image_features"][b], len(sample.pictures))
        dense = {s: max(of_picture(p, s) for p in sample.pictures) for s in FROM_PICTURE} | {s: max(of_features(p, s) for p in parts) for s in FROM_FEATURES}
        out.append({"tokens": made.tokens[b].tolist(), "texts": made.texts[b], "sure": {k: float(v[b]) for k, v in whole.items()}, "dense": dense})
    return out


def trace_of(policy: Policy, said: Sequence[Said], right: Sequence[list[int]]) -> Trace:
    """What `policies.calibrate.follow` finds by asking the policy, from what its artifacts say."""
    n, count = len(said[0].tokens), len(said)
    steps = np.array([[len(t) - 1 for t in s.tokens] for s in said])
    if isinstance(policy, DensityBudget):
        signal = np.tile(said[0].dense[policy.signal], (count - 1, 1))
        flops = [[policy.flops(policy.runs_of(k, int(steps[k, i]))) for i in range(n)] for k in range(count)]
    else:
        signal = np.stack([s.sure[f"{policy.measure}/{policy.over}"] for s in said[:-1]])
        fresh = [not any(policy.shares(j, k) for j in range(k)) for k in range(count)]
        flops = [[policy.flops([Run(j, fresh[j], steps=int(steps[j, i]) if j == k or policy.over == "answer" else 0) for j in range(k + 1)])
                  for i in range(n)] for k in range(count)]
    agree = np.array([[a == b for a, b in zip(s.tokens, right, strict=True)] for s in said])
    last = policy.prices[-1]
    return Trace(signal, agree, np.array(flops), float(last.total + last.decode * steps[-1].mean()))


# -- answering


def second_turns(policy: Policy, items: Sequence[Item], first: Sequence[str]) -> tuple[list[str], list[float], list[int]]:
    """The policy's answers to the second questions of items with two, the costs, and the buckets"""
    made = policy.generate([i.images for i in items], messages=[messages(i, [a]) for i, a in zip(items, first, strict=True)], max_new_tokens=ROOM,
                           do_sample=False)
    return list(made.texts), list(made.flops), list(made.buckets)


def on_test(policy: Policy, said: Sequence[Said], none: Said, items: Sequence[Item]) -> dict[str, Any]:
    """A bit per question, mean cost over items, and which bucket answered what share of the questions."""
    trace, every = trace_of(policy, said, none.tokens), range(len(items))
    bucket = policy.bucket_of(trace.signal, policy.thresholds)  # type: ignore[arg-type]
    texts, flops, used = [[said[bucket[i]].texts[i]] for i in every], [[trace.flops[bucket[i], i]] for i in every], [[int(bucket[i])] for i in every]
    two = [i for i in every if len(items[i].turns) == 2]
    for i, *more in zip(two, *second_turns(policy, [items[i] for i in two], [texts[i][0] for i in two]), strict=True):
        for table, value in zip((texts, flops, used), more, strict=True):
            table[i].append(value)
    right = [score(a, t.answer, i.metric) == 1 for i, said_ in zip(items, texts, strict=True) for a, t in zip(said_, i.turns, strict=True)]
    return {"right": pack(right), "flops": float(np.mean([np.mean(f) for f in flops])), "share": _shares([b for u in used for b in u], policy)}


def answered(policy: Policy, items: Sequence[Item]) -> dict[str, Any]:
    """As `on_test`, by asking the policy everything."""
    said: dict[str, list[str]] = {i.id: [] for i in items}
    flops, used = {i.id: [] for i in items}, {i.id: [] for i in items}
    for turn in range(max(len(i.turns) for i in items)):
        asked = [i for i in items if len(i.turns) > turn]
        for at in range(0, len(asked), BATCH):
            part = asked[at : at + BATCH]
            made = policy.generate([i.images for i in part], messages=[messages(i, said[i.id]) for i in part], max_new_tokens=ROOM, do_sample=False)
            for k, item in enumerate(part):
                said[item.id].append(made.texts[k])
                flops[item.id].append(made.flops[k])
                used[item.id].append(made.buckets[k])
    right = [score(a, t.answer, i.metric) == 1 for i in items for a, t in zip(said[i.id], i.turns, strict=True)]
    share = _shares([b for i in items for b in used[i.id]], policy)
    return {"right": pack(right), "flops": float(np.mean([np.mean(f) for f in flops.values()])), "share": share}


# -- run


def run(work: Path) -> None:
    test = list(make_data.items("test", TEST))
    none = {s: collect(work, "none", s, c) for s, c in (("val", VAL), ("test", TEST))}
    unreduced = read(RECORD)[NONE]
    full = unreduced.flops["vision"] + unreduced.flops["prefill"]
    steps = float(np.mean([len(t) - 1 for t in none["test"].tokens]))
    record: dict[str, Any] = {
        "items": digest(TEST), "n": TEST, "calibrated_on": f"{VAL} val items, first questions, no answers", "commit": revision(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "machine": machine(1), "full_flops": full, "steps": steps, "policies": {}, "variants": {},
    }
    record["own_recipes"] = own_recipes(work, none["test"], test)
    for plan in PLANS:
        policy, crop = plan.open(work), plan.options.get("mode", "finer") != "finer"
        if crop:
            data = [(i.images, messages(i, [])) for i in make_data.items("val", CROPPED)]
            trace = follow(policy, data, None, BATCH, ROOM, lambda line: None)
        else:
            trace = trace_of(policy, [collect(work, b, "val", VAL) for b in plan.buckets], none["val"].tokens)
        rows = []
        for cost in COSTS:
            if cost * full < trace.flops.min(0).mean():
                continue
            thresholds = fit(policy, trace, None, cost * full / trace.full)
            equal, flops, bucket = trace.at(policy, thresholds)
            row: dict[str, Any] = {"asked": cost, "thresholds": thresholds, "val": {"agreement": equal, "flops": flops, "share": _shares(bucket, policy)}}
            if plan.main:
                row["test"] = on_test(plan.open(work, thresholds), [collect(work, b, "test", TEST) for b in plan.buckets], none["test"], test)
            rows.append(row)
        alone = [round(float(a), 4) for a in trace.agree.mean(1)]
        about = {"policy": plan.kind.name, "buckets": [RECIPES[b] for b in plan.buckets], **plan.options}
        found = {**about, "val_items": trace.agree.shape[1], "alone": alone, "points": rows}
        record["policies" if plan.main else "variants"][plan.name] = found
        print(f"{plan.name}: " + "  ".join(f"{r['asked']}: {100 * r['val']['agreement']:.1f}%" + _test(r, test) for r in rows), flush=True)
    save("policies", record)


def own_recipes(work: Path, none: Said, test: Sequence[Item]) -> dict[str, Any]:
    """Artifacts of policies that the methods table does not have, as fixed recipes: what a policy that always chooses them comes to."""
    found, known = {}, read(RECORD)
    for plan in (p for p in PLANS if p.main):
        for k, bucket in enumerate(plan.buckets):
            if RECIPES[bucket] not in known and RECIPES[bucket] not in found:
                policy = plan.open(work)
                forced = plan.open(work, policy.always(k))
                price = policy.prices[k]
                flops = {"vision": price.vision, "prefill": price.prefill, "decode": price.decode}
                right = on_test(forced, [collect(work, b, "test", TEST) for b in plan.buckets], none, test)["right"]
                found[RECIPES[bucket]] = {"right": right, "flops": flops}
    return found


def check(work: Path, asked: float, only: str) -> None:
    """Ask the policies themselves, at one cost; refused where they differ from what `run` put together."""
    path = RESULTS / "policies.json"
    record, test = json.loads(path.read_text()), list(make_data.items("test", TEST))
    for plan in (p for p in PLANS if p.main and only in p.name):
        row = next((r for r in record["policies"][plan.name]["points"] if r["asked"] == asked), None)
        if row is None:
            continue
        found = answered(plan.open(work, row["thresholds"]), test)
        if found["right"] != row["test"]["right"] or abs(found["flops"] / row["test"]["flops"] - 1) > 1e-9:
            raise SystemExit(f"{plan.name}: asked itself it has {found}, put together {row['test']}")
        row["test"]["checked"] = True
        print(f"{plan.name} at {asked}: {TEST} items, the same answers and the same cost", flush=True)
    save("policies", record)


def _shares(bucket: Any, policy: Policy) -> list[float]:
    return [round(float((np.asarray(bucket) == k).mean()), 4) for k in range(len(policy.buckets))]


def _test(row: dict[str, Any], items: Sequence[Item]) -> str:
    if "test" not in row:
        return ""
    return f" (test {100 * item_scores(row['test']['right'], [len(i.turns) for i in items]).mean():.2f}% at {row['test']['flops'] / 1e6:.0f} MFLOPs)"


# -- latency


def latency(work: Path, rounds: int, items: int, cost: float) -> None:
    """Wall-clock milliseconds of one request after the other: mean over items, median over rounds; every candidate in turns."""
    record = json.loads((RESULTS / "policies.json").read_text())
    todo = list(make_data.items("test", items))
    candidates: dict[str, Any] = {n: artifact(work, n) for n in ("tome27", "uniform50", "none")}
    for name, found in record["policies"].items():
        plan = next(p for p in PLANS if p.name == name)
        for row in found["points"]:
            if row["asked"] == cost:
                candidates[f"{name} at {row['asked']}"] = plan.open(work, row["thresholds"])

    def go(session: Any) -> None:
        for item in todo:
            session.generate(item.images, messages=messages(item, []), max_new_tokens=ROOM, do_sample=False)

    times = alternate({n: (lambda s=s: go(s)) for n, s in candidates.items()}, rounds, warm_up=1)
    record["latency"] = {"items": items, "rounds": rounds, "commit": revision(), "machine": machine(1),
                         "ms": {n: {"median": round(float(np.median(t)) / items, 3), "min": round(min(t) / items, 3)} for n, t in times.items()}}
    save("policies", record)
    print(json.dumps(record["latency"]["ms"], indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["run", "check", "latency", "report"])
    parser.add_argument("--work", type=Path, default=Path("build/policies"), help="folder of the artifacts")
    parser.add_argument("--cost", type=float, default=0.5, help="at which the policies are checked and timed")
    parser.add_argument("--only", default="", help="check only policies with this text in their name")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int, default=57, help="test items that are timed")
    options = parser.parse_args()
    if options.what == "run":
        run(options.work)
    elif options.what == "check":
        check(options.work, options.cost, options.only)
    elif options.what == "latency":
        latency(options.work, options.rounds, options.items, options.cost)
    else:
        from benchmarks.policies_report import report

        report()


if __name__ == "__main__":
    main()
