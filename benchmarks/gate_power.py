"""How often the gate errs, by simulation.

Coverage of its intervals, PASS and FAIL rates at its recommended number of items, one look and five.

python benchmarks/gate_power.py [--replicates 20000] [--output benchmarks/results/gate_power.json]
"""

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy

from foveate.runtime.gate import Rule, recommended
from foveate.runtime.stats import Differences, tails

BINARY = np.array([-1.0, 0.0, 1.0])
SIZES = (50, 100, 200, 500, 1000, 2000, 5000)
ACCURACIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SHARES = (0.1, 0.3, 1.0)  # of the disagreement that two independent models of this accuracy would have
DROPS = (0.0, 0.01, 0.02, 0.05)
SLICES = 8
RARE = 10  # expected changes below which an exact level cannot exist: the count of changes is one of a few numbers
# changes of answers scored in thirds (VQA accuracy) and in tenths (ANLS-like); the last entry per value is the share of all changes
GRADED = {
    "thirds": (np.arange(-3, 4) / 3, np.array([3, 2, 2, 0, 2, 2, 3.0])),
    "tenths": (np.arange(-10, 11) / 10, np.r_[np.arange(10, 0, -1), 0, np.arange(1, 11)].astype(float)),
}


def trinomial(change: float, drop: float) -> np.ndarray:
    """P(loss), P(same), P(gain) with this share of changed answers (at least the drop itself)."""
    change = max(change, drop)
    return np.array([(change + drop) / 2, 1 - change, (change - drop) / 2])


def draw(rng: np.random.Generator, n: int, p: np.ndarray, replicates: int) -> np.ndarray:
    return rng.multinomial(n, p / p.sum(), size=replicates).astype(float)


def misses(rng: np.random.Generator, values: np.ndarray, p: np.ndarray, n: int, replicates: int, step: float) -> dict:
    """How often each end of the interval misses the true difference, at one-sided 95% and 97.5% and 99%."""
    table, index = np.unique(draw(rng, n, p, replicates), axis=0, return_inverse=True)
    weight = np.bincount(index.ravel()) / replicates
    lower, upper = tails(Differences(values, table, step), float(values @ p))
    return {
        f"{side}_{100 * level:g}": round(float((weight * (t <= 1 - level)).sum()), 5)
        for level in (0.95, 0.975, 0.99)
        for side, t in (("lower", lower), ("upper", upper))
    }


def coverage(rng: np.random.Generator, replicates: int) -> Iterator[dict]:
    for n in SIZES:
        for accuracy in ACCURACIES:
            for share in SHARES:
                for drop in DROPS:
                    change = share * 2 * accuracy * (1 - accuracy)
                    if drop > accuracy or drop + change > 2 * (1 - accuracy) + 2 * drop:
                        continue
                    p = trinomial(change, drop)
                    yield {
                        "scores": "0/1",
                        "n": n,
                        "accuracy": accuracy,
                        "changed": round(float(1 - p[1]), 5),
                        "drop": drop,
                        **misses(rng, BINARY, p, n, replicates, 1.0),
                    }
        for name, (values, weights) in GRADED.items():
            for change in (0.05, 0.3):
                for drop in (0.0, 0.02):
                    p = change * weights / weights.sum()
                    p[values == 0] = 1 - change
                    share = drop / float(p @ np.abs(values))
                    p = np.where(values < 0, p * (1 + share), np.where(values > 0, p * (1 - share), p))
                    yield {
                        "scores": name,
                        "n": n,
                        "accuracy": None,
                        "changed": change,
                        "drop": drop,
                        **misses(rng, values, p, n, replicates, float(values[-1] - values[-2])),
                    }


def gate(rng: np.random.Generator, rule: Rule, change: float, drop: float, n: int, replicates: int) -> dict:
    """PASS, FAIL and early-stop rates of `rule` on items in SLICES equal slices, judged as runtime/gate.py does (a test holds the
    two together).
    """
    p = trinomial(change, drop)
    per = [round(n * f / SLICES) for f in rule.fractions]
    counts = np.zeros((replicates, SLICES, 3))
    status, used = np.zeros(replicates, int), np.zeros(replicates)  # 0 open, 1 PASS, 2 FAIL
    for look in range(rule.looks):
        more = per[look] - (per[look - 1] if look else 0)
        counts += rng.multinomial(more, p, size=(replicates, SLICES))
        used[status == 0] = per[look] * SLICES
        status = np.where(status == 0, decide(counts, rule, look), status)
    return {
        "PASS": float((status == 1).mean()),
        "FAIL": float((status == 2).mean()),
        "INCONCLUSIVE": float((status == 0).mean()),
        "mean_items": float(used.mean()),
    }


def decide(counts: np.ndarray, rule: Rule, look: int) -> np.ndarray:
    """counts[R, slices, 3] -> 0 open, 1 PASS, 2 FAIL"""
    high, low = tails(Differences(BINARY, counts.sum(1), 1.0), -rule.margin)
    worst = tails(Differences(BINARY, counts, 1.0), -rule.margin)[1].min(-1)
    fail = (low <= rule.level(rule.alarm / 2, look)) | (worst <= rule.level(rule.alarm / 2 / counts.shape[1], look))
    return np.where(fail, 2, np.where(high <= rule.level(1 - rule.confidence, look), 1, 0))


def rates(rng: np.random.Generator, replicates: int) -> Iterator[dict]:
    for looks in (1, 5):
        for margin in (0.01, 0.02, 0.03):
            for change in (0.01, 0.02, 0.05, 0.1, 0.2):
                rule = Rule(margin=margin, looks=looks)
                n = recommended(rule, change)
                for multiple in (0, 1, 2):
                    yield {
                        "looks": looks,
                        "margin": margin,
                        "changed": change,
                        "n": n,
                        "true_drop": multiple * margin,
                        **gate(rng, rule, change, multiple * margin, n, replicates),
                    }


def summary(cover: list[dict], gates: list[dict]) -> dict:
    """The worst cells, against what was demanded."""
    out = {}
    frequent = [c for c in cover if c["n"] * c["changed"] >= RARE]
    for level in ("95", "97.5", "99"):
        nominal = 1 - float(level) / 100
        total = [c[f"lower_{level}"] + c[f"upper_{level}"] for c in cover]
        often = [c[f"lower_{level}"] + c[f"upper_{level}"] for c in frequent]
        out[f"interval_{100 - 200 * nominal:g}"] = {
            "nominal_coverage": 1 - 2 * nominal,
            "lowest": round(1 - max(total), 4),
            "lowest_frequent": round(1 - max(often), 4),
            "median_frequent": round(1 - float(np.median(often)), 4),
            "highest_frequent": round(1 - min(often), 4),
            "within_1_point_frequent": round(float(np.mean([abs(t - 2 * nominal) <= 0.01 for t in often])), 4),
            "worst_one_sided_miss": max(max(c[f"lower_{level}"], c[f"upper_{level}"]) for c in cover),
            "cells": len(cover),
            "cells_frequent": len(frequent),
        }
    for looks in (1, 5):
        rows = [g for g in gates if g["looks"] == looks]
        at = {m: [g for g in rows if round(g["true_drop"] / g["margin"]) == m] for m in (0, 1, 2)}
        out[f"gate_{looks}_looks"] = {
            "drop_0": {"PASS_lowest": min(g["PASS"] for g in at[0]), "FAIL_highest": max(g["FAIL"] for g in at[0])},
            "drop_margin": {"PASS_highest": max(g["PASS"] for g in at[1]), "FAIL_highest": max(g["FAIL"] for g in at[1])},
            "drop_2_margins": {"PASS_highest": max(g["PASS"] for g in at[2])},
            "mean_items_share_drop_0": round(float(np.mean([g["mean_items"] / g["n"] for g in at[0]])), 3),
            "mean_items_share_drop_2_margins": round(float(np.mean([g["mean_items"] / g["n"] for g in at[2]])), 3),
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=20000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    start, rng = time.perf_counter(), np.random.default_rng(20240521)
    cover = list(coverage(rng, args.replicates))
    gates = list(rates(rng, max(200, args.replicates // 2)))
    result = {
        "summary": summary(cover, gates),
        "replicates": {"coverage": args.replicates, "gate": max(200, args.replicates // 2)},
        "slices": SLICES,
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "gates": gates,
        "coverage": cover,
    }
    print(json.dumps(result["summary"], indent=1))
    print(f"{time.perf_counter() - start:.0f} s")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        lists = {k: result.pop(k) for k in ("gates", "coverage")}
        lines = ",\n".join(f' "{k}": [\n' + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]" for k, rows in lists.items())
        args.output.write_text(json.dumps(result, indent=1)[:-2] + ",\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
