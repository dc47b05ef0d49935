"""The catalogue of methods: every one says where it works, when its counts are known, what its two modes are; and is a small file."""

import inspect
import json
import statistics

import pytest
from typer.testing import CliRunner

from foveate.cli import app
from foveate.passes.base import PASSES, SHAPES, discover
from foveate.passes.catalogue import catalogue, lines, parameters, summary
from foveate.passes.reduce import Reduce
from foveate.passes.vision_select import VisionReduce

PLACES = {"vision", "tower", "llm", "cache", "graph"}
FOUND = {n: p for n, p in discover().items() if p.__module__.startswith("foveate.")}
REDUCING = {n: p for n, p in FOUND.items() if issubclass(p, (Reduce, VisionReduce)) or p.place == "tower"}


def test_json_names_place_shapes_parameters_and_paper_of_every_pass():
    result = CliRunner().invoke(app, ["passes", "--json"])
    rows = {r["name"]: r for r in json.loads(result.stdout)}
    assert result.exit_code == 0 and set(rows) == set(PASSES)
    assert rows["drop-fastv"] == {"name": "drop-fastv", "place": "llm", "shapes": "fixed", "parameters": {"layer": 2, "keep": 0.5, "per_image": False},
                                  "paper": "arXiv:2403.06764",
                                  "what": "FastV: after layer k - 1, the last token's attention says which visual tokens matter."}
    assert rows["prune-hired"]["shapes"] == "split" and rows["drop-zip-vl"]["shapes"] == "bound" and rows["merge-tome"]["place"] == "tower"


def test_the_table_explains_its_words():
    shown = CliRunner().invoke(app, ["passes"]).stdout
    assert "drop-fastv" in shown and all(f"counts {w}: " in shown for w in SHAPES if w)


@pytest.mark.parametrize("name", FOUND)
def test_every_pass_has_a_card(name):
    cls = FOUND[name]
    assert cls.place in PLACES and cls.shapes in SHAPES
    assert summary(cls).endswith(".") and "\n" not in summary(cls)
    assert all(p in {r["name"]: r for r in catalogue()}[name]["parameters"] for p in parameters(cls))


@pytest.mark.parametrize("name", REDUCING)
def test_what_drops_tokens_says_where_and_when_its_counts_are_known(name):
    assert REDUCING[name].place in {"vision", "tower", "llm"} and REDUCING[name].shapes
    assert REDUCING[name].paper.startswith("arXiv:") or name.endswith(("-random", "-uniform")), "a method has a paper; controls have none"


@pytest.mark.parametrize("name", [n for n, p in REDUCING.items() if p.paper])
def test_both_modes_are_documented(name):
    """Either `mode` with what differs in each, or one sentence why one mode is both."""
    doc, modes = inspect.getdoc(REDUCING[name]), "mode" in parameters(REDUCING[name])
    if modes:
        assert "fixed:" in doc or "fixed " in doc, name
        assert "parity:" in doc or "parity " in doc, name
    else:
        assert "One mode:" in doc, name


def test_method_files_are_small():
    sizes = {n: lines(p) for n, p in REDUCING.items()}
    assert statistics.median(sizes.values()) <= 60, sorted(sizes.items(), key=lambda s: -s[1])
    at_vision = [s for n, s in sizes.items() if REDUCING[n].place != "llm"]
    assert statistics.median(at_vision) <= 60, sorted(at_vision)
