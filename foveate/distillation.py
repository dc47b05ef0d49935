"""distill: train what a recipe inserts, against the program as it was captured, on pictures and questions without labels.

    program = foveate.graph.capture.capture(model, processor)
    done = foveate.distill(program, "pictures/", recipe="victor", processor=processor, output="out/victor")
    foveate.optimize_model(model, recipe=done.recipe, weights=done.weights, output="out/engine")

Teacher and student are graphs, no modelling code: the teacher answers and is cached once, the student is the same graph after the recipe. Only the
inserted tensors are trained.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from .distill_data import Cache, Making, Source, digest, sources
from .distill_error import DistillError
from .distill_train import WEIGHTS, Settings, Student, Trainer, world
from .distill_view import training_view
from .graph.program import Program
from .graph.sites import layers
from .passes.base import did_you_mean
from .passes.insert import PREFIX, learned, load_weights, share
from .passes.pipeline import run
from .passes.recipe import Recipe, Step
from .passes.recipe import load as load_recipe

ATTENTION = torch.ops.foveate.attention.default
Progress = Callable[[str, Any], None]  # "teacher" with a line, "train" with a dict


@dataclass(frozen=True)
class Distilled:
    """Where the trained tensors and their recipe are, and how well they agree with the teacher on held-out sources."""

    folder: Path
    recipe: Path
    weights: Path
    report: dict[str, Any]


def settings_of(given: Settings | None, options: Mapping[str, Any]) -> Settings:
    known = [f.name for f in fields(Settings)]
    for name in options:
        if name not in known:
            raise DistillError(f"distill: no setting {name!r}{did_you_mean(name, known)}; settings are {', '.join(known)}")
    try:
        from pydantic import TypeAdapter, ValidationError

        return TypeAdapter(Settings).validate_python({**(asdict(given) if given else {}), **options})
    except ValidationError as error:
        first = error.errors()[0]
        raise DistillError(f"distill: {'.'.join(str(p) for p in first['loc'])}: {first['msg'].lower()}, got {first.get('input')!r}") from None


def distill(
    program: Program,
    data: Any,
    recipe: Any,
    *,
    processor: Any,
    output: str | Path,
    settings: Settings | None = None,
    cache: str | Path | None = None,
    weights: str | Path | None = None,
    student: Program | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Distilled:
    """Train the tensors that `recipe` inserts into `program` (as captured, not rewritten) to answer as `program` does.

    data: a data set (folder, file, items) or (pictures, questions) pairs; labels are never read. output: a folder for recipe, weights, curve and
    checkpoint; training goes on where a checkpoint in it ends. cache: a folder for the teacher's answers, `output`/teacher unless given; runs may
    share it. Everything is computed where `program` is, in its type: float32, or bfloat16 with what is trained kept in float32. weights: start from
    these instead of the initial values. student: the program that the recipe is to rewrite, if it is another object
    than `program`; it must be of the same model. options: single settings, as `steps=2000`. Raises a FoveateError, and DistillError for its own.
    """
    say = progress or (lambda stage, line: None)
    chosen, config = load_recipe(recipe), settings_of(settings, options)
    config.check()
    if rewritten := [r.name for r in program.history if r.changed]:
        raise DistillError(f"distill: the teacher was rewritten by {', '.join(rewritten)}; give the program as it was captured")
    if student is not None and digest(student) != digest(program):
        raise DistillError(f"distill: teacher and student are different models ({_say(program)} and {_say(student)}); both must be captured from one model")
    folder = Path(output)
    for name, tensor in program.parameters():
        if tensor.device.type == "meta":
            raise DistillError(f"distill: {name} has no data (device meta); load the model's weights first")
        if tensor.dtype == torch.float16:
            raise DistillError(f"distill: {name} is float16, in which gradients vanish; load the model in float32 or bfloat16")
        tensor.requires_grad_(False) if tensor.is_floating_point() else None
    pairs = sources(data)
    making = making_of(program, config)
    variants = Variants.of(program, chosen, config)
    trial = variants.build(variants.recipes[:1], making)[0]  # a recipe that does not fit is refused before the teacher works for hours
    if not learned(trial):
        raise DistillError(f"distill: recipe {chosen.name!r} inserts no trainable tensors; insertions are e.g. victor, lora; see `foveate passes`")
    own_vision = vision_changed(program, trial)
    making = replace(making, pixels=own_vision, until=trial.facts.context.get("until"))
    check_contexts(pairs, trial)
    kept = Cache.build(program, processor, pairs, cache or folder / "teacher", making, lambda line: say("teacher", line)) if world()[0] == 0 else None
    kept = kept or Cache(Path(cache or folder / "teacher"), making, len(pairs))
    if routers := [s.rewrite for s in chosen.steps if getattr(s.rewrite, "objective", "") == "exit"]:
        return _routers(program, chosen, routers[0], kept, config, folder, say)
    views = [trial, *variants.build(variants.recipes[1:], making)]
    tensors = share(views)
    if weights is not None:
        load_weights(trial, weights)
    students = [Student.of(v.name, view, making.hidden, own_vision, config.stitch_layer if config.stitch_steps else 0)
                for v, view in zip(variants.recipes, views, strict=True)]
    if world()[0] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text(variants.recipes[0].yaml(), encoding="utf-8")
    trainer = Trainer(students, variants.plan, tensors, kept, config, folder, lambda line: say("train", line), variants.elastic)
    report = trainer.run()
    report["settings"] = asdict(config)
    if world()[0] == 0:
        (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return Distilled(folder, folder / "recipe.yaml", folder / WEIGHTS, report)


def _routers(program: Program, recipe: Recipe, router: Any, cache: Cache, config: Settings, folder: Path, say: Progress) -> Distilled:
    """Routers learn from labels that the teacher makes, not from its distributions; the rest of the recipe must have nothing to learn."""
    from .distill_exit import train_routers

    student = run(program.clone(), recipe)
    if other := [n for n in learned(student) if not n.startswith(f"{PREFIX}{router.name}.")]:
        raise DistillError(f"distill: {router.name} is trained alone, and recipe {recipe.name!r} also learns {other[0].removeprefix(PREFIX)}; train that first")
    report = train_routers(program, student, router, cache, config, folder, lambda line: say("train", line))
    report |= {"steps": config.steps, "settings": asdict(config), "parameters": sum(t.numel() for t in learned(student).values()),
               "agreement": min(1.0 if r["kept_answer"] is None else r["kept_answer"] for r in report["layers"].values())}
    (folder / "recipe.yaml").write_text(recipe.yaml(), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    return Distilled(folder, folder / "recipe.yaml", folder / WEIGHTS, report)


def making_of(program: Program, config: Settings) -> Making:
    """What to keep of the teacher for these settings."""
    last = max(layers(program["prefill"], program.facts.layer_path)) + 1
    hidden = config.hidden_layers if config.hidden_layers is not None else tuple(sorted({max(1, last // 2), max(1, 3 * last // 4), last}))
    stitch = (config.stitch_layer,) if config.stitch_steps else ()
    return Making(tuple(sorted({*hidden, *stitch})), config.room, config.max_new_tokens, packable(program))


def packable(program: Program) -> bool:
    """Plain causal attention everywhere, so that questions can share an image."""
    nodes = [n for n in program["prefill"].graph.nodes if n.target is ATTENTION]
    return all(n.args[7] and not n.args[8] and isinstance(n.args[3], Node) and n.args[3].meta["val"].dim() == 2 for n in nodes)


def vision_changed(program: Program, view: Program) -> bool:
    """Do the students see with other eyes than the teacher?"""
    learns = any(str(n.target).startswith(PREFIX) for n in view["vision"].graph.nodes if n.op == "get_attr")
    return learns or view.facts.features_per_image != program.facts.features_per_image


def check_contexts(data: Sequence[Source], view: Program) -> None:
    """A recipe that compresses a prefix needs one in every source; no other recipe knows what to do with it."""
    bare = [i for i, s in enumerate(data) if bool(s.context) != bool(view.facts.context)]
    if bare and view.facts.context:
        raise DistillError(f"distill: {len(bare)} of {len(data)} entries have no context (first: number {bare[0]}), and this recipe compresses one; give "
                           "(pictures, questions, context)")
    if bare:
        raise DistillError(f"distill: {len(bare)} of {len(data)} entries have a context (first: number {bare[0]}), and this recipe compresses none; "
                           "see context-registers")


def _say(program: Program) -> str:
    return f"{program.facts.model_type} with {program.facts.layers} layers of width {program.facts.hidden_size}"


@dataclass(frozen=True)
class Variants:
    """The recipe that ships, first, and those that only train: fewer registers, later cuts."""

    program: Program
    recipes: tuple[Recipe, ...]
    elastic: int  # recipes[0 : elastic] serve the numbers of registers
    config: Settings

    @classmethod
    def of(cls, program: Program, recipe: Recipe, config: Settings) -> Variants:
        base, sizes = recipe, ()
        if config.elastic:
            sizes = tuple(sorted(set(config.elastic), reverse=True))
            which = next((s.rewrite.elastic for s in recipe.steps if getattr(s.rewrite, "elastic", "")), "registers")
            own = _parameter(recipe, which, "elastic")
            if sizes[-1] < 1:
                raise DistillError(f"distill: elastic={list(config.elastic)}; numbers of {which} must be at least 1")
            base = _with(recipe, **{which: own, "table": max(sizes[0], own)})
            recipes = [base, *[_with(base, **{which: m}) for m in sizes if m != own]]
        else:
            recipes = [base]
        count = len(recipes)
        if config.anneal:
            _parameter(recipe, "layer", "anneal")
            recipes += [_with(base, layer=layer) for layer in config.anneal]
        named = [replace(r, name=_name(r)) for r in recipes]
        return cls(program, tuple(named), count, config)

    def build(self, recipes: Sequence[Recipe], making: Making) -> list[Program]:
        view = training_view(self.program, making.hidden, making.packed)
        return [run(view.clone(), recipe) for recipe in recipes]

    def plan(self, step: int) -> int:
        """Which student a step trains: a function of seed and step alone."""
        later = len(self.recipes) - self.elastic
        share = self.config.anneal_share * self.config.steps
        if later and step < share:
            return self.elastic + int(step * later / share)
        return int(np.random.default_rng([self.config.seed, 1, step]).integers(self.elastic)) if self.elastic > 1 else 0


def _parameter(recipe: Recipe, name: str, setting: str) -> Any:
    found = [s.rewrite.parameters()[name] for s in recipe.steps if name in s.rewrite.parameters()]
    if len(found) != 1:
        raise DistillError(f"distill: {setting} needs a recipe with exactly one pass that has the parameter {name!r}; {recipe.name!r} has {len(found)}")
    return found[0]


def _with(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with these parameters in the pass that has them all."""
    steps = [Step(replace(s.rewrite, **changes), s.optional) if all(n in s.rewrite.parameters() for n in changes) else s for s in recipe.steps]
    return replace(recipe, steps=tuple(steps))


def _name(recipe: Recipe) -> str:
    told = [f"{s.rewrite.name}-{'-'.join(str(s.rewrite.parameters()[n]) for n in ('registers', 'tokens', 'layer') if n in s.rewrite.parameters())}".rstrip("-")
            for s in recipe.steps]
    return "+".join(told)
