"""The catalogue of passes, read from the classes: what each does, where, with which parameters, and when its counts are known."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .base import Pass, discover


def catalogue() -> list[dict[str, Any]]:
    """One row per pass, by name: name, place, shapes, parameters (with defaults, or "required"), paper, what."""
    return [{"name": name, "place": cls.place, "shapes": cls.shapes, "parameters": parameters(cls), "paper": cls.paper, "what": summary(cls)}
            for name, cls in discover().items()]


def parameters(cls: type[Pass]) -> dict[str, Any]:
    """name -> default"""
    return {f.name: "required" if f.default is MISSING and f.default_factory is MISSING else
            (f.default if f.default_factory is MISSING else f.default_factory()) for f in fields(cls)}


def summary(cls: type[Pass]) -> str:
    """The first sentence of the module: a method is a file."""
    doc = inspect.getdoc(inspect.getmodule(cls)) or ""
    return " ".join(doc.partition("\n\n")[0].split())


def lines(cls: type[Pass]) -> int:
    """How long the method's file is."""
    return len(Path(inspect.getfile(cls)).read_text(encoding="utf-8").splitlines())
