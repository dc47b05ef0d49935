"""Fixtures that every folder uses, and `--update-golden`."""

import os
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported, which tests of the kernels and torch.export both do

import helpers
import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write the golden files instead of comparing with them")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def toy():
    """A fresh toy program of three layers."""
    return helpers.toy()


@pytest.fixture
def golden(request):
    """golden(name, text): equals tests/golden/<name>.txt, or writes it under --update-golden."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--update-golden"):
            path.write_text(text + "\n", encoding="utf-8")
        assert path.is_file(), f"no golden file {path.name}; run pytest --update-golden and read what it wrote"
        assert text + "\n" == path.read_text(encoding="utf-8"), f"{path.name} differs; if that is right, run pytest --update-golden"

    return check
