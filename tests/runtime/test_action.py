"""action.yml: the script of its gate step is run as GitHub would, on saved results."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from foveate.runtime.results import Result, write

ROOT = Path(__file__).resolve().parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())


def results(path, lost, n):
    write(
        path,
        {"foveate_results": 1, "name": path.stem},
        [Result(f"i{k}", "d", "read", "exact", ("x",), (1.0,), float(k >= lost)) for k in range(n)],
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="composite actions run in bash")
@pytest.mark.parametrize(
    ("lost", "n", "on_inconclusive", "status", "code"),
    [(0, 500, "fail", "PASS", 0), (90, 500, "fail", "FAIL", 1), (0, 60, "fail", "INCONCLUSIVE", 4), (0, 60, "warn", "INCONCLUSIVE", 0)],
)
def test_the_gate_step(tmp_path, lost, n, on_inconclusive, status, code):
    results(tmp_path / "base.jsonl", 0, n)
    results(tmp_path / "cand.jsonl", lost, n)
    step = next(s for s in ACTION["runs"]["steps"] if s.get("id") == "gate")
    given = {k: v.get("default", "") for k, v in ACTION["inputs"].items()} | {
        "candidate": "cand.jsonl",
        "baseline": "base.jsonl",
        "inconclusive": on_inconclusive,
    }
    values = {name: given[text.strip("${ }").removeprefix("inputs.")] for name, text in step["env"].items()}
    path = os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"])
    env = {
        **values,
        "PATH": path,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "GITHUB_OUTPUT": str(tmp_path / "out"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "step.md"),
        "GITHUB_ACTIONS": "true",
    }
    done = subprocess.run(
        ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", step["run"]], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    assert f"status={status}" in (tmp_path / "out").read_text() and status in (tmp_path / "step.md").read_text()
    for name in ("junit.xml", "metrics.json", "summary.md", "report.html"):
        assert (tmp_path / given["output"] / name).stat().st_size > 100


def test_inputs_are_used_and_untrusted_text_stays_out_of_the_script():
    text = (ROOT / "action.yml").read_text()
    for name in ACTION["inputs"]:
        assert f"inputs.{name}" in text, name
    assert all("${{" not in s["run"] for s in ACTION["runs"]["steps"]), "inputs reach scripts through the environment only"
