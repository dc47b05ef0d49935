"""A toy method, a toy target and a toy family: one new file each, from a folder outside the package, through the public entry points.

Each runs in a process of its own, so that nothing toy stays registered for other tests.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import tiny_llava
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

METHOD = '''
"""Keep the visual tokens that come last."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..select import Keep, Select


@dataclass(frozen=True)
class DropEarly(Select):
    """Keep the last visual tokens in reading order."""

    name: ClassVar[str] = "drop-early"
    layer: int = 1
    keep: Keep = 0.5

    def score(self, visual_index: Tensor) -> Tensor:
        return visual_index.float()
'''

TARGET = '''
"""A target that stores the graphs as the eager one does and says who made them."""

from foveate.export.backends.eager import Eager


class Toy(Eager):
    name = "toy-target"

    def lower(self, program, folder, options):
        (folder / "made-by").write_text("toy")
        return super().lower(program, folder, options)
'''

FAMILY = '''
"""A model type that transformers knows from this file and foveate from its adapter."""

import transformers as T
from foveate.graph.families.base import register
from foveate.graph.families.llava import Llava


class ToyConfig(T.LlavaConfig):
    model_type = "toy_vlm"


class ToyForConditionalGeneration(T.LlavaForConditionalGeneration):
    config_class = ToyConfig


T.AutoConfig.register("toy_vlm", ToyConfig)
T.AutoModelForImageTextToText.register(ToyConfig, ToyForConditionalGeneration)


@register
class Toy(Llava):
    model_types = ("toy_vlm",)
'''


def foveate(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "foveate.cli", *[str(a) for a in arguments]]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment}, check=False)


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 40), (9, 99, 199)).save(tmp_path / "p.png")
    return tmp_path / "p.png"


def test_a_method_and_a_target_from_a_folder(tmp_path, picture):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "drop_early.py").write_text(METHOD)
    (folder / "toy_target.py").write_text(TARGET)
    made = foveate("optimize", tiny_llava(), "-o", tmp_path / "out", "-r", "drop-early{keep=3}", "-t", "toy-target", "--plugin", folder, "-q")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "out" / "made-by").read_text() == "toy"
    ran = foveate("run", tmp_path / "out", "-i", picture, "-p", "what is this ?", "--json", FOVEATE_PLUGINS=str(folder))
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["kept"]["kept.layer1"] == [[13, 14, 15]]
    without = foveate("run", tmp_path / "out", "-i", picture, "-p", "what is this ?")
    assert without.returncode == 3 and "no target 'toy-target'" in without.stderr


def test_the_environment_names_plugins_for_training_too(tmp_path):
    (tmp_path / "empty.py").write_text("x = 1")
    got = foveate("distill", tiny_llava(), "-r", "victor", "-d", tmp_path, "-o", tmp_path / "run", FOVEATE_PLUGINS=str(tmp_path / "empty.py"))
    assert got.returncode and "empty.py added nothing" in got.stderr, got.stderr


def test_a_family_from_a_file(tmp_path):
    folder = tmp_path / "toy"
    folder.mkdir()
    for file in tiny_llava().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "toy_vlm", "architectures": ["ToyForConditionalGeneration"]}))
    (tmp_path / "toy_family.py").write_text(FAMILY)
    unknown = foveate("optimize", folder, "--dry-run", "-q")
    assert unknown.returncode == 3 and "toy_vlm" in unknown.stderr
    known = foveate("optimize", folder, "--dry-run", "-q", "--json", "-r", "drop-uniform{layer=1,keep=4}", "--plugin", tmp_path / "toy_family.py")
    assert known.returncode == 0, known.stderr
    assert list(json.loads(known.stdout)["after"]["tokens"].values()) == [48, 36, 36]


@pytest.mark.parametrize(("content", "message"), [
    ("x = 1", "added nothing; it needs a Pass with a name, a Family with @register, or a Backend with a name"),
    ("import nowhere_at_all", "does not import: ModuleNotFoundError"),
])
def test_plugins_that_are_none(tmp_path, content, message):
    (tmp_path / "odd.py").write_text(content)
    done = foveate("passes", "--plugin", tmp_path / "odd.py")
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_a_file_loaded_twice_is_loaded_once(tmp_path):
    """In a process of its own; a second call says the same and another file of that name is still refused."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "drop_early.py").write_text(METHOD)
    script = f"""
import foveate
first = foveate.load_plugin({str(tmp_path / "a" / "drop_early.py")!r})
assert first["passes"] == ["drop-early"] and foveate.load_plugin({str(tmp_path / "a" / "drop_early.py")!r}) == first
try:
    foveate.load_plugin({str(tmp_path / "b" / "drop_early.py")!r})
except foveate.FoveateError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "has the name of a module that is loaded already" in done.stdout
