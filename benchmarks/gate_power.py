"""How often the gate errs, by simulation.

Coverage of its intervals (for one truth after another, and on the average over truths), PASS and FAIL rates at its recommended number of
items, one look and five.

python benchmarks/gate_power.py [--replicates 20000] [--output benchmarks/results/gate_power.json]
"""

import argparse
import itertools
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import scipy
from scipy import optimize, stats

from foveate.runtime.gate import Rule, recommended
from foveate.runtime.stats import Differences, tails

BINARY = np.array([-1.0, 0.0, 1.0])
SIZES = (50, 100, 200, 500, 1000, 2000, 5000)
ACCURACIES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SHARES = (0.1, 0.3, 1.0)  # of the disagreement that two independent models of this accuracy would have
DROPS = (0.0, 0.01, 0.02, 0.05)
SLICES = 8
LEVELS = (0.95, 0.975, 0.99)  # of one end: intervals of 90, 95 and 98%
RARE = 1.75  # expected changes below which no interval of 95 or 98% can be within a point of its level for every truth: `bound`
FEW = 5
BANDS = ((0, RARE), (RARE, FEW), (FEW, 30), (30, float("inf")))
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
    """How often each end of the interval misses the true difference, at one-sided 95%, 97.5% and 99%."""
    table, index = np.unique(draw(rng, n, p, replicates), axis=0, return_inverse=True)
    weight = np.bincount(index.ravel()) / replicates
    return rates_of(*tails(Differences(values, table, step), float(values @ p), verdict=False), weight)


def rates_of(lower: np.ndarray, upper: np.ndarray, weight: np.ndarray | float) -> dict:
    return {
        f"{side}_{100 * level:g}": round(float((weight * (t <= 1 - level)).sum()), 5)
        for level in LEVELS
        for side, t in (("lower", lower), ("upper", upper))
    }


def averaged(rng: np.random.Generator, replicates: int) -> Iterator[dict]:
    """The same on the average over truths, a new one for every draw: accuracy spread by a fifth of its distance to 1, any share of the
    disagreement of two independent models, any tendency among the changed answers.
    """
    for n in SIZES:
        for accuracy in ACCURACIES:
            a = 1 - (1 - accuracy) * rng.uniform(0.8, 1.2, replicates)
            change = rng.uniform(0.1, 1, replicates) * 2 * a * (1 - a)
            drop = rng.uniform(-1, 1, replicates) * change
            p = np.stack([(change + drop) / 2, 1 - change, (change - drop) / 2], -1)
            lower, upper = tails(Differences(BINARY, rng.multinomial(n, p).astype(float), 1.0), -drop, verdict=False)
            yield {"n": n, "accuracy": accuracy, "changed": round(float(change.mean()), 5), **rates_of(lower, upper, 1 / replicates)}


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


def bound(nominal: float, expected: float, most: int = 24) -> float:
    """The most often that any interval can miss a difference of 0 when this many changes are expected (Poisson), gains and losses equally
    likely, if it misses at most a point more than `nominal` whatever number is expected.

    Rejecting 0 after k changes is a choice for every k of how lopsided they must be, the most lopsided first: an integer program.
    """
    cells = [(k, j) for k in range(most + 1) for j in range((k + 1) // 2)]  # k changes, j of them of the rarer kind
    place = {cell: i for i, cell in enumerate(cells)}

    def miss(m: float) -> np.ndarray:
        return np.array([2 * stats.poisson.pmf(k, m) * stats.binom.pmf(j, k, 0.5) for k, j in cells])

    rows, most_allowed = [miss(m) for m in np.linspace(0.05, 12, 120)], [nominal + 0.01] * 120
    for (k, j), i in place.items():
        if j:
            row = np.zeros(len(cells))
            row[i], row[place[k, j - 1]] = 1, -1
            rows.append(row)
            most_allowed.append(0.0)
    limits = optimize.LinearConstraint(np.array(rows), -np.inf, most_allowed)
    found = optimize.milp(-miss(expected), constraints=limits, integrality=np.ones(len(cells)), bounds=optimize.Bounds(0, 1))
    return float(-found.fun)


def impossible(nominal: float) -> float:
    """The largest quarter of an expected change at which no interval comes within a point of `nominal`."""
    steps = np.arange(0.5, 5, 0.25)
    return next(float(m) for m, more in itertools.pairwise(steps) if bound(nominal, more) >= nominal - 0.01)


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


def summary(cover: list[dict], average: list[dict], gates: list[dict]) -> dict:
    """The worst cells, against what was demanded."""
    out: dict = {}
    for level in LEVELS:
        out[f"interval_{200 * level - 100:g}"] = {
            kind: {f"{low:g} to {high:g} changes expected": _covered(cells, level, low, high) for low, high in BANDS}
            for kind, cells in (("every truth", cover), ("average over truths", average))
        } | {"impossible up to expected changes": impossible(2 * (1 - level))}
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


def _covered(cells: list[dict], level: float, low: float, high: float) -> dict | None:
    name = f"{100 * level:g}"
    misses = [(c[f"lower_{name}"], c[f"upper_{name}"]) for c in cells if low <= c["n"] * c["changed"] < high]
    if not misses:
        return None
    total = np.array([a + b for a, b in misses])
    return {
        "settings": len(misses),
        "lowest": round(1 - float(total.max()), 4),
        "median": round(1 - float(np.median(total)), 4),
        "highest": round(1 - float(total.min()), 4),
        "within_1_point": round(float(np.mean(np.abs(total - 2 * (1 - level)) <= 0.01)), 4),
        "worst_one_sided_miss": max(map(max, misses)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=20000)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    start, rng = time.perf_counter(), np.random.default_rng(20240521)
    cover = list(coverage(rng, args.replicates))
    average = list(averaged(rng, args.replicates))
    gates = list(rates(rng, max(200, args.replicates // 2)))
    result = {
        "summary": summary(cover, average, gates),
        "replicates": {"coverage": args.replicates, "gate": max(200, args.replicates // 2)},
        "slices": SLICES,
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), "numpy": np.__version__, "scipy": scipy.__version__},
        "gates": gates,
        "average": average,
        "coverage": cover,
    }
    print(json.dumps(result["summary"], indent=1))
    print(f"{time.perf_counter() - start:.0f} s")
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        lists = {k: result.pop(k) for k in ("gates", "average", "coverage")}
        lines = ",\n".join(f' "{k}": [\n' + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]" for k, rows in lists.items())
        args.output.write_text(json.dumps(result, indent=1)[:-2] + ",\n" + lines + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
