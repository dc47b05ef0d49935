"""A verdict for other programs: JUnit XML, a GitHub step summary and annotations, the JSON that github-action-benchmark reads, text
for a terminal.
"""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree

from .agreement import Agreement
from .gate import Row, Status, Verdict, points

MARKS = {Status.PASS: "✅", Status.FAIL: "❌", Status.INCONCLUSIVE: "❔"}


def decides(verdict: Verdict, row: Row) -> bool:
    """Whether a row that is not PASS keeps the verdict from PASS."""
    if row.status is Status.FAIL:
        return row.kind == "overall" or verdict.rule.slices != "report"
    return row.status is Status.INCONCLUSIVE and (row.kind == "overall" or verdict.rule.slices == "strict")


def junit(verdict: Verdict, name: str = "foveate.gate") -> str:
    """One case per metric and slice.

    FAIL is a failure, a deciding INCONCLUSIVE an error, another INCONCLUSIVE is skipped: no case hides.
    """
    suite = ElementTree.Element("testsuite", name=name)
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}

    def case(kind: str, title: str, status: Status, deciding: bool, text: str) -> None:
        element = ElementTree.SubElement(suite, "testcase", classname=f"{name}.{kind}", name=title)
        counts["tests"] += 1
        tag = {
            Status.PASS: None,
            Status.FAIL: "failure" if deciding else "skipped",
            Status.INCONCLUSIVE: "error" if deciding else "skipped",
        }[status]
        if tag:
            counts[{"failure": "failures", "error": "errors", "skipped": "skipped"}[tag]] += 1
            ElementTree.SubElement(element, tag, message=f"{status.value}: {text}")
        ElementTree.SubElement(element, "system-out").text = text

    for row in verdict.rows:
        case(row.metric, row.name, row.status, decides(verdict, row), line(row))
    for x in verdict.latency:
        asked = verdict.rule.max_latency_ratio is not None
        case("latency", x.name, x.status, asked, f"ratio {x.ratio:.3f} [{x.lower:.3f}, {x.upper:.3f}], limit {x.limit}")
    for key, value in counts.items():
        suite.set(key, str(value))
    root = ElementTree.Element("testsuites")
    root.append(suite)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def line(row: Row) -> str:
    return (
        f"baseline {points(row.baseline)}, candidate {points(row.candidate)}, difference {points(row.difference)} "
        f"[{points(row.lower)}, {points(row.upper)}], "
        f"margin {points(row.margin)}, n {row.n}, gained {row.gains}, lost {row.losses}"
    )


def markdown(verdict: Verdict, agreement: Agreement | None = None, title: str = "foveate gate") -> str:
    """A GitHub step summary: the verdict, why, and the table, worst first."""
    rule = verdict.rule
    out = [
        f"## {MARKS[verdict.status]} {title}: {verdict.status.value}",
        "",
        *(f"- {r}" for r in verdict.reasons),
        "",
        "| slice | metric | n | baseline | candidate | difference | interval | gained / lost | verdict |",
        "|---|---|--:|--:|--:|--:|--:|--:|---|",
    ]
    out += [
        f"| {_cell(r.name)} | {r.metric} | {r.n} | {points(r.baseline)} | {points(r.candidate)} | {points(r.difference)} | "
        f"{points(r.lower)} … {points(r.upper)} | {r.gains} / {r.losses} | "
        f"{MARKS[r.status]} {r.status.value} |"
        for r in verdict.rows
    ]
    out += ["", f"Points of the score; each end of an interval is for {rule.confidence:.0%} confidence; margin {points(rule.margin)}."]
    if verdict.missing_guards:
        out.append(f"The data has no items for the guards {', '.join(verdict.missing_guards)}.")
    if verdict.latency:
        out += [
            "",
            "| stage | ratio to baseline | interval | pairs |",
            "|---|--:|--:|--:|",
            *(f"| {x.name} | {x.ratio:.3f} | {x.lower:.3f} … {x.upper:.3f} | {x.repetitions} |" for x in verdict.latency),
        ]
    if agreement:
        out += ["", _agreement(agreement)]
    return "\n".join(out) + "\n"


def _agreement(a: Agreement) -> str:
    parts = [f"equal answers {a.same_answers:.1%}"]
    parts += (
        [f"equal first tokens {a.same_first_token:.1%}, first-token KL {a.first_token_kl:.4f} (p99 {a.first_token_kl_p99:.4f})"]
        if a.first_token_kl is not None
        else []
    )
    parts += [f"log-likelihood gap {a.likelihood_gap:.4f} per token"] if a.likelihood_gap is not None else []
    return f"Agreement with the baseline on {a.items} items: {', '.join(parts)}."


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def annotations(verdict: Verdict) -> list[str]:
    """GitHub workflow commands: an error per reason of a FAIL, a warning per reason of an INCONCLUSIVE."""
    if verdict.status is Status.PASS:
        return [f"::notice title=foveate gate PASS::{_escape(verdict.reasons[0])}"]
    level = "error" if verdict.status is Status.FAIL else "warning"
    return [f"::{level} title=foveate gate {verdict.status.value}::{_escape(r)}" for r in verdict.reasons]


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def metrics_json(verdict: Verdict, agreement: Agreement | None = None) -> str:
    """github-action-benchmark's custom format (customBiggerIsBetter for the scores.

    Latency ratios are given as speed-up for that reason).
    """
    rows: list[dict[str, Any]] = [
        {
            "name": f"{r.name} ({r.metric})",
            "unit": "points",
            "value": round(100 * r.candidate, 4),
            "range": f"{points(r.lower)} … {points(r.upper)} against the baseline",
            "extra": line(r),
        }
        for r in verdict.rows
    ]
    rows += [
        {"name": f"speed-up {x.name}", "unit": "x", "value": round(1 / x.ratio, 4), "range": f"{1 / x.upper:.3f} … {1 / x.lower:.3f}"}
        for x in verdict.latency
    ]
    if agreement:
        rows.append({"name": "equal answers", "unit": "%", "value": round(100 * agreement.same_answers, 3)})
    return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"


def text(verdict: Verdict, agreement: Agreement | None = None) -> str:
    """For a terminal: the table, the reasons, the verdict last."""
    head = ("", "metric", "n", "baseline", "candidate", "difference", "interval", "gained/lost", "verdict")
    rows = [
        head,
        *(
            (
                r.name,
                r.metric,
                str(r.n),
                points(r.baseline),
                points(r.candidate),
                points(r.difference),
                f"{points(r.lower)} .. {points(r.upper)}",
                f"{r.gains}/{r.losses}",
                r.status.value,
            )
            for r in verdict.rows
        ),
    ]
    widths = [max(len(r[k]) for r in rows) for k in range(len(head))]
    out = [
        "  ".join(c.ljust(w) if k in (0, 1, 8) else c.rjust(w) for k, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
        for r in rows
    ]
    out += [
        f"latency {x.name}: {x.ratio:.3f} of the baseline [{x.lower:.3f}, {x.upper:.3f}], {x.repetitions} pairs" for x in verdict.latency
    ]
    out += [_agreement(agreement)] if agreement else []
    out += [f"no items for the guards: {', '.join(verdict.missing_guards)}"] if verdict.missing_guards else []
    return "\n".join([*out, *verdict.reasons, f"{verdict.status.value} (exit code {verdict.exit_code})"])
