"""Statistics of paired scores: one test and its interval for 0/1 and graded scores, sequential boundaries, Holm, bootstrap ratios.

Every item is scored for the baseline and for the candidate; d = candidate - baseline lies in [-1, 1] and delta = E d is what a gate is
about. To test delta = d0 the distribution of d is fitted under that constraint by maximum likelihood (atoms at -1 and +1 are always
possible, so data without any difference do not claim certainty), and the mean of d is referred to a Pearson III tail with the fitted
variance and skewness. For 0/1 scores the fit is Tango's (Statistics in Medicine 17, 1998, 891-908); the skewness term repairs its known
liberality when only one kind of change occurs.

Counts are discrete. An interval (`interval`) halves the chance of what was seen, as mid-p does (Berry and Armitage, The Statistician 44,
1995): it covers as often as it says, on the average and for almost every truth. A verdict (`tails`) gives a part of a lattice step away
instead, so that it errs at most as often as it says. Measured: benchmarks/gate_power.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

EDGE = 1e-9
FLAT = 1e-3  # below this skewness the Pearson III tail is the normal one to four digits
ITERATIONS = 44  # halvings of an interval of length 2: 1e-13
HEADROOM = (
    0.03  # of power: the normal approximation of the power is up to 2.4 points optimistic when changes are rare (benchmarks/gate_power.py)
)
LARGEST = 1 << 34  # items; more is never
POINTS = 33  # of a grid that is refined around a boundary


@dataclass(frozen=True)
class Differences:
    """Paired differences as a table: values[V] ascending with -1 and +1 among them, counts[..., V].

    Leading axes are independent data sets.
    """

    values: np.ndarray
    counts: np.ndarray
    step: float  # lattice step of the values, 0 when they lie on no lattice

    @classmethod
    def of(cls, d: np.ndarray, groups: Sequence[object] | None = None) -> Differences:
        """d[n] in [-1, 1]. Items of one group (questions about one picture) are not independent: the counts shrink by the design effect."""
        d = np.asarray(d, float)
        if d.ndim != 1 or not len(d) or not np.isfinite(d).all() or np.abs(d).max() > 1 + EDGE:
            raise ValueError(f"differences must be a non-empty list of numbers in [-1, 1], found shape {list(d.shape)}")
        values = np.unique(np.concatenate([np.round(d, 9), [-1.0, 1.0]]))
        counts = np.bincount(np.searchsorted(values, np.round(d, 9)), minlength=len(values)).astype(float)
        return cls(values, counts / design_effect(d, groups), lattice_step(values))

    @property
    def n(self) -> np.ndarray:
        return self.counts.sum(-1)

    @property
    def mean(self) -> np.ndarray:
        return self.counts @ self.values / self.n

    def symmetric(self) -> Differences:
        """The same amount of change with no tendency, half a change of either kind added: what `items_needed` assumes of a harmless
        candidate.
        """
        values = np.unique(np.concatenate([self.values, -self.values]))
        counts = np.zeros((*self.counts.shape[:-1], len(values)))
        for sign in (1, -1):
            np.add.at(counts, (..., np.searchsorted(values, np.round(sign * self.values, 9))), self.counts / 2)
        counts[..., [0, -1]] += 0.5
        return Differences(values, counts, self.step)


def lattice_step(values: np.ndarray) -> float:
    """The largest 1/k, k <= 30, of which all values are multiples; 0 if there is none."""
    return next((1.0 / k for k in range(1, 31) if np.allclose(values * k, np.round(values * k), atol=1e-6)), 0.0)


def design_effect(d: np.ndarray, groups: Sequence[object] | None) -> float:
    """Variance of the mean with groups over that of independent items; at least 1."""
    if groups is None:
        return 1.0
    _, index = np.unique(np.array([str(g) for g in groups]), return_inverse=True)
    error = d - d.mean()
    plain = float(error @ error)
    if index.max() + 1 == len(d) or plain == 0:
        return 1.0
    return max(1.0, float((np.bincount(index, error) ** 2).sum() / plain))


# -- the test and its inversion


def fit(data: Differences, d0: float | np.ndarray) -> np.ndarray:
    """weights[..., V] that maximise the likelihood of the counts under mean d0.

    w = counts / n / (1 + t (v - d0)), t within the bounds at which the atoms -1 and +1 become free; there they take the missing mass.
    """
    d0 = np.clip(np.asarray(d0, float)[..., None], -1 + EDGE, 1 - EDGE)
    v = data.values - d0
    low, high = -1 / (1 - d0), 1 / (1 + d0)

    def slope(t: np.ndarray) -> np.ndarray:
        return (data.counts * v / np.maximum(1 + t * v, EDGE**2)).sum(-1, keepdims=True)

    a, b = np.broadcast_arrays(low + 0 * data.counts[..., :1], high + 0 * data.counts[..., :1])
    a, b = a.copy(), b.copy()
    for _ in range(ITERATIONS):
        t = (a + b) / 2
        up = slope(t) > 0
        a, b = np.where(up, t, a), np.where(up, b, t)
    weights = data.counts / data.n[..., None] / np.maximum(1 + (a + b) / 2 * v, EDGE)
    rest = np.maximum(1 - weights.sum(-1), 0)
    above = data.mean > d0[..., 0]
    weights[..., 0] += np.where(above, rest, 0)
    weights[..., -1] += np.where(above, 0, rest)
    return weights / weights.sum(-1, keepdims=True)


def tails(data: Differences, d0: float | np.ndarray, verdict: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """(P(mean at least as large), P(mean at least as small)) if delta were d0: small values speak for delta > d0, and for delta < d0.

    verdict: never to err more often than said, see `continuity`; else to be right on the average, for intervals.
    """
    weights, v, n = fit(data, d0), data.values - np.asarray(d0, float)[..., None], data.n
    variance = np.maximum((weights * v**2).sum(-1), EDGE**2)
    skew = (weights * v**3).sum(-1) / variance**1.5 / np.sqrt(n)
    z = (data.mean - d0) * n / np.sqrt(n * variance)
    changes = n * (1 - weights[..., np.abs(data.values) < EDGE].sum(-1))
    shift = continuity(changes) * data.step / np.sqrt(n * variance) if verdict else 0.0
    return _upper(z - shift, skew), _upper(-z - shift, -skew)


def continuity(changes: np.ndarray) -> np.ndarray:
    """The lattice steps given away, by the expected number of changed items: half a step (exact for a count) while they are few, a
    quarter later.

    A quarter throughout errs 2.3 points too often when a handful of changes is expected; a half throughout asks for more items than
    needed (benchmarks/gate_power.py).
    """
    return 0.25 + 0.25 / (1 + changes / 5)


def _upper(z: np.ndarray, skew: np.ndarray) -> np.ndarray:
    """P(Z >= z) of a standardised Pearson III variable."""
    flat = np.abs(skew) < FLAT
    shape = 4 / np.where(flat, 1.0, skew) ** 2
    x = np.maximum(shape + np.sign(skew) * z * np.sqrt(shape), 0)
    gamma = np.where(skew > 0, special.gammaincc(shape, x), special.gammainc(shape, x))
    return np.where(flat, special.ndtr(-z), gamma)


def interval(data: Differences, confidence: float) -> tuple[float, float]:
    """(lower, upper): each end is for `confidence` on its own, so the pair is a 2 * confidence - 1 interval."""
    return tuple(_boundary(data, side, end, 1 - confidence) for side, end in ((0, -1.0), (1, 1.0)))


def _boundary(data: Differences, side: int, end: float, alpha: float) -> float:
    """Between the mean and `end`, where the tail falls to alpha."""
    start = float(data.mean)
    for _ in range(5):
        grid = np.linspace(start, end, POINTS)
        inside = int(np.cumprod(tails(data, grid, verdict=False)[side] > alpha).sum())  # points before the first one outside
        start, end = grid[max(0, inside - 1)], grid[min(inside, POINTS - 1)]
    return float(start + end) / 2


def wilson(right: float, n: int, confidence: float) -> tuple[float, float]:
    """Two-sided interval of a mean of scores in [0, 1]; for 0/1 scores Wilson's (JASA 22, 1927)."""
    z = float(special.ndtri((1 + confidence) / 2))
    p, scale = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / scale, z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def mcnemar(gains: int, losses: int) -> float:
    """Exact two-sided p-value that gains and losses are equally likely (binomial; McNemar 1947)."""
    n, k = gains + losses, min(gains, losses)
    return 1.0 if n == 0 else min(1.0, 2 * float(special.bdtr(k, n, 0.5)))


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values that keep the chance of any false rejection (Holm 1979)."""
    order, out, top = np.argsort(p, kind="stable"), [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        top = max(top, min(1.0, (len(p) - rank) * p[i]))
        out[i] = top
    return out


# -- sample size


def items_needed(
    data: Differences, margin: float, confidence: float, power: float, inflation: float = 1.0, fail: bool = False
) -> int | None:
    """Items for a verdict with probability `power` if delta and its spread are as in `data`: PASS, or FAIL with `fail`. None: never."""
    mean = float(data.mean)
    gap = -margin - mean if fail else mean + margin
    if gap <= 0:
        return None
    p = data.counts / data.n
    true = float((p * (data.values - mean) ** 2).sum())
    enough, surplus = float(special.ndtri(confidence)), float(special.ndtri(min(power + HEADROOM, (1 + power) / 2)))

    def decides(n: np.ndarray) -> np.ndarray:
        sample = Differences(data.values, p * (n / inflation)[:, None], data.step)
        null = (fit(sample, -margin) * (data.values + margin) ** 2).sum(-1)
        tail = np.maximum(tails(sample, -margin)[1 if fail else 0], 1e-300)
        return -special.ndtri(tail) >= enough + surplus * np.sqrt(true / null)

    low, high = 1, LARGEST
    while high - low > 1:
        grid = np.unique(np.round(np.geomspace(low, high, POINTS)).astype(np.int64))
        enough_here = decides(grid.astype(float))
        if not enough_here[-1]:
            return None
        first = int(enough_here.argmax())
        low, high = int(grid[max(0, first - 1)]), int(grid[first])
    return high


# -- group-sequential boundaries


GRID = np.linspace(-8, 8, 501)  # in units of the standard deviation of the score at t = 1


@lru_cache(maxsize=256)
def spending_bounds(fractions: tuple[float, ...], alpha: float) -> tuple[float, ...]:
    """Upper boundaries c_k of z at information fractions t_k <= 1 whose total crossing chance is `alpha`.

    Lan-DeMets spending 2 - 2 Phi(z_{alpha/2} / sqrt t) (Biometrika 70, 1983: close to O'Brien-Fleming), by recursive integration
    (Armitage, McPherson, Rowe, JRSS A 132, 1969).
    """
    spent = [2 * special.ndtr(-special.ndtri(1 - alpha / 2) / np.sqrt(t)) for t in fractions[:-1]] + [alpha]
    bounds: list[float] = []
    walk = Walk()
    for k, t in enumerate(fractions):
        walk.advance(t)
        want = spent[k] - (spent[k - 1] if k else 0.0)
        low, high = 0.0, 12.0
        for _ in range(50):
            c = (low + high) / 2
            low, high = (c, high) if walk.above(c) > want else (low, c)
        bounds.append((low + high) / 2)
        walk.cut(bounds[-1])
    return tuple(bounds)


def crossing(fractions: Sequence[float], bounds: Sequence[float], drift: float = 0.0) -> float:
    """The chance to cross a boundary at any look when z at t = 1 has mean `drift`."""
    walk, total = Walk(drift), 0.0
    for t, c in zip(fractions, bounds, strict=True):
        walk.advance(t)
        total += walk.above(c)
        walk.cut(c)
    return total


class Walk:
    """The density of the score B = z sqrt t on a grid, of what has not crossed yet."""

    def __init__(self, drift: float = 0.0):
        self.drift, self.time, self.density = drift, 0.0, None
        self.grid = GRID + drift / 2
        self.width = float(GRID[1] - GRID[0])

    def advance(self, time: float) -> None:
        step = time - self.time
        if self.density is None:
            self.density = _normal(self.grid - self.drift * step, step)
        else:
            self.density = _normal(self.grid[:, None] - self.grid[None, :] - self.drift * step, step) @ self.density * self.width
        self.time = time

    def above(self, c: float) -> float:
        return float((self.density * self._share(c)).sum() * self.width)

    def cut(self, c: float) -> None:
        self.density = self.density * (1 - self._share(c))

    def _share(self, c: float) -> np.ndarray:
        """The part of each grid cell above z = c."""
        return np.clip((self.grid - c * np.sqrt(self.time)) / self.width + 0.5, 0, 1)


def _normal(x: np.ndarray, variance: float) -> np.ndarray:
    return np.exp(-(x**2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)


@lru_cache(maxsize=256)
def inflation(fractions: tuple[float, ...], alpha: float, power: float) -> float:
    """How many times the items of one look the sequential plan needs at its end for the same power."""
    bounds, low, high = spending_bounds(fractions, alpha), 0.0, 12.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if crossing(fractions, bounds, middle) < power else (low, middle)
    return float((low / (special.ndtri(1 - alpha) + special.ndtri(power))) ** 2)


# -- ratios


def ratio_interval(
    candidate: Sequence[float], baseline: Sequence[float], confidence: float, seed: int = 0, rounds: int = 4000
) -> tuple[float, float, float]:
    """(ratio of medians, lower, upper) of measurements taken in pairs.

    Pairs are resampled, each end holds with `confidence` (percentile bootstrap).
    """
    a, b = np.asarray(candidate, float), np.asarray(baseline, float)
    if a.shape != b.shape or not len(a) or (b <= 0).any() or not np.isfinite([a, b]).all():
        raise ValueError(f"a ratio needs paired positive measurements, found {a.shape} and {b.shape}")
    pick = np.random.default_rng(seed).integers(len(a), size=(rounds, len(a)))
    ratios = np.median(a[pick], 1) / np.median(b[pick], 1)
    low, high = np.quantile(ratios, [1 - confidence, confidence])
    return float(np.median(a) / np.median(b)), float(low), float(high)
