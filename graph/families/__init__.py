"""Model families: one small file each, found by discovery. The only folder that imports transformers.

    family_of(model)      the adapter of a loaded model; an unknown or text-only model is an error that names what exists
    load_model(path)      model and processor from a folder or hub id
    load_plugin(path)     import an adapter file from anywhere; its `@register` makes it known

Add a family: one file with a `@register class X(Family)`; base.py says what may be overridden.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from typing import Any

from ..errors import GraphError
from .base import REGISTRY, Family, register

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

from ._load import load_model  # noqa: E402  (after the adapters: its errors name them)

__all__ = ["REGISTRY", "Family", "family_of", "load_model", "load_plugin", "register"]


def family_of(model: Any) -> Family:
    """The adapter for a loaded model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "model_type"):
        raise GraphError(f"capture: {type(model).__name__} is not a Hugging Face model (it has no config.model_type)")
    if not any(hasattr(config, name) for name in ("vision_config", "vit_config")) and config.model_type not in REGISTRY:
        raise GraphError(f"capture: {config.model_type!r} is a text-only model (its config has no vision part); foveate takes vision-language models")
    try:
        adapter = REGISTRY[config.model_type]
    except KeyError:
        raise GraphError(f"capture: no family for model type {config.model_type!r}; families: {', '.join(sorted(REGISTRY))}") from None
    adapter = adapter.variant(model)
    adapter.check(model)
    return adapter


def load_plugin(path: str | Path) -> list[str]:
    """Import the adapter file at `path`; returns the model types that it added."""
    path = Path(path)
    if not path.is_file():
        raise GraphError(f"load_plugin: no file {path}")
    before = set(REGISTRY)
    name = f"foveate_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise GraphError(f"load_plugin: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    added = sorted(set(REGISTRY) - before)
    if not added:
        raise GraphError(f"load_plugin: {path.name} registered no new family (a class with @register and new model_types is needed)")
    return added
