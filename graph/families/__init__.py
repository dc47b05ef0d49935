"""Model families: one small file each, found by discovery. The only folder that imports transformers.

    family_of(model)      the adapter of a loaded model; an unknown or text-only model is an error that names what exists
    load_model(path)      model and processor from a folder or hub id

Add a family: one file with a `@register class X(Family)`; base.py says what may be overridden. `foveate.load_plugin` takes such
files from anywhere.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from ..errors import GraphError
from .base import REGISTRY, Family, register

for _module in pkgutil.iter_modules(__path__):
    if not _module.name.startswith("_"):
        importlib.import_module(f"{__name__}.{_module.name}")

from ._load import load_model  # noqa: E402  (after the adapters: its errors name them)

__all__ = ["REGISTRY", "Family", "family_of", "load_model", "register"]


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
