"""The lmms-eval model and the VLMEvalKit class: against the installed packages where they are, else against their documented interface."""

import importlib
import sys
import types
from dataclasses import dataclass

import pytest
from fakes import Engine, Processor, manifest
from PIL import Image

from foveate.runtime import session as session_module
from foveate.runtime.errors import RunError
from foveate.runtime.session import Session


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setattr(session_module, "load", lambda path: Session(Engine(), Processor(), manifest()))


def stand_in(monkeypatch, name, **content):
    """A module with the documented names, unless the package is installed."""
    parts = name.split(".")
    try:
        importlib.import_module(name)
        return
    except ImportError:
        pass
    for k in range(1, len(parts) + 1):
        path = ".".join(parts[:k])
        if path not in sys.modules:
            module = types.ModuleType(path)
            module.__path__ = []
            monkeypatch.setitem(sys.modules, path, module)
            if k > 1:
                setattr(sys.modules[".".join(parts[: k - 1])], parts[k - 1], module)
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


@pytest.fixture
def lmms_eval(monkeypatch):
    class Lmms:
        is_simple = True

        def __init__(self):
            self.task_dict = {}

    @dataclass(frozen=True)
    class ModelManifest:
        model_id: str
        simple_class_path: str | None = None
        chat_class_path: str | None = None
        aliases: tuple = ()

    stand_in(monkeypatch, "lmms_eval.api.model", lmms=Lmms)
    stand_in(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=ModelManifest)
    monkeypatch.delitem(sys.modules, "foveate.runtime.lmms_eval_model", raising=False)
    return importlib.import_module("foveate.runtime.lmms_eval_model")


def request(doc, task="toy", **options):
    def messages(document):
        return [
            {
                "role": "user",
                "content": [
                    {"type": document.get("kind", "image"), "url": Image.new("RGB", (8, 8), (document["red"], 0, 0))},
                    {"type": "text", "text": "what is this ?"},
                ],
            }
        ]

    return types.SimpleNamespace(args=("context", messages, options, doc, task, "test"))


def test_lmms_eval(lmms_eval):
    model = lmms_eval.Foveate(pretrained="x", batch_size=2, max_new_tokens=8)
    model.task_dict = {"toy": {"test": [{"red": 10}, {"red": 20}, {"red": 30}, {"red": 10, "kind": "video"}]}}
    got = model.generate_until(
        [request(0, temperature=0), request(1, temperature=0, until=["?"]), request(2, temperature=0), request(0, max_new_tokens=1)]
    )
    assert got == ["is this and ? w10", "this and", "and ? w10", "is"]
    with pytest.raises(RunError, match="task toy has video input"):
        model.generate_until([request(3)])
    with pytest.raises(RunError, match="log-likelihood tasks are not supported"):
        model.loglikelihood([])
    with pytest.raises(RunError, match=r"unknown model_args \['colour'\]"):
        lmms_eval.Foveate(pretrained="x", colour=1)
    found = lmms_eval.manifest()
    module, name = found.chat_class_path.rsplit(".", 1)
    assert found.model_id == "foveate" and getattr(importlib.import_module(module), name).is_simple is False


def test_vlmevalkit(monkeypatch, tmp_path):
    class BaseModel:
        pass

    stand_in(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseModel)
    stand_in(monkeypatch, "vlmeval.config", supported_VLM={})
    monkeypatch.delitem(sys.modules, "foveate.runtime.vlmevalkit_model", raising=False)
    plugin = importlib.import_module("foveate.runtime.vlmevalkit_model")
    plugin.register("mine", "x", max_new_tokens=8)
    from vlmeval import config

    model = config.supported_VLM["mine"]()
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), (10, 0, 0)).save(path)
    assert (
        model.generate_inner([{"type": "image", "value": str(path)}, {"type": "text", "value": "what is this ?"}], dataset="MMBench")
        == "is this and ? w10"
    )
    with pytest.raises(RunError, match="MMBench has video input"):
        model.generate_inner([{"type": "video", "value": "x"}], "MMBench")
    with pytest.raises(RunError, match="already has a model 'mine'"):
        plugin.register("mine", "x")


def test_the_entry_points_exist():
    import tomllib
    from pathlib import Path

    points = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["lmms_eval.models"]["foveate"] == "foveate.runtime.lmms_eval_model:manifest"
    assert points["pytest11"]["foveate"] == "foveate.pytest_plugin"
