"""The measured part of docs/policies.md, from benchmarks/results/policies.json and the methods table's record. No figure is written by hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from benchmarks.measure import RESULTS
from benchmarks.testbed_report import Gap, percent
from benchmarks.testbed_table import NONE, RECORD, ROOT, RecordError, item_scores, items_of, read

START, END = "<!-- measured: start -->", "<!-- measured: end -->"
DOC = ROOT / "docs" / "policies.md"


@dataclass(frozen=True)
class Fixed:
    """One line of the methods table."""

    recipe: str
    cost: float  # FLOPs: encoder, prefill, decode steps of the unreduced model's answers
    scores: np.ndarray  # [items]

    @cached_property
    def accuracy(self) -> float:
        return float(self.scores.mean())

    @property
    def name(self) -> str:
        return f"`{self.recipe.removesuffix(', clean-up')}`"


def fixed_recipes(record: Mapping[str, Any], turns: Sequence[int]) -> list[Fixed]:
    """Every configuration that was measured, controls and renumbered ones too, and artifacts of the policies that are not among them."""
    done = read(RECORD)
    if done[NONE].items != record["items"]:
        raise RecordError("policies: measured on other items than the methods table; run both again")
    lines = [(x.recipe, x.flops, x.right) for x in done.values() if x.right]
    lines += [(recipe, x["flops"], x["right"]) for recipe, x in record["own_recipes"].items()]
    return [Fixed(recipe, f["vision"] + f["prefill"] + record["steps"] * f["decode"], item_scores(right, turns)) for recipe, f, right in lines]


def best_at(fixed: Sequence[Fixed], cost: float) -> tuple[Fixed | None, int]:
    """The most accurate recipe of at most that cost, chosen with the test answers in view; and how many there are."""
    within = [f for f in fixed if f.cost <= cost]
    return max(within, key=lambda f: (f.accuracy, -f.cost), default=None), len(within)


def mixture(fixed: Sequence[Fixed], cost: float) -> tuple[np.ndarray, str]:
    """Two recipes drawn at random in the proportion that costs as much, the best such pair: expected scores [items], and what it is."""
    best: tuple[float, Any] = (-1.0, None)
    for a in fixed:
        for b in fixed:
            if a.cost <= cost < b.cost:
                share = (cost - a.cost) / (b.cost - a.cost)
                value = (1 - share) * a.accuracy + share * b.accuracy
                if value > best[0]:
                    best = value, (a, b, share)
    a, b, share = best[1]
    return (1 - share) * a.scores + share * b.scores, f"{percent(1 - share, 0)} {a.name}, {percent(share, 0)} {b.name}"


def rows(record: Mapping[str, Any], fixed: Sequence[Fixed], turns: Sequence[int]) -> list[dict[str, Any]]:
    """One per policy and cost."""
    none = next(f for f in fixed if f.recipe == NONE)
    out = []
    for name, found in record["policies"].items():
        for point in found["points"]:
            test = point["test"]
            scores, cost = item_scores(test["right"], turns), test["flops"]
            best, within = best_at(fixed, cost)
            mixed, pair = mixture(fixed, cost)
            gaps = [Gap.of(scores, f.scores) for f in fixed if f.cost <= cost]
            out.append({
                "policy": found["policy"], "name": name, "asked": point["asked"], "share": test["share"], "checked": test.get("checked", False),
                "agreement": point["val"]["agreement"],
                "accuracy": float(scores.mean()), "cost": cost / none.cost, "none": Gap.of(scores, none.scores), "within": within, "best": best,
                "gap": Gap.of(scores, best.scores) if best else None, "mixed": Gap.of(scores, mixed), "pair": pair,
                "beaten": sum(g.mean > 0 for g in gaps), "shown": sum(g.low > 0 for g in gaps),
            })
    return out


def table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| policy, artifacts | answered by | cost | right | best fixed recipe of at most that cost | against it | against a mixture of equal cost | "
             "fixed recipes beaten, with certainty | against unreduced |",
             "|---|---|--:|--:|---|--:|--:|--:|--:|"]
    for r in found:
        shares, best = " / ".join(percent(s, 0) for s in r["share"]), r["best"]
        lines.append(f"| {r['name']} | {shares} | {percent(r['cost'])} | {percent(r['accuracy'])} | {best.name} {percent(best.accuracy)} | {r['gap']} | "
                     f"{r['mixed']} | {r['beaten']} of {r['within']}, {r['shown']} | {r['none']} |")
    return lines


def chosen(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of every kind of policy, per cost, the one with most agreement on val: what one would deploy without having seen a test answer."""
    keys = dict.fromkeys((r["policy"], r["asked"]) for r in found)
    return [max((r for r in found if (r["policy"], r["asked"]) == key), key=lambda r: r["agreement"]) for key in sorted(keys)]


def verdicts(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per kind of policy, in words."""
    out = []
    for policy in dict.fromkeys(r["policy"] for r in found):
        mine = [r for r in chosen(found) if r["policy"] == policy]
        ahead, sure = [r for r in mine if r["gap"].mean > 0], [r for r in mine if r["gap"].low > 0]
        mixed = [r for r in mine if r["mixed"].low > 0]
        every = ", ".join(f"{r['gap']} at {percent(r['cost'], 0)}" for r in mine)
        text = (f"**{policy}** (artifacts chosen on val, per cost): more right than every fixed recipe of at most its mean cost at {len(ahead)} of {len(mine)} "
                f"costs, with 95% certainty against the best of them at {len(sure)}; with certainty against the best random mixture of two recipes at "
                f"{len(mixed)}. Points against the best: {every}.")
        out.append(text)
    return out


def variants(record: Mapping[str, Any]) -> list[str]:
    costs = sorted({p["asked"] for v in record["variants"].values() for p in v["points"]})
    lines = ["| variant | " + " | ".join(percent(c, 0) for c in costs) + " |", "|---|" + "--:|" * len(costs)]
    for name, found in {**record["policies"], **record["variants"]}.items():
        at = {p["asked"]: percent(p["val"]["agreement"]) for p in found["points"]}
        lines.append(f"| {name} | " + " | ".join(at.get(c, "") for c in costs) + " |")
    return lines


def latency(record: Mapping[str, Any]) -> list[str]:
    timed = record.get("latency")
    if not timed:
        return []
    lines = ["", f"Milliseconds per request on {timed['machine']['cpu']}, 1 thread, ONNX Runtime, processor and decode included, one after the other: the "
             f"first {timed['items']} test items, median of {timed['rounds']} rounds in turns.", "", "| | ms | against unreduced |", "|---|--:|--:|"]
    base = timed["ms"]["none"]["median"]
    lines += [f"| {name} | {v['median']:.2f} | {v['median'] / base:.2f} |" for name, v in timed["ms"].items()]
    return lines


def report() -> None:
    """Write the section between the marks of docs/policies.md."""
    record = json.loads((RESULTS / "policies.json").read_text())
    turns = [len(i.turns) for i in items_of(record["n"])]
    found = rows(record, fixed_recipes(record, turns), turns)
    lines = [
        f"{record['n']} held-out items of the testbed, those of [methods.md](methods.md); thresholds from {record['calibrated_on']}, at mean costs of "
        f"{', '.join(percent(p, 0) for p in sorted({r['asked'] for r in found}))} of the unreduced model's FLOPs. Differences in points with paired 95% "
        "intervals. The best fixed recipe is chosen with the answers in view, which favours it.",
        "", *[f"- {v}" for v in verdicts(found)], "", *table(found), "",
        "All of them, chosen on val or not, are in the table. The policies themselves were asked everything at "
        f"{sum(r['checked'] for r in found)} of these points: the same answers, the same cost.", "",
        "On `val`, variants too, by agreement with the unreduced model (what calibration sees; crops on "
        f"{min(v['val_items'] for v in record['variants'].values())} items), at mean costs of:", "", *variants(record), *latency(record),
    ]
    text = DOC.read_text()
    made = re.sub(f"{START}.*{END}", lambda _: START + "\n" + "\n".join(lines) + "\n" + END, text, flags=re.DOTALL)
    DOC.write_text(made)
    print("\n".join(lines))
