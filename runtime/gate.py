"""The gate: is a candidate at most `margin` worse than its baseline, item by item, overall and in every slice? PASS, FAIL or INCONCLUSIVE.

PASS          the difference overall is above -margin with the asked confidence, and no slice is shown to be worse.
FAIL          overall or a slice is shown to be worse than its margin; the chance that any of these claims is wrong is at most `alarm`,
              half of it for the overall figure, half for the guards and slices together (Holm; Bonferroni when sequential).
INCONCLUSIVE  neither: the verdict says how many items would decide.

Slices: `guard` (they can fail a candidate, but need not be proved good), `strict` (each must pass its own margin), `report` (shown only).
Sequential: `looks` > 1 judges at equal fractions of the items; error-spending boundaries keep both error rates over all looks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from typing import Any

import numpy as np
from scipy import special

from .errors import GateError
from .stats import Differences, holm, inflation, interval, items_needed, mcnemar, ratio_interval, spending_bounds, tails, wilson

SLICE_MODES = ("guard", "strict", "report")
MINIMUM = 20  # fewer items in a row are reported and never judged: the tails are approximations
# What token reduction loses first (OCR, counting, places, a second question); reported as rows of their own whatever the slices are called.
GUARDS = {
    "ocr": r"ocr|read|text|doc|chart|transcri|vtc",
    "counting": r"count|how[_ -]?many",
    "spatial": r"spatial|where|relation|position|place|left|above|_at$",
    "two-turn": r"(two|multi|2)[_ -]?turn",
}


class Status(StrEnum):
    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"

    @property
    def exit_code(self) -> int:
        return {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 4}[self.value]


@dataclass(frozen=True)
class Pair:
    """One item's scores, both in [0, 1]."""

    id: str
    baseline: float
    candidate: float
    slice: str = "all"
    metric: str = "exact"
    turns: int = 1
    group: str | None = None  # items of one group share a picture and are not independent


@dataclass(frozen=True)
class Rule:
    """What to demand. Margins are fractions (0.01 is one point)."""

    margin: float = 0.01
    confidence: float = 0.95  # of a PASS
    alarm: float = 0.01  # the chance that a FAIL is wrong, over all rows and looks
    power: float = 0.8  # used for the number of items that a verdict needs
    slices: str = "guard"
    slice_margin: float | None = None  # default: margin
    looks: int = 1
    max_latency_ratio: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (("margin", 0, 1), ("confidence", 0.5, 1), ("alarm", 0, 0.5), ("power", 0, 1)):
            value = getattr(self, name)
            if not low < value < high:
                raise GateError(f"gate: {name} is {value:g}; it must lie between {low:g} and {high:g}")
        if self.slice_margin is not None and not 0 < self.slice_margin < 1:
            raise GateError(f"gate: slice margin is {self.slice_margin:g}; it must lie between 0 and 1")
        if self.slices not in SLICE_MODES:
            raise GateError(f"gate: slices is {self.slices!r}; possible: {', '.join(SLICE_MODES)}")
        if not 1 <= self.looks <= 50:
            raise GateError(f"gate: {self.looks} looks; possible: 1 to 50")
        if self.max_latency_ratio is not None and self.max_latency_ratio <= 0:
            raise GateError(f"gate: the largest latency ratio is {self.max_latency_ratio:g}; it must be above 0")

    @property
    def fractions(self) -> tuple[float, ...]:
        return tuple(round((k + 1) / self.looks, 6) for k in range(self.looks))

    def level(self, alpha: float, look: int) -> float:
        """What a p-value must undercut at a look (0-based) so that all looks together keep `alpha`."""
        return alpha if self.looks == 1 else float(special.ndtr(-spending_bounds(self.fractions, alpha)[look]))


@dataclass(frozen=True)
class Row:
    """One judged set of items; scores and differences are fractions, `needed` counts items in all (None: no number would do)."""

    name: str
    kind: str  # overall | guard | slice
    metric: str
    n: int
    baseline: float
    candidate: float
    difference: float
    lower: float  # each end of the interval is for the rule's confidence; a verdict asks for a little more (stats.tails)
    upper: float
    candidate_interval: tuple[float, float]
    gains: int
    losses: int
    margin: float
    p_pass: float
    p_fail: float  # adjusted for the number of rows where one look is taken
    p_change: float  # that gains and losses are equally likely (exact McNemar), for information
    status: Status
    needed: int | None  # if nothing is truly lost
    needed_as_seen: int | None  # if the difference is what was seen


@dataclass(frozen=True)
class Latency:
    """Paired repetitions of candidate and baseline in one run, as a ratio of medians."""

    name: str
    ratio: float
    lower: float
    upper: float
    limit: float | None  # None: shown, not judged
    repetitions: int
    status: Status


@dataclass(frozen=True)
class Verdict:
    """The outcome: rows are overall first, then worst first."""

    status: Status
    reasons: tuple[str, ...]
    rows: tuple[Row, ...]
    missing_guards: tuple[str, ...]
    latency: tuple[Latency, ...]
    rule: Rule
    look: int  # 0-based
    stopped_early: bool = False

    @property
    def overall(self) -> Row:
        return self.rows[0]

    @property
    def worst(self) -> Row | None:
        """The slice or guard that failed, or else lost most."""
        return self.rows[1] if len(self.rows) > 1 else None

    @property
    def exit_code(self) -> int:
        return self.status.exit_code

    def as_dict(self) -> dict[str, Any]:
        """JSON-able"""
        return {
            **asdict(self),
            "status": self.status.value,
            "exit_code": self.exit_code,
            "rows": [{**asdict(r), "status": r.status.value} for r in self.rows],
            "latency": [{**asdict(x), "status": x.status.value} for x in self.latency],
        }


def judge(
    pairs: Sequence[Pair], rule: Rule, latency: Mapping[str, tuple[Sequence[float], Sequence[float]]] | None = None, look: int | None = None
) -> Verdict:
    """The verdict on these items. latency: name -> (candidate ms, baseline ms) taken in alternation. look: 0-based, default the last."""
    _check(pairs)
    look = rule.looks - 1 if look is None else look
    overall = _row("overall", "overall", pairs, rule, look, rule.margin)
    guards, missing = _guards(pairs)
    margin = rule.slice_margin or rule.margin
    others = [_row(f"guard:{name}", "guard", part, rule, look, margin) for name, part in guards.items()]
    others += [_row(name, "slice", part, rule, look, margin) for name, part in _slices(pairs).items()]
    alarm = rule.alarm / 2 if others and rule.slices != "report" else rule.alarm
    overall = _decide(overall, overall.p_fail, rule.level(alarm, look), rule, look)
    others = sorted(_decide_all(others, alarm, rule, look), key=lambda r: (r.status is not Status.FAIL, r.difference, r.name))
    speed = _latency(latency or {}, rule)
    status, reasons = _conclude(overall, others, speed, rule)
    return Verdict(
        status,
        tuple(reasons),
        (overall, *others),
        missing,
        tuple(speed),
        rule,
        look,
        stopped_early=look < rule.looks - 1 and status is not Status.INCONCLUSIVE,
    )


def recommended(rule: Rule, discordance: float) -> int:
    """Items for a PASS with the rule's power when nothing is lost and this share of answers turns from right to wrong or back."""
    if not 0 <= discordance <= 1:
        raise GateError(f"gate: discordance is {discordance:g}; it is a share of items, 0 to 1")
    table = Differences(np.array([-1.0, 0.0, 1.0]), np.array([discordance / 2, 1 - discordance, discordance / 2]), 1.0)
    return items_needed(table, rule.margin, rule.confidence, rule.power, _inflation(rule)) or 0


def _inflation(rule: Rule) -> float:
    return 1.0 if rule.looks == 1 else inflation(rule.fractions, 1 - rule.confidence, rule.power)


# -- rows


def _row(name: str, kind: str, pairs: Sequence[Pair], rule: Rule, look: int, margin: float) -> Row:
    a, b = np.array([p.baseline for p in pairs]), np.array([p.candidate for p in pairs])
    groups = [p.group if p.group is not None else f"item {p.id}" for p in pairs] if any(p.group is not None for p in pairs) else None
    data, n = Differences.of(b - a, groups), len(pairs)
    low, high = tails(data, -margin)
    alpha = rule.level(1 - rule.confidence, look)
    gains, losses = int((b > a).sum()), int((b < a).sum())
    metrics = sorted({p.metric for p in pairs})
    scale = n / float(data.n)  # grouped items count less than they are
    harmless, seen = (items_needed(d, margin, rule.confidence, rule.power, _inflation(rule)) for d in (data.symmetric(), data))
    if data.mean < -margin:
        seen = items_needed(data, margin, 1 - rule.alarm / 2, rule.power, fail=True)
    return Row(
        name,
        kind,
        metrics[0] if len(metrics) == 1 else "mixed",
        n,
        float(a.mean()),
        float(b.mean()),
        float((b - a).mean()),
        *interval(data, 1 - alpha),
        wilson(float(b.sum()), n, rule.confidence),
        gains,
        losses,
        margin,
        float(low),
        float(high),
        mcnemar(gains, losses),
        Status.INCONCLUSIVE,
        _scaled(harmless, scale),
        _scaled(seen, scale),
    )


def _scaled(count: int | None, scale: float) -> int | None:
    return None if count is None else int(np.ceil(count * scale))


def _slices(pairs: Sequence[Pair]) -> dict[str, list[Pair]]:
    """By slice, and by metric where a slice is scored in several ways. One slice only is no slice."""
    found: dict[tuple[str, str], list[Pair]] = {}
    for p in pairs:
        found.setdefault((p.slice, p.metric), []).append(p)
    if len(found) == 1:
        return {}
    several = {s for s, _ in found if sum(name == s for name, _ in found) > 1}
    return {f"{s} ({m})" if s in several else s: part for (s, m), part in sorted(found.items())}


def _guards(pairs: Sequence[Pair]) -> tuple[dict[str, list[Pair]], tuple[str, ...]]:
    """(guard -> its items, guards without items). A guard that is exactly one slice, or all items, adds no row of its own."""
    found, missing = {}, []
    sizes = Counter(p.slice for p in pairs)
    for name, pattern in GUARDS.items():
        part = [p for p in pairs if re.search(pattern, p.slice, re.IGNORECASE) or (name == "two-turn" and p.turns > 1)]
        if not part:
            missing.append(name)
        elif len(part) < len(pairs) and not (len({p.slice for p in part}) == 1 and sizes[part[0].slice] == len(part)):
            found[name] = part
    return found, tuple(missing)


# -- decisions


def _decide_all(rows: list[Row], alarm: float, rule: Rule, look: int) -> list[Row]:
    judged = [r for r in rows if r.n >= MINIMUM]
    if rule.looks > 1:  # Holm is not valid across looks
        level = rule.level(alarm / max(1, len(judged)), look)
        return [_decide(r, r.p_fail, level, rule, look) for r in rows]
    adjusted = dict(zip([r.name for r in judged], holm([r.p_fail for r in judged]), strict=True)) if judged else {}
    return [_decide(r, adjusted.get(r.name, 1.0), alarm, rule, look) for r in rows]


def _decide(row: Row, p_fail: float, level: float, rule: Rule, look: int) -> Row:
    status = Status.INCONCLUSIVE
    if row.n >= MINIMUM:
        if p_fail <= level:
            status = Status.FAIL
        elif row.p_pass <= rule.level(1 - rule.confidence, look):
            status = Status.PASS
    return replace(row, p_fail=p_fail, status=status)


def _latency(latency: Mapping[str, tuple[Sequence[float], Sequence[float]]], rule: Rule) -> list[Latency]:
    limit = rule.max_latency_ratio
    out = []
    for name, (candidate, baseline) in latency.items():
        try:
            ratio, low, high = ratio_interval(candidate, baseline, rule.confidence, rule.seed)
        except ValueError as error:
            raise GateError(f"gate: latency {name}: {error}") from None
        decided = limit is not None and len(candidate) >= 5
        status = (
            Status.INCONCLUSIVE if not decided else Status.PASS if high <= limit else Status.FAIL if low > limit else Status.INCONCLUSIVE
        )
        out.append(Latency(name, ratio, low, high, limit, len(candidate), status))
    return out


def _conclude(overall: Row, others: Sequence[Row], speed: Sequence[Latency], rule: Rule) -> tuple[Status, list[str]]:
    """The one status, and the sentences that say why."""
    counted = [] if rule.slices == "report" else list(others)
    failed = [r for r in (overall, *counted) if r.status is Status.FAIL]
    slow = [x for x in speed if rule.max_latency_ratio is not None and x.status is not Status.PASS]
    open_rows = [r for r in (overall, *(counted if rule.slices == "strict" else [])) if r.status is Status.INCONCLUSIVE]
    reasons = [_failed(r) for r in failed] + [_slow(x) for x in slow] + [_open(r, rule) for r in open_rows]
    if failed or any(x.status is Status.FAIL for x in slow):
        return Status.FAIL, reasons
    if rule.max_latency_ratio is not None and not speed:
        return Status.INCONCLUSIVE, [*reasons, "latency: a largest ratio was asked for, but nothing was measured"]
    if open_rows or slow:
        return Status.INCONCLUSIVE, reasons
    return Status.PASS, [
        f"overall: the candidate loses at most {points(-overall.lower)} points with {rule.confidence:.0%} confidence (margin "
        f"{points(overall.margin)}, n={overall.n})"
    ]


def points(value: float) -> str:
    """A fraction as percentage points"""
    return f"{100 * value:.2f}"


def _failed(row: Row) -> str:
    return (
        f"{row.name}: worse by {points(-row.difference)} points (at least {points(-row.upper)}), more than the margin of "
        f"{points(row.margin)}; "
        f"{row.losses} items lost, {row.gains} gained of {row.n} (adjusted p {row.p_fail:.2g})"
    )


def _slow(x: Latency) -> str:
    word = "is above" if x.status is Status.FAIL else "cannot be told from"
    return (
        f"latency {x.name}: {x.ratio:.3f} of the baseline [{x.lower:.3f}, {x.upper:.3f}] {word} the limit {x.limit:g} "
        f"({x.repetitions} pairs)"
    )


def _open(row: Row, rule: Rule) -> str:
    seen = (
        f"{row.name}: difference {points(row.difference)} points [{points(row.lower)}, {points(row.upper)}] does not "
        f"decide a margin of {points(row.margin)} with {row.n} items"
    )
    if row.n >= MINIMUM and row.lower > -row.margin:
        seen = (
            f"{row.name}: the interval [{points(row.lower)}, {points(row.upper)}] only just clears the margin of {points(row.margin)} with "
            f"{row.n} items, and a verdict may not be wrong more often than it says (p {row.p_pass:.3f})"
        )
    if row.n < MINIMUM:
        seen = f"{row.name}: {row.n} items are too few to judge (at least {MINIMUM})"
    more = [
        f"{max(0, needed - row.n)} more items ({needed} in all) {why}"
        for needed, why in ((row.needed, "if nothing is truly lost"), (row.needed_as_seen, "if the difference is as seen"))
        if needed is not None and needed > row.n
    ]
    if not more:
        more = [f"a repetition with other items has a {rule.power:.0%} chance to decide"]
    return f"{seen}; needed for a verdict with {rule.power:.0%} chance: {', '.join(dict.fromkeys(more))}"


def _check(pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise GateError("gate: there are no items to judge")
    for p in pairs:
        for who, value in (("baseline", p.baseline), ("candidate", p.candidate)):
            if not (np.isfinite(value) and 0 <= value <= 1):
                raise GateError(f"gate: item {p.id} has the {who} score {value}; scores lie between 0 and 1")
    if len({p.id for p in pairs}) < len(pairs):
        seen: set[str] = set()
        twice = next(p.id for p in pairs if p.id in seen or seen.add(p.id))
        raise GateError(f"gate: item {twice} occurs twice")
