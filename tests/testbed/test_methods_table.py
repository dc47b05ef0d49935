"""The testbed table's pure parts: what is planned, the record and its resume, intervals and verdicts; and that the committed record is of the plan."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import testbed_report as report
from benchmarks import testbed_table as bench
from benchmarks.testbed_configs import (
    AVERAGE,
    BUDGETS,
    CUTS,
    NONE,
    ORIGINAL,
    OTHER,
    RENUMBERED,
    TOKENS,
    UNMEASURED,
    Config,
    average,
    plan,
    recycled,
    reductions,
    thousandths,
    unplanned,
)
from foveate.passes.recipe import load
from foveate.passes.select import share

PLAN = plan()
BITS = st.lists(st.booleans(), min_size=1, max_size=40)


def line(recipe: str, bits, **more) -> bench.Line:
    flops = {"vision": 10, "prefill": 20, "decode": 1}
    base = {"visual": (72,) * 8, "held": (72.0,) * 8, "flops": flops, "commit": "abc", "date": "2026-01-01", "versions": {}}
    return bench.Line(recipe, "d1", len(bits), bench.pack(bits), **{**base, **more})


# -- the plan


def test_every_method_that_discovery_finds_is_planned_or_refused_with_a_reason():
    """A method that came after the plan does not break anything: the document names it as not measured."""
    assert {c.method for c in PLAN if " + " not in c.method} | set(UNMEASURED) | set(unplanned()) == set(reductions())
    assert all(f"`{name}`" in "\n".join(report.notes(small_table())) for name in unplanned())
    assert set(UNMEASURED) <= set(reductions()) and all(UNMEASURED.values())
    assert not set(UNMEASURED) & {c.method for c in PLAN}


def test_recipes_are_valid_and_distinct_and_a_quarter_comes_first():
    assert len({c.recipe for c in PLAN}) == len(PLAN)
    for recipe, _ in bench.todo(PLAN, {}):
        assert recipe == NONE or load(recipe).steps[-1].rewrite.name == "clean-up", recipe
    budgets = [c.budget for c in PLAN if c.section not in (OTHER, *CUTS)]
    assert [b for i, b in enumerate(budgets) if b not in budgets[:i]] == list(BUDGETS)


def test_every_selector_with_a_budget_has_both_controls_and_they_are_measured():
    wanted = {recipe for recipe, _ in bench.todo(PLAN, {})}
    for c in PLAN:
        assert c.budget is None or (len(c.uniform) == 2 and c.random), c.recipe
        assert wanted >= {*c.uniform, *c.random}


@given(st.integers(1, 999).flatmap(lambda n: st.tuples(st.integers(1, n), st.just(n))))
def test_a_share_in_thousandths_keeps_exactly_that_many(pair):
    kept, of = pair
    assert share(thousandths(kept, of), of) == kept


def test_averages_over_the_layers():
    assert average((4,), (0,)) == 0.5 and average((0,), (36,)) == 0.25 and average((2,), (48,)) == 0.5
    assert recycled([1.0, 0.5])[0] == TOKENS and recycled([1.0, 0.5])[1] > 72, "clusters come on top of the budget"


# -- the record


@given(BITS)
def test_bits_survive_packing(bits):
    assert bench.unpack(bench.pack(bits), len(bits)).tolist() == bits


def test_other_numbers_of_questions_are_refused():
    with pytest.raises(bench.RecordError, match="a line holds 16 bits for 30 questions; it was measured on other items"):
        bench.unpack(bench.pack([True] * 16), 30)


def test_an_item_scores_the_share_of_its_questions():
    assert bench.item_scores(bench.pack([True, True, False, False]), [1, 2, 1]).tolist() == [1.0, 0.5, 0.0]


def test_the_record_is_gone_on_with_and_latencies_join_their_line(tmp_path):
    path = tmp_path / "r.jsonl"
    assert bench.read(path) == {}
    for recipe in (NONE, "a, clean-up"):
        bench.append(path, asdict(line(recipe, [True, False])))
    bench.append(path, {"recipe": NONE, "items": "d1", "latency": {"vision": {"ms": 1}}})
    done = bench.read(path, "d1")
    assert list(done) == [NONE, "a, clean-up"] and done[NONE].latency == {"vision": {"ms": 1}} and done["a, clean-up"].latency is None
    config = Config("a", "a, clean-up", AVERAGE, 0.5, uniform=("u, clean-up",), random=("r, clean-up", "r1{seed=1}"))
    assert bench.todo([config, replace(config, recipe="b{seed=1}", random=())], done) == [("u, clean-up", ""), ("r, clean-up", ""), ("r1{seed=1}", "")]
    assert bench.todo([config], {})[0] == (NONE, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps({"recipe": "a", "items": "d2", "n": 1}), r"r\.jsonl:2: measured on items d2, the others are d1; use another --record"),
        ('{"recipe": "a"', r"r\.jsonl:2: not a line of this record .* delete the line and run again"),
        (json.dumps({"recipe": "a", "items": "d1", "latency": {}}), r"r\.jsonl:2: a latency of 'a', whose accuracy is not in the record"),
    ],
)
def test_a_record_that_does_not_match_is_refused(tmp_path, text, message):
    path = tmp_path / "r.jsonl"
    bench.append(path, asdict(line(NONE, [True])))
    path.write_text(path.read_text() + text + "\n")
    with pytest.raises(bench.RecordError, match=message):
        bench.read(path)


# -- what it says


def test_verdicts_are_of_the_interval():
    right = np.array([1.0] * 60 + [0.0] * 40)
    worse = right * (np.arange(100) >= 20)
    assert report.Gap.of(worse, right).verdict == "worse" and report.Gap.of(right, worse).verdict == "better"
    same = report.Gap.of(right, right)
    assert same.verdict == "" and same.mean == 0 and same.low < 0 < same.high
    gap = report.Gap.of(worse, right)
    assert gap.low < gap.mean < gap.high and gap.mean == pytest.approx(-0.2)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_nothing_dominates_the_frontier(points):
    front = report.frontier(points)
    assert front
    for i in front:
        assert not any(p[0] <= points[i][0] and p[1] > points[i][1] for p in points)
    covered = [any(points[i][0] <= p[0] and points[i][1] >= p[1] for i in front) for p in points]
    assert all(covered), "every other point is dominated by one of the frontier"


def small_table() -> report.Table:
    """40 items of two slices; the method loses slice `b` where the better uniform control keeps it."""
    yes, no = [True] * 40, [True] * 20 + [False] * 20
    config = Config("drop-x", "x, clean-up", AVERAGE, 0.5, uniform=("u, clean-up", "u2, clean-up"), random=("r, clean-up",))
    control = Config("drop-uniform", "u2, clean-up", AVERAGE, 0.5, uniform=("u, clean-up",))
    absent, broken = replace(config, recipe="gone"), replace(config, recipe="bad")
    done = {NONE: line(NONE, yes), "x, clean-up": line("x, clean-up", no), "u, clean-up": line("u, clean-up", no), "u2, clean-up": line("u2, clean-up", yes),
            "r, clean-up": line("r, clean-up", no), "bad": bench.Line("bad", "d1", 40, refused="x: no such layer")}
    return report.table(done, [config, control, absent, broken], [1] * 40, ["a"] * 20 + ["b"] * 20)


def test_losers_are_named_with_the_slice_they_lose():
    found = small_table()
    row = next(r for r in found.rows if r.config.method == "drop-x")
    assert row.uniform.mean == -0.5 and row.random.mean == 0, "the better of the two uniform controls; the random one"
    assert row.worst[0] == "b" and row.worst[1].mean == -1
    text = "\n".join(report.findings(found))
    assert "Lose to uniform: `drop-x` -50.0" in text and "They lose it in `b` -100" in text
    assert found.missing == ("gone",) and found.refused[0][1] == "x: no such layer"
    assert "refused: x: no such layer" in "\n".join(report.notes(found)) and "`gone`" in "\n".join(report.notes(found))
    assert "| drop-x | 50.0% | 50.0 |" in report.line_of(found, row)
    assert "50 (" in report.slices_document(found) or "100 (" in report.slices_document(found)


def test_nothing_is_reported_without_the_unreduced_model():
    with pytest.raises(bench.RecordError, match="the unreduced model"):
        report.table({}, [], [], [])


def test_the_committed_record_is_of_these_items_and_at_its_budgets():
    done = bench.read(bench.RECORD)
    assert NONE in done and len({x.items for x in done.values()}) == 1 and len({x.n for x in done.values()}) == 1
    measured = [c for c in PLAN if c.recipe in done and done[c.recipe].right]
    assert len(measured) > 200
    for c in measured:
        executed = np.mean(done[c.recipe].visual) / TOKENS
        if c.section in (AVERAGE, RENUMBERED, ORIGINAL) and not c.notes:
            assert executed == pytest.approx(c.budget, abs=0.015), c.recipe  # whole tokens at whole layers
