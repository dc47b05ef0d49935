"""Verdicts on made items: what passes, what fails, what cannot be told, and what is refused."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from foveate.runtime.errors import GateError
from foveate.runtime.gate import MINIMUM, Pair, Rule, Status, judge, recommended

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def pairs(losses: int = 0, gains: int = 0, n: int = 1000, slice: str = "all", **other) -> list[Pair]:
    """n items: some lost, some gained, the rest right in both."""
    kinds = [(1.0, 0.0)] * losses + [(0.0, 1.0)] * gains + [(1.0, 1.0)] * (n - losses - gains)
    return [Pair(f"{slice}-{i}", b, c, slice, **other) for i, (b, c) in enumerate(kinds)]


def test_the_same_answers_pass_when_there_are_enough():
    verdict = judge(pairs(n=1000), Rule())
    assert verdict.status is Status.PASS and verdict.exit_code == 0
    assert "loses at most" in verdict.reasons[0]


def test_the_same_answers_on_few_items_do_not_pass():
    verdict = judge(pairs(n=100), Rule())
    assert verdict.status is Status.INCONCLUSIVE and verdict.exit_code == 4
    assert verdict.overall.needed > 250
    assert f"{verdict.overall.needed - 100} more items ({verdict.overall.needed} in all) if nothing is truly lost" in verdict.reasons[0]


def test_many_losses_fail():
    verdict = judge(pairs(losses=80, gains=10), Rule())
    assert verdict.status is Status.FAIL and verdict.exit_code == 1
    assert verdict.overall.losses == 80 and "worse by 7.00 points" in verdict.reasons[0]


def test_a_slice_can_fail_a_candidate_that_passes_overall():
    items = pairs(n=6000, slice="color", gains=60) + pairs(losses=30, n=200, slice="count")
    verdict = judge(items, Rule())
    assert verdict.overall.status is Status.PASS
    assert verdict.status is Status.FAIL and verdict.worst.name == "count"
    assert judge(items, Rule(slices="report")).status is Status.PASS


def test_strict_slices_must_prove_themselves():
    items = pairs(n=3000, slice="color") + pairs(n=100, slice="count")
    assert judge(items, Rule()).status is Status.PASS
    verdict = judge(items, Rule(slices="strict"))
    assert verdict.status is Status.INCONCLUSIVE and verdict.reasons[0].startswith("count:")
    assert judge(items, Rule(slices="strict", slice_margin=0.1)).status is Status.PASS


def test_worst_first():
    items = pairs(n=300, slice="a", losses=3) + pairs(n=300, slice="b", losses=9) + pairs(n=300, slice="c")
    assert [r.name for r in judge(items, Rule()).rows] == ["overall", "b", "a", "c"]


def test_guards_gather_slices_and_missing_ones_are_named():
    items = (
        pairs(n=50, slice="read") + pairs(n=50, slice="vtc_recall") + pairs(n=50, slice="count_color") + pairs(n=50, slice="exist", turns=2)
    )
    verdict = judge(items, Rule())
    assert {r.name: r.n for r in verdict.rows if r.kind == "guard"} == {"guard:ocr": 100}  # counting and two-turn are one slice each
    assert verdict.missing_guards == ("spatial",)


def test_graded_scores_and_slices_with_two_metrics():
    rng = np.random.default_rng(0)
    items = [Pair(f"{i}", *rng.choice([0, 1 / 3, 2 / 3, 1], size=2), "read", "vqa" if i % 2 else "anls") for i in range(300)]
    verdict = judge(items, Rule(margin=0.2))
    assert {r.name for r in verdict.rows} == {"overall", "read (vqa)", "read (anls)"}
    assert verdict.overall.metric == "mixed" and verdict.status is Status.PASS


def test_few_items_are_never_judged():
    verdict = judge(pairs(losses=MINIMUM - 1, n=MINIMUM - 1), Rule())
    assert verdict.status is Status.INCONCLUSIVE and "too few to judge (at least 20)" in verdict.reasons[0]
    assert judge(pairs(n=1), Rule()).status is Status.INCONCLUSIVE


def test_all_wrong_in_both_has_no_variance_and_is_judged():
    assert judge([Pair(str(i), 0.0, 0.0) for i in range(1000)], Rule()).status is Status.PASS


def test_questions_about_one_picture_count_for_less():
    items = [Pair(str(i), 1.0, float(i // 10 % 50 != 0), group=f"picture {i // 10}") for i in range(5000)]
    alone = [Pair(p.id, p.baseline, p.candidate) for p in items]
    grouped, single = judge(items, Rule(margin=0.03)).overall, judge(alone, Rule(margin=0.03)).overall
    assert grouped.difference == single.difference and grouped.lower < single.lower - 0.005


def test_latency():
    items, rng = pairs(n=1000), np.random.default_rng(0)
    base = rng.uniform(9, 11, 30)
    rule = Rule(max_latency_ratio=0.8)
    assert judge(items, rule, {"prefill": (base * 0.5, base)}).status is Status.PASS
    slow = judge(items, rule, {"prefill": (base * 1.2, base)})
    assert slow.status is Status.FAIL and "is above the limit 0.8" in slow.reasons[0]
    assert judge(items, rule, {"prefill": (base[:3] * 0.5, base[:3])}).status is Status.INCONCLUSIVE
    assert judge(items, rule).status is Status.INCONCLUSIVE
    assert judge(items, Rule(), {"prefill": (base * 9, base)}).status is Status.PASS  # shown, not asked for


def test_looks_spend_the_level():
    """At an early look even a clear result may not suffice; at the last one the level is close to that of one look."""
    rule = Rule(looks=5)
    assert [round(rule.level(0.05, k), 4) for k in (0, 4)] == [0.0, 0.0409]
    items = pairs(n=600)
    assert judge(items, Rule()).status is Status.PASS
    assert judge(items, rule, look=0).status is Status.INCONCLUSIVE
    verdict = judge(pairs(n=2500), rule, look=2)
    assert verdict.status is Status.PASS and verdict.stopped_early


def test_the_same_items_give_the_same_numbers():
    items = pairs(losses=20, gains=12, n=400, slice="read") + pairs(losses=3, n=300, slice="where")
    first = json.dumps(judge(items, Rule()).as_dict(), sort_keys=True)
    assert first == json.dumps(judge(items, Rule()).as_dict(), sort_keys=True)
    shuffled = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    assert first == json.dumps(judge(shuffled, Rule()).as_dict(), sort_keys=True)


@pytest.mark.parametrize("looks", [1, 5])
def test_the_simulation_judges_as_the_gate_does(looks):
    sys.path.insert(0, str(BENCHMARKS))
    from gate_power import decide

    rng, rule, seen = np.random.default_rng(5), Rule(margin=0.02, looks=looks), set()
    for drop in (0.0, 0.0, 0.02, 0.1, 0.2):
        counts = rng.multinomial(150, [0.05 + drop, 0.9 - drop, 0.05], size=4).astype(int)
        items = [p for s, (lost, same, won) in enumerate(counts) for p in pairs(lost, won, lost + same + won, slice=f"s{s}")]
        want = decide(counts[None].astype(float), rule, looks - 1)[0]
        got = judge(items, rule).status
        assert ["INCONCLUSIVE", "PASS", "FAIL"][want] == got
        seen.add(got)
    assert len(seen) > 1


def test_recommended_items():
    assert recommended(Rule(), 0.05) == pytest.approx(3530, rel=0.02)
    assert 270 < recommended(Rule(), 0.0) <= 300  # 0.99 ** 299 = 0.05
    assert 1 < recommended(Rule(looks=5), 0.05) / recommended(Rule(), 0.05) < 1.1
    with pytest.raises(GateError, match="discordance is 2"):
        recommended(Rule(), 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0}, "margin is 0; it must lie between 0 and 1"),
        ({"confidence": 0.3}, "confidence is 0.3"),
        ({"slices": "all"}, "possible: guard, strict, report"),
        ({"looks": 0}, "0 looks"),
        ({"slice_margin": 2}, "slice margin is 2"),
        ({"max_latency_ratio": -1}, "must be above 0"),
    ],
)
def test_impossible_rules(options, message):
    with pytest.raises(GateError, match=message):
        Rule(**options)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "no items to judge"),
        ([Pair("x", 1.0, float("nan"))], "item x has the candidate score nan"),
        ([Pair("x", 3.0, 1.0)], "baseline score 3.0"),
        ([Pair("x", 1.0, 1.0)] * 2, "item x occurs twice"),
    ],
)
def test_impossible_items(items, message):
    with pytest.raises(GateError, match=message):
        judge(items, Rule())
