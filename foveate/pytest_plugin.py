"""pytest plug-in: `pytest --foveate-gate CANDIDATE --foveate-baseline BASE --foveate-data D`, or the `foveate_gate` fixture in your own
tests.

The option adds one test per row of the verdict (overall, guards, slices), and one for latency where asked for. A row that fails fails
its test; a row
that cannot be told fails when it decides, and is skipped otherwise, with the number of items that are needed. Nothing is judged twice: the
per-item results lie in the work folder and are continued.

    def test_accuracy(foveate_gate):
        verdict = foveate_gate("build/candidate", baseline="baselines/original.jsonl", data="data/test", margin=1.0)
        assert verdict.status == "PASS", verdict.reasons
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest


class Outcome(NamedTuple):
    """What the command line printed as JSON, and its exit code."""

    status: str
    reasons: list[str]
    rows: list[dict[str, Any]]
    exit_code: int
    raw: dict[str, Any]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("foveate", "accuracy gate")
    group.addoption("--foveate-gate", metavar="CANDIDATE", help="artifact folder or results file to judge")
    group.addoption("--foveate-baseline", metavar="BASE", help="artifact folder or results file (.jsonl) to compare with")
    group.addoption("--foveate-data", metavar="DATA", help="data set; not needed for two results files")
    group.addoption("--foveate-mapping", metavar="NAME", help="how to read the data set: a preset or a YAML file")
    group.addoption("--foveate-margin", type=float, default=1.0, help="points that the candidate may lose (default 1)")
    group.addoption("--foveate-confidence", type=float, default=0.95, help="of a PASS (default 0.95)")
    group.addoption("--foveate-work", metavar="DIR", default="foveate-results", help="folder of per-item results")


@pytest.fixture
def foveate_gate() -> Callable[..., Outcome]:
    """gate(candidate, baseline=..., data=..., margin=1.0, **options): options are those of `foveate gate` with underscores."""
    return gate


def gate(candidate: str | Path, *, baseline: str | Path, data: str | Path | None = None, **options: Any) -> Outcome:
    """Run `foveate gate --json`; a wrong call or environment is a RuntimeError with its sentence."""
    from .cli import execute

    arguments = ["gate", str(candidate), "--baseline", str(baseline), "--json", "--quiet"]
    if data is not None:
        arguments += ["--data", str(data)]
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    text, problems = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(problems):
        code = execute(arguments)
    if not text.getvalue():
        raise RuntimeError(f"foveate gate ended with exit code {code}: {problems.getvalue().strip() or 'see its message above'}")
    raw = json.loads(text.getvalue())
    return Outcome(raw["status"], raw["reasons"], raw["rows"], code, raw)


# -- the tests that the option adds


def pytest_collection(session: pytest.Session) -> None:
    config = session.config
    if config.getoption("--foveate-gate") and not config.getoption("--foveate-baseline"):
        raise pytest.UsageError("--foveate-gate needs --foveate-baseline: an artifact folder or a results file")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--foveate-gate"):
        items.extend(GateFile.from_parent(session, path=config.rootpath / "foveate-gate", name="foveate-gate").collect())


class GateFile(pytest.File):
    """The rows of one verdict as tests. The gate runs when they are collected, since only the verdict knows its rows."""

    def collect(self) -> Iterator[pytest.Item]:
        get = self.config.getoption
        try:
            outcome = gate(
                get("--foveate-gate"),
                baseline=get("--foveate-baseline"),
                data=get("--foveate-data"),
                mapping=get("--foveate-mapping"),
                margin=get("--foveate-margin"),
                confidence=get("--foveate-confidence"),
                work=get("--foveate-work"),
            )
        except RuntimeError as error:
            raise pytest.UsageError(str(error)) from None
        yield VerdictItem.from_parent(self, name="verdict", outcome=outcome)
        for row in outcome.rows:
            yield RowItem.from_parent(self, name=row["name"], row=row)


class GateFailure(AssertionError):
    """A row or the verdict, in one sentence."""


class _Item(pytest.Item):
    def repr_failure(self, excinfo: Any, style: Any = None) -> Any:
        return str(excinfo.value) if isinstance(excinfo.value, GateFailure) else super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        return self.path, None, f"foveate gate: {self.name}"


class VerdictItem(_Item):
    def __init__(self, *, outcome: Outcome, **other: Any):
        super().__init__(**other)
        self.outcome = outcome

    def runtest(self) -> None:
        if self.outcome.status != "PASS":
            raise GateFailure(f"{self.outcome.status} (exit code {self.outcome.exit_code}): " + "; ".join(self.outcome.reasons))


class RowItem(_Item):
    def __init__(self, *, row: dict[str, Any], **other: Any):
        super().__init__(**other)
        self.row = row

    def runtest(self) -> None:
        r = self.row
        text = (
            f"{r['status']}: difference {100 * r['difference']:.2f} points [{100 * r['lower']:.2f}, {100 * r['upper']:.2f}], "
            f"margin {100 * r['margin']:.2f}, "
            f"n={r['n']}, lost {r['losses']}, gained {r['gains']}"
        )
        if r["status"] == "FAIL" or (r["status"] == "INCONCLUSIVE" and r["kind"] == "overall"):
            raise GateFailure(text)
        if r["status"] == "INCONCLUSIVE":
            pytest.skip(f"{text}; needs {r['needed']} items")
