"""The judge on the trained testbed: exit codes of real artifacts, and bugs planted in real graphs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from foveate.cli import execute

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "examples" / "testbed" / "checkpoint"
pytestmark = pytest.mark.skipif(not (CHECKPOINT / "model.safetensors").is_file(), reason="examples/testbed/checkpoint is not in this tree")
ITEMS = 304  # sixteen of every slice; identity needs 285 to pass at a margin of one point

# Passes that do what a bug would: positions of the decode stage that ignore a drop, a cache that is scaled on its way in, and an encoder whose
# values are widened and narrowed again, which float32 does not feel and float16 cannot hold.
PLANTED = '''
"""Bugs for the bisection to find."""

from dataclasses import dataclass

import torch

from ..base import Pass


@dataclass(frozen=True)
class WrongPositions(Pass):
    """decode: position_ids -> position_ids + by"""

    by: int = 40
    name = "wrong-positions"

    def run(self, program):
        stage = program["decode"]
        node = stage.placeholder("position_ids")
        readers = list(node.users)
        with stage.graph.inserting_after(node):
            shifted = stage.graph.call_function(torch.ops.aten.add.Tensor, (node, self.by))
        shifted.meta["val"] = node.meta["val"] + self.by
        for reader in readers:
            reader.replace_input_with(node, shifted)
        stage.module.recompile()
        return True


@dataclass(frozen=True)
class WrongScale(Pass):
    """decode: every past_v -> past_v * by"""

    by: float = -1.0
    name = "wrong-scale"

    def run(self, program):
        stage = program["decode"]
        for node in [n for n in stage.graph.nodes if n.op == "placeholder" and str(n.meta.get("name", "")).startswith("past_v.")]:
            readers = list(node.users)
            with stage.graph.inserting_after(node):
                scaled = stage.graph.call_function(torch.ops.aten.mul.Tensor, (node, self.by))
            scaled.meta["val"] = node.meta["val"] * self.by
            for reader in readers:
                reader.replace_input_with(node, scaled)
        stage.module.recompile()
        return True


@dataclass(frozen=True)
class WideEncoder(Pass):
    """vision: linear of one layer -> linear * by / by"""

    by: float = 1e5
    name = "wide-encoder"

    def run(self, program):
        stage = program["vision"]
        node = [n for n in stage.graph.nodes if n.target is torch.ops.aten.linear.default][6]
        last = node
        for factor in (self.by, 1 / self.by):
            with stage.graph.inserting_after(last):
                made = stage.graph.call_function(torch.ops.aten.mul.Tensor, (last, factor))
            made.meta["val"] = node.meta["val"] * factor
            last = made
        first = last.args[0]
        for reader in [r for r in node.users if r is not first]:
            reader.replace_input_with(node, last)
        stage.module.recompile()
        return True
'''


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with data, the original as an artifact, and a plugin file."""
    folder = tmp_path_factory.mktemp("testbed")
    command = [sys.executable, "examples/testbed/make_data.py", "--split", "val", "--out", str(folder / "data"), "--limit", str(ITEMS)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (folder / "planted.py").write_text(PLANTED)
    assert execute(["optimize", str(CHECKPOINT), "-o", str(folder / "original"), "-q"]) == 0
    return folder


def gate(work, name, recipe=None):
    """(exit code, verdict) of a recipe against the original."""
    if recipe:
        assert execute(["optimize", str(CHECKPOINT), "-o", str(work / name), "-r", recipe, "-q"]) == 0
    out = work / f"{name}.xml"
    code = execute(
        [
            "gate",
            str(work / name),
            "-b",
            str(work / "original"),
            "-d",
            str(work / "data"),
            "--batch",
            "16",
            "--work",
            str(work / "results"),
            "-q",
            "--junit",
            str(out),
        ]
    )
    return code, out.read_text()


def test_identity_passes(work):
    assert gate(work, "original")[0] == 0


def test_dropping_nine_tenths_at_random_fails(work):
    code, junit = gate(work, "random", "drop-random{layer=2,keep=14}")
    assert code == 1 and "worse by" not in junit and "FAIL" in junit


def test_a_mild_recipe_passes_or_cannot_be_told(work, capsys):
    code, _ = gate(work, "mild", "drop-fastv{layer=6,keep=72}")
    assert code in (0, 4)
    if code == 4:
        assert "more items" in capsys.readouterr().out


def test_a_killed_gate_goes_on_to_the_same_numbers(work, capsys):
    """The log of a run is cut in the middle of a line; the verdict and its numbers are those of the whole run."""
    command = [
        "gate",
        str(work / "original"),
        "-b",
        str(work / "original"),
        "-d",
        str(work / "data"),
        "--batch",
        "16",
        "--limit",
        "64",
        "--work",
        str(work / "cut"),
        "-q",
        "--json",
    ]
    execute(command)
    first = capsys.readouterr().out
    (log,) = (work / "cut").glob("*.jsonl")
    whole = [{k: v for k, v in json.loads(line).items() if k != "ms"} for line in log.read_text().splitlines()]
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    execute(command)
    assert capsys.readouterr().out == first
    assert [{k: v for k, v in json.loads(line).items() if k != "ms"} for line in log.read_text().splitlines()] == whole


@pytest.mark.parametrize(
    ("recipe", "culprit", "tensor"),
    [
        ("drop-fastv{layer=6,keep=72}", None, None),
        ("drop-fastv{layer=6,keep=72}, wrong-positions", "2: wrong-positions", "decode.1.logits"),
        ("drop-fastv{layer=6,keep=72}, wrong-scale", "2: wrong-scale", "decode.1.logits"),
        ("drop-fastv{layer=6,keep=72}, wide-encoder", "float16 (torch)", "vision.image_features"),
    ],
)
def test_bisect_names_the_planted_pass(work, recipe, culprit, tensor, capsys):
    plugin = str(work / "planted.py")
    path = work / f"planted-{culprit}".replace(": ", "-").replace(" ", "-")
    half = ["-t", "eager", "--option", "precision=float16", "--no-golden"] if "wide" in recipe else []
    assert execute(["optimize", str(CHECKPOINT), "-o", str(path), "-r", recipe, "--plugin", plugin, "-q", *half]) == 0
    capsys.readouterr()
    data = work / "long"  # answers of several tokens: only they pass through decode
    data.mkdir(exist_ok=True)
    lines = [
        line
        for line in (work / "data" / "items.jsonl").read_text().splitlines()
        if json.loads(line)["slice"] in ("describe", "vtc_retrieve", "where")
    ]
    (data / "items.jsonl").write_text("\n".join(lines).replace('"images/', '"../data/images/'))
    code = execute(["bisect", str(path), "-m", str(CHECKPOINT), "-d", str(data), "--limit", "12" if not half else "4", "--plugin", plugin, "--json", "-q"])
    found = json.loads(capsys.readouterr().out)["culprit"]
    assert code == (0 if culprit is None else 1)
    assert (found and found["name"]) == culprit and (found and found["tensor"]) == tensor
    assert not half or ("NaN or infinite" in found["reason"] and found["operation"].startswith("mul"))
