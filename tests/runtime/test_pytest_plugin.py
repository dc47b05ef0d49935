"""The plug-in in a pytest of its own: what passes, what fails, what is skipped, and wrong usage."""

import subprocess
import sys
from pathlib import Path

import pytest

from foveate.runtime.results import Result, write

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    def results(name, lost):
        records = [
            Result(f"i{k}", "d", "read" if k < 500 else "color", "exact", ("x",), (1.0,), 0.0 if k < lost else 1.0) for k in range(540)
        ]
        write(tmp_path / f"{name}.jsonl", {"foveate_results": 1, "name": name}, records)

    results("base", 0)
    results("same", 0)
    results("bad", 200)
    return tmp_path


def pytest_in(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-p", "foveate.pytest_plugin", "-rA", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    return done.returncode, done.stdout + done.stderr


def test_option(folder):
    code, text = pytest_in(folder, "--foveate-gate", "same.jsonl", "--foveate-baseline", "base.jsonl")
    assert code == 0 and "3 passed, 1 skipped" in text and "needs" in text, text  # 40 items of one slice cannot be told
    code, text = pytest_in(folder, "--foveate-gate", "bad.jsonl", "--foveate-baseline", "base.jsonl")
    assert code == 1 and "FAIL (exit code 1): overall: worse by 37.04 points" in text and "Traceback" not in text, text


def test_fixture(folder):
    (folder / "test_mine.py").write_text(
        "def test_good(foveate_gate):\n    assert foveate_gate('same.jsonl', baseline='base.jsonl').status == 'PASS'\n"
        "def test_bad(foveate_gate):\n    v = foveate_gate('bad.jsonl', baseline='base.jsonl', margin=2)\n    assert v.status "
        "== 'FAIL' and v.exit_code == 1\n"
    )
    code, text = pytest_in(folder, "test_mine.py")
    assert code == 0 and "2 passed" in text, text


def test_wrong_usage(folder):
    code, text = pytest_in(folder, "--foveate-gate", "same.jsonl")
    assert code == 4 and "needs --foveate-baseline" in text
    code, text = pytest_in(folder, "--foveate-gate", "nothing.jsonl", "--foveate-baseline", "base.jsonl")
    assert code == 4 and "exit code 2" in text and "candidate nothing.jsonl is neither" in text, text
