"""The statistics against known values, other libraries, and counting."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from foveate.runtime import stats
from foveate.runtime.stats import Differences


def table(losses: int, same: int, gains: int) -> Differences:
    return Differences.of(np.repeat([-1.0, 0.0, 1.0], [losses, same, gains]))


def test_the_constrained_fit_is_tangos():
    losses, same, gains, d0 = 7, 85, 3, -0.02
    n = losses + same + gains
    # closed form of Tango 1998 for the probability of a loss
    b = -(losses + gains) + (2 * n - gains + losses) * d0
    q = (np.sqrt(b * b + 8 * n * losses * d0 * (1 - d0)) - b) / (4 * n)
    got = stats.fit(table(losses, same, gains), d0)
    assert got == pytest.approx([q, 1 - 2 * q - d0, q + d0], abs=1e-9)


def test_the_fit_keeps_the_constraint_for_graded_scores():
    d = np.random.default_rng(0).choice([-1, -2 / 3, -1 / 3, 0, 1 / 3], size=60)
    data = Differences.of(d)
    for d0 in (-0.9, -0.1, 0.0, 0.4, 0.9):
        w = stats.fit(data, d0)
        assert w.sum() == pytest.approx(1) and w @ data.values == pytest.approx(d0, abs=1e-6) and (w >= 0).all()


def test_no_difference_at_all_is_not_certainty():
    assert float(stats.tails(table(0, 100, 0), -0.01)[0]) > 0.05
    lower, upper = stats.interval(table(0, 100, 0), 0.95)
    assert lower == pytest.approx(-upper)
    # 0 of n: half of (1 - p) ** n is 5% (mid-p) at p = 1 - 0.1 ** (1 / n)
    assert -lower == pytest.approx(1 - 0.1 ** (1 / 100), rel=0.15)


def test_a_verdict_asks_for_a_little_more_than_the_interval():
    """so that it errs at most as often as it says"""
    data = table(30, 950, 20)
    for d0 in (-0.05, -0.02, 0.0, 0.01):
        claim, middle = stats.tails(data, d0), stats.tails(data, d0, verdict=False)
        assert claim[0] > middle[0] and claim[1] > middle[1]
        assert float(middle[0] + middle[1]) == pytest.approx(1, abs=2e-3)  # what was seen counts half on either side


@hypothesis.given(st.integers(0, 12), st.integers(0, 12), st.integers(20, 900), st.sampled_from([0.9, 0.95, 0.99]))
@hypothesis.settings(max_examples=40, deadline=None)
def test_an_interval_holds_what_was_seen_and_grows_with_confidence(losses, gains, same, confidence):
    data = table(losses, same, gains)
    low, high = stats.interval(data, confidence)
    assert -1 <= low <= float(data.mean) <= high <= 1 and low < high
    wider = stats.interval(data, (1 + confidence) / 2)
    assert wider[0] < low and high < wider[1]


def test_an_interval_covers_as_often_as_it_says_on_the_average():
    """Over truths of every tendency: 90% and 95% within a point (20,000 draws: standard error 0.2 points)."""
    rng = np.random.default_rng(5)
    change = rng.uniform(0.02, 0.2, 20_000)
    drop = rng.uniform(-1, 1, 20_000) * change
    counts = rng.multinomial(200, np.stack([(change + drop) / 2, 1 - change, (change - drop) / 2], -1)).astype(float)
    lower, upper = stats.tails(Differences(np.array([-1.0, 0, 1]), counts, 1.0), -drop, verdict=False)
    for level in (0.05, 0.025):
        assert ((lower <= level) | (upper <= level)).mean() == pytest.approx(2 * level, abs=0.01)


def test_many_changes_give_the_normal_interval():
    lower, upper = stats.interval(table(400, 9300, 300), 0.95)
    se = np.sqrt(0.07 - 0.01**2) / 100
    assert (lower, upper) == pytest.approx((-0.01 - 1.645 * se, -0.01 + 1.645 * se), abs=3e-4)


def test_losses_only_follow_the_binomial():
    """One kind of change is a binomial count: its exact tail lies between the ordinary and the mid-p one."""
    n, losses = 200, 4
    p = float(stats.tails(table(losses, n - losses, 0), -0.05)[0])  # as few losses at 5%
    assert scipy_stats.binom.cdf(losses - 1, n, 0.05) < p < scipy_stats.binom.cdf(losses, n, 0.05)


def test_mirrored_data_give_mirrored_answers():
    a, b = stats.interval(table(9, 80, 2), 0.95), stats.interval(table(2, 80, 9), 0.95)
    assert a == pytest.approx((-b[1], -b[0]), abs=1e-9)


@pytest.mark.parametrize(("n", "accuracy", "change", "drop"), [(60, 0.5, 0.5, 0.0), (300, 0.9, 0.1, 0.02), (1000, 0.95, 0.05, 0.05)])
def test_each_end_misses_about_as_often_as_it_says(n, accuracy, change, drop):
    p = np.array([(change + drop) / 2, 1 - change, (change - drop) / 2])
    counts = np.random.default_rng(1).multinomial(n, p, size=4000).astype(float)
    low, high = stats.tails(Differences(np.array([-1.0, 0, 1]), counts, 1.0), -drop)
    for miss in ((low <= 0.05).mean(), (high <= 0.05).mean()):
        assert 0.03 < miss < 0.06  # 4000 draws: standard error 0.0034


def test_groups_count_for_less():
    d = np.repeat(np.random.default_rng(0).choice([-1.0, 0, 0, 0, 1], size=50), 4)
    alone, grouped = Differences.of(d), Differences.of(d, np.repeat(np.arange(50), 4))
    assert float(grouped.n) == pytest.approx(50, rel=0.05) and float(alone.n) == 200
    assert float(grouped.mean) == pytest.approx(float(alone.mean))


def test_lattice_step():
    assert stats.lattice_step(np.array([-1, 0, 1.0])) == 1
    assert stats.lattice_step(np.array([-1, -1 / 3, 0.3333333, 1.0])) == pytest.approx(1 / 3)
    assert stats.lattice_step(np.array([-1, 0.123456, 1.0])) == 0


def test_against_scipy():
    assert stats.mcnemar(3, 11) == pytest.approx(scipy_stats.binomtest(3, 14).pvalue)
    assert stats.mcnemar(0, 0) == 1 and stats.mcnemar(5, 5) == 1
    want = scipy_stats.binomtest(18, 20).proportion_ci(0.95, method="wilson")
    assert stats.wilson(18, 20, 0.95) == pytest.approx((want.low, want.high))
    assert stats.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_spending_bounds():
    # Lan-DeMets O'Brien-Fleming-type bounds, five looks, one-sided 0.025: published as 4.877 3.357 2.680 2.290 2.031 (gsDesign, ldbounds)
    got = stats.spending_bounds((0.2, 0.4, 0.6, 0.8, 1.0), 0.025)
    assert got == pytest.approx((4.877, 3.357, 2.680, 2.290, 2.031), abs=3e-3)
    assert stats.spending_bounds((1.0,), 0.05) == pytest.approx((1.645,), abs=2e-3)


def test_bounds_keep_their_level_by_walking():
    fractions = (0.25, 0.5, 0.75, 1.0)
    bounds = stats.spending_bounds(fractions, 0.05)
    steps = np.random.default_rng(0).normal(0, 0.5, size=(200_000, 4)).cumsum(1)
    assert ((steps / np.sqrt(fractions)) >= bounds).any(1).mean() == pytest.approx(0.05, abs=0.002)  # standard error 0.0005
    assert 1 < stats.inflation(fractions, 0.05, 0.8) < 1.1


def test_items_needed():
    p = np.array([0.025, 0.95, 0.025])
    data = Differences(np.array([-1.0, 0, 1]), p * 1000, 1.0)
    n = stats.items_needed(data, 0.01, 0.95, 0.8)
    assert n == pytest.approx((1.645 + 0.954) ** 2 * 0.05 / 0.01**2, rel=0.08)  # the normal formula at 83%
    counts = np.random.default_rng(3).multinomial(n, p, size=3000).astype(float)
    assert (stats.tails(Differences(data.values, counts, 1.0), -0.01)[0] <= 0.05).mean() == pytest.approx(0.83, abs=0.03)
    worse = Differences(data.values, np.array([60.0, 900, 20]), 1.0)
    assert stats.items_needed(worse, 0.01, 0.95, 0.8) is None
    assert stats.items_needed(worse, 0.01, 0.99, 0.8, fail=True) > 100


def test_ratio_interval_is_seeded_and_finds_the_ratio():
    rng = np.random.default_rng(0)
    baseline = rng.uniform(9, 11, 60)
    candidate = 0.5 * baseline * rng.uniform(0.98, 1.02, 60)
    first = stats.ratio_interval(candidate, baseline, 0.95, seed=3)
    assert first == stats.ratio_interval(candidate, baseline, 0.95, seed=3)
    assert first[1] < 0.5 < first[2] and first[2] - first[1] < 0.1
    with pytest.raises(ValueError, match="paired positive"):
        stats.ratio_interval([1.0], [0.0], 0.95)


@pytest.mark.parametrize("d", [[], [2.0], [float("nan")]])
def test_differences_outside_the_range_are_refused(d):
    with pytest.raises(ValueError, match=r"numbers in \[-1, 1\]"):
        Differences.of(np.array(d))
