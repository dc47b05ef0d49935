"""RTX engines of methods: a few here, all by `python -m benchmarks.rtx_methods`; the committed record says which were built."""

import json

import pytest

from benchmarks import rtx_insertions, rtx_methods
from foveate.passes.base import make


@pytest.fixture(scope="module")
def program():
    return rtx_methods.tiny()


@pytest.mark.rtx
@pytest.mark.parametrize("name", ["merge-visionzip", "merge-must-drop", "prune-hired"])  # merging, inside the tower, quotas; cuts: test_trt_spelling
def test_engines_are_built_for_the_stage_that_a_method_rewrites(program, name):
    row = rtx_methods.build(program, name)
    assert row["built"] and row["stage"] == "vision" and row["megabytes"] > 0.1, row


@pytest.mark.rtx
def test_an_engine_is_built_where_tokens_bypass_a_layer(program):
    """The length stays, the rows are gathered: what the builder's check `is_const()` failed on before the last row was doubled."""
    row = rtx_methods.build(program, "bypass-mod")
    assert row["built"] and row["stage"] == "prefill", row


@pytest.mark.rtx
@pytest.mark.parametrize("name", ["exit-router", "context-registers"])  # the data decide what leaves; a second length, and an encoder
def test_engines_are_built_of_insertions(name):
    row = rtx_insertions.build(name)
    assert row["built"] and row["stages"] == ["prefill"], row


def test_every_method_is_fitted_to_the_small_model():
    for name in rtx_methods.methods():
        assert rtx_methods.fitted(name).name == name
    assert {"drop-fastv", "merge-tome", "prune-hired"} <= set(rtx_methods.methods()) and "clean-up" not in rtx_methods.methods()


def test_a_builder_that_crashes_is_a_row(monkeypatch):
    """What the process of one method ends with is in the record, be it a signal or a last line."""

    def ended(code, told=""):
        return lambda *a, **k: type("Done", (), {"returncode": code, "stdout": "", "stderr": told})()

    monkeypatch.setattr(rtx_methods.subprocess, "run", ended(-11))
    assert rtx_methods.apart("drop-fastv")["error"] == "the builder's process ended with SIGSEGV"
    monkeypatch.setattr(rtx_methods.subprocess, "run", ended(1, "Traceback\nValueError: no\n"))
    assert rtx_methods.apart("drop-fastv")["error"] == "the builder's process ended with ValueError: no"


def test_the_record_is_of_methods_that_there_are():
    rows = json.loads(rtx_methods.RECORD.read_text())["methods"]
    assert {r["method"] for r in rows} <= set(rtx_methods.methods())
    assert sum(r["built"] for r in rows) >= 0.8 * len(rows)
    assert all(r["built"] or r["error"] for r in rows)
    assert make("drop-fastv")
