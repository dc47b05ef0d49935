"""Recipes: YAML lists of passes, named or from a file, validated before anything runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from .base import Pass, PassError, did_you_mean, discover, make

NAMED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Step:
    """One line of a recipe."""

    rewrite: Pass
    optional: bool = False


@dataclass(frozen=True)
class Recipe:
    """Passes in order. `default` targets and options of a recipe are the caller's business, not the recipe's."""

    name: str
    steps: tuple[Step, ...]
    description: str = ""
    paper: str = ""

    def yaml(self) -> str:
        """The recipe as a file that `load` reads back to an equal recipe."""
        passes = [{s.rewrite.name: s.rewrite.parameters() | ({"optional": True} if s.optional else {})} for s in self.steps]
        return yaml.safe_dump({"name": self.name, "description": self.description, "paper": self.paper, "passes": passes}, sort_keys=False, allow_unicode=True)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = ""
    description: str = ""
    paper: str = ""
    passes: list[str | dict[str, dict[str, Any] | None]]


def load(source: str | Path | list[Any] | Recipe | None, overrides: dict[str, str] | None = None) -> Recipe:
    """A recipe from a name, a .yaml file, inline text ("drop-fastv{layer=2,keep=64}, clean-up"), a list of steps, or none (no reduction).

    overrides: {"keep": "32", "drop-fastv.layer": "3"}; a bare key must fit exactly one pass. Anything unknown is a PassError with the nearest known word.
    """
    if isinstance(source, Recipe):
        recipe = source
    elif source is None or source == "none":
        recipe = Recipe("none", ())
    elif isinstance(source, list):
        recipe = _build(_File(passes=source), "inline")
    else:
        recipe = _from_text(str(source))
    return _override(recipe, overrides or {})


def names() -> list[str]:
    """The named recipes that ship with the package."""
    return sorted(f.stem for f in NAMED.glob("*.yaml"))


def _from_text(text: str) -> Recipe:
    if text in names():
        return _read(NAMED / f"{text}.yaml")
    if text.endswith((".yaml", ".yml")) or ("/" in text and "{" not in text):
        if not Path(text).is_file():
            raise PassError(f"recipe: no file {text}")
        return _read(Path(text))
    head = text.split("{")[0].split(",")[0].strip()
    if head in discover():
        return _build(_File(passes=_parse_inline(text)), "inline")
    known = [*names(), *discover()]
    raise PassError(f"recipe: no recipe or pass {text!r}{did_you_mean(text, known)}; recipes are {', '.join(names())}")


def _read(path: Path) -> Recipe:
    try:
        file = _File.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise PassError(f"recipe {path}: not YAML: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(p) for p in first["loc"]) or "file"
        raise PassError(f"recipe {path}: {key}: {first['msg'].lower()}{did_you_mean(key, _File.model_fields)}") from None
    return _build(file, file.name or path.stem)


def _build(file: _File, name: str) -> Recipe:
    steps = []
    for entry in file.passes:
        pairs = [(entry, {})] if isinstance(entry, str) else list(entry.items())
        for key, parameters in pairs:
            parameters = dict(parameters or {})
            optional = parameters.pop("optional", False)
            if not isinstance(optional, bool):
                raise PassError(f"{key}: optional is true or false, got {optional!r}")
            steps.append(Step(make(key, parameters), optional))
    return Recipe(name, tuple(steps), file.description, file.paper)


def _parse_inline(text: str) -> list[Any]:
    steps: list[Any] = []
    for part in _split(text):
        name, _, body = part.partition("{")
        if body and not body.endswith("}"):
            raise PassError(f"recipe: {part!r} has no closing brace")
        pairs = [p.partition("=") for p in _split(body.removesuffix("}"))]
        if bad := [p for p in pairs if not p[1]]:
            raise PassError(f"recipe: {bad[0][0].strip()!r} in {part!r} has no value; write key=value")
        steps.append({name.strip(): {k.strip(): yaml.safe_load(v) for k, _, v in pairs}})
    return steps


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "{[") - (c in "}]")
        if c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [p for p in [*parts, text[start:].strip()] if p]


def _override(recipe: Recipe, overrides: dict[str, str]) -> Recipe:
    steps = list(recipe.steps)
    for key, text in overrides.items():
        scope, _, field = key.rpartition(".")
        hits = [i for i, s in enumerate(steps) if field in s.rewrite.parameters() and scope in ("", s.rewrite.name)]
        if len(hits) != 1:
            known = [f"{s.rewrite.name}.{p}" for s in steps for p in s.rewrite.parameters()]
            what = "fits no pass" if not hits else f"fits {len(hits)} passes"
            raise PassError(f"--set {key}: {what} of recipe {recipe.name!r}{did_you_mean(key, known)}; settable are {', '.join(known) or 'none'}")
        old = steps[hits[0]]
        steps[hits[0]] = Step(make(old.rewrite.name, old.rewrite.parameters() | {field: yaml.safe_load(text)}), old.optional)
    return Recipe(recipe.name, tuple(steps), recipe.description, recipe.paper)
