"""The lmms-eval model and the VLMEvalKit class.

`[installed]` runs against the package that is installed and is skipped where it is not; `[documented]` against a stand-in with the names of its
documentation, always. Seen 2026-11-21: `[installed]` passes with lmms-eval 0.7.3. VLMEvalKit is in no registry and its import chain did not
install whole; its own vlm/base.py and smp (0.2rc1, 2026-08-18) ran our class by hand, with its dataset package replaced.
"""

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
    """A module with the documented names, in place of the package if there is one."""
    parts = name.split(".")
    for k in range(1, len(parts) + 1):
        path = ".".join(parts[:k])
        if not isinstance(getattr(sys.modules.get(path), "stand_in", None), bool):
            module = types.ModuleType(path)
            module.__path__, module.stand_in = [], True
            monkeypatch.setitem(sys.modules, path, module)
            if k > 1:
                setattr(sys.modules[".".join(parts[: k - 1])], parts[k - 1], module)
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


def installed(name):
    """The real package must be there and importable."""
    pytest.importorskip(name, reason=f"{name.split('.')[0]} is not installed", exc_type=ImportError)


@pytest.fixture(params=["installed", "documented"])
def lmms_eval(request, monkeypatch):
    """Our plug-in over the package or its stand-in"""

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

    if request.param == "installed":
        installed("lmms_eval.api.model")
    else:
        stand_in(monkeypatch, "lmms_eval.api.model", lmms=Lmms)
        stand_in(monkeypatch, "lmms_eval.models.registry_v2", ModelManifest=ModelManifest)
    monkeypatch.delitem(sys.modules, "foveate.runtime.lmms_eval_model", raising=False)
    plugin = importlib.import_module("foveate.runtime.lmms_eval_model")
    yield plugin
    sys.modules.pop("foveate.runtime.lmms_eval_model", None)


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


def test_lmms_evals_registry_finds_the_model(monkeypatch):
    """By the entry point that pyproject.toml declares: load, resolve, validate as lmms-eval does."""
    installed("lmms_eval.models.registry_v2")
    from importlib.metadata import EntryPoint

    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    point = EntryPoint("foveate", "foveate.runtime.lmms_eval_model:manifest", "lmms_eval.models")
    monkeypatch.setattr(ModelRegistryV2, "_select_entry_points", lambda self, group: [point] if group == "lmms_eval.models" else [])
    registry.load_entrypoint_manifests()
    model = registry.get_model_class("foveate").create_from_arg_string("pretrained=x,max_new_tokens=8", {"batch_size": 2, "device": None})
    assert model.batch_size == 2 and model.rank == 0 and model.world_size == 1
    from lmms_eval.api.instance import Instance

    def messages(doc):
        return [{"role": "user", "content": [{"type": "image", "url": Image.new("RGB", (8, 8), (10, 0, 0))}, {"type": "text", "text": "what is this ?"}]}]

    model.task_dict = {"toy": {"test": [{}]}}
    arguments = ("context", messages, {"until": ["\n\n"], "max_new_tokens": 16, "temperature": 0, "top_p": None, "num_beams": 1}, 0, "toy", "test")
    asked = Instance("generate_until", arguments, idx=0, metadata={"task": "toy", "doc_id": 0, "repeats": 1})
    assert model.generate_until([asked]) == ["is this and ? w10"]
    model.clean()


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


@pytest.mark.parametrize("package", ["installed", "documented"])
def test_vlmevalkit(package, monkeypatch, tmp_path):
    class BaseModel:
        def generate(self, message, dataset=None):
            return self.generate_inner(message, dataset)

    if package == "installed":
        installed("vlmeval.vlm.base")
    else:
        stand_in(monkeypatch, "vlmeval.vlm.base", BaseModel=BaseModel)
    if package == "documented" or not importable("vlmeval.config"):  # the real one imports the code of every model it knows
        stand_in_config(monkeypatch, package)
    monkeypatch.delitem(sys.modules, "foveate.runtime.vlmevalkit_model", raising=False)
    plugin = importlib.import_module("foveate.runtime.vlmevalkit_model")
    monkeypatch.delitem(sys.modules, "foveate.runtime.vlmevalkit_model")
    plugin.register("mine", "x", max_new_tokens=8)
    from vlmeval import config

    model = config.supported_VLM["mine"]()
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 8), (10, 0, 0)).save(path)
    assert (
        model.generate([{"type": "image", "value": str(path)}, {"type": "text", "value": "what is this ?"}], dataset="MMBench")
        == "is this and ? w10"
    )
    with pytest.raises(RunError, match="MMBench has video input"):
        model.generate_inner([{"type": "video", "value": "x"}], "MMBench")
    with pytest.raises(RunError, match="already has a model 'mine'"):
        plugin.register("mine", "x")


def importable(name):
    try:
        importlib.import_module(name)
    except Exception:  # whatever the code of some model raises
        return False
    return True


def stand_in_config(monkeypatch, package):
    if package == "documented":
        stand_in(monkeypatch, "vlmeval.config", supported_VLM={})
        return
    module = types.ModuleType("vlmeval.config")
    module.supported_VLM = {}
    monkeypatch.setitem(sys.modules, "vlmeval.config", module)
    monkeypatch.setattr(sys.modules["vlmeval"], "config", module, raising=False)


def test_the_entry_points_exist():
    import tomllib
    from pathlib import Path

    points = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]["entry-points"]
    assert points["lmms_eval.models"]["foveate"] == "foveate.runtime.lmms_eval_model:manifest"
    assert points["pytest11"]["foveate"] == "foveate.pytest_plugin"
