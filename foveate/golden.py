"""Golden files at optimize time: a tiny example per stage, run in plain torch on the rewritten program."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .graph.probe import probe
from .graph.program import Program
from .runtime import golden
from .runtime.golden import Arrays

SEED = 20240521


def record(program: Program) -> dict[str, Arrays]:
    """stage -> arrays of its golden file. The program's parameters must have data; a GraphError, LowerError or RunError says what fails."""
    from .export.backends.eager import EagerEngine

    engine, rng = EagerEngine.of(program), np.random.default_rng(SEED)
    # one picture of as few rows as the program takes: features of a real one would be megabytes
    small = replace(program, facts=replace(program.facts, tokens_per_image=None, features_per_image=None))
    prefill = {name: value.float().numpy() if value.is_floating_point() else value.numpy() for name, value in probe(small, (7,), (1,), SEED).items()}
    prefill |= {name: golden.coarse(rng, value.shape) for name, value in prefill.items() if value.dtype.kind == "f"}
    tokens = rng.integers(0, program.facts.vocab_size, golden.STEPS)
    return golden.record(engine, _vision(program, rng), prefill, tokens)


def _vision(program: Program, rng: np.random.Generator) -> Arrays | None:
    """The captured inputs with coarse pixels; inputs that a method asked for are made up."""
    given = program.example.get("vision")
    if given is None or "vision" not in program.stages:
        return None
    feeds = {n: golden.coarse(rng, t.shape) if t.is_floating_point() else t.cpu().numpy() for n, t in given.items()}
    rows = len(next(iter(feeds.values())))
    for name in program.facts.vision_extra:
        width = program["vision"].placeholder(name).meta["val"].shape[1:]
        feeds[name] = np.abs(golden.coarse(rng, (rows, *(int(w) for w in width))))
    return feeds
