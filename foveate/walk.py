"""The steps of a bisection: the original, every prefix of the recipe, half precision, portable ONNX, the artifact itself.

The model is captured once; a prefix is a clone of the one before with one more pass, run in plain torch where it is: nothing is written
but for the ONNX step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .api import DTYPES, Plan, build, make_plan
from .export.artifact import Artifact
from .export.backends.base import find
from .export.errors import LowerError
from .export.precision import to_precision
from .graph.program import Program
from .in_memory import in_memory
from .passes.pipeline import run
from .passes.recipe import Recipe
from .passes.recipe import load as load_recipe
from .runtime.bisect import Step
from .runtime.session import Session, load

LEARNED = "learned.safetensors"


def steps(artifact: Path, model: str | None, pictures: Sequence[Any], folder: Path, say: Callable[[str], None] = lambda text: None) -> list[Step]:
    """model: the original, by default what the manifest names. pictures: fix the geometry of families that need one. folder: scratch space."""
    loaded = Artifact.load(artifact)
    manifest = loaded.manifest
    source = model or str(manifest.get("model", ""))
    if not model and not Path(source).exists() and "/" not in source:
        raise LowerError(f"bisect: {artifact} was made of a loaded {source or 'model'}, not of a folder; name the original with --model")
    say(f"capturing {source}")
    dtype = manifest["facts"].get("dtype", "auto")
    plan = make_plan(
        source,
        None,
        backend=None,
        settings={},
        dtype=dtype if dtype in DTYPES else "auto",
        images=list(pictures) if manifest["facts"].get("geometry") else None,
        progress=lambda stage, line: None,
    )
    recipe = load_recipe(loaded.file("recipe.yaml"))
    prefixes = _Prefixes(plan, recipe, artifact / LEARNED)
    found = [Step("original", "lowering", lambda: _session(plan, prefixes[0]))]
    found += [
        Step(f"{k}: {s.rewrite.name}", "pass", lambda k=k: _session(plan, prefixes[k])) for k, s in enumerate(recipe.steps, 1)
    ]
    precision = str((manifest.get("options") or {}).get("precision") or "")
    if precision in ("float16", "bfloat16") and precision != plan.program.facts.dtype:
        found.append(Step(f"{precision} (torch)", "lowering", lambda: _session(plan, to_precision(prefixes[-1], precision))))
    elif loaded.target not in ("ort", "eager"):
        found.append(Step("ort", "lowering", lambda: _built(plan, prefixes[-1], folder / "ort")))
    return [*found, Step(f"{loaded.target} (the artifact)", "lowering", lambda: load(artifact))]


class _Prefixes:
    """prefixes[k]: the program after the first k passes, made when first asked for."""

    def __init__(self, plan: Plan, recipe: Recipe, weights: Path) -> None:
        self.programs, self.recipe, self.weights = [plan.program], recipe, weights

    def __getitem__(self, k: int) -> Program:
        k = k % (len(self.recipe.steps) + 1)
        while len(self.programs) <= k:
            program = self.programs[-1].clone()
            run(program, Recipe(self.recipe.name, (self.recipe.steps[len(self.programs) - 1],)))
            if self.weights.is_file():
                _fill(program, self.weights)
            self.programs.append(program)
        return self.programs[k]


def _fill(program: Program, path: Path) -> None:
    """What the artifact learned, into as much of it as this prefix has."""
    from .passes.insert import learned, read_weights

    saved = read_weights(path)
    for name, tensor in learned(program).items():
        if name in saved:
            tensor.data.copy_(saved[name])


def _session(plan: Plan, program: Program) -> Session:
    return in_memory(program, plan.processor, plan.model.generation_config.to_dict())


def _built(plan: Plan, program: Program, path: Path) -> Session:
    backend = find("ort")
    build(replace(plan, program=program), path, backend, backend.settings({}), golden=False)
    return load(path, verify=False)
