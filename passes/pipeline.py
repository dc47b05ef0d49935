"""Run a list of passes: verify, time and record after each one; say why one does not apply."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..graph.dump import dump
from ..graph.errors import FoveateError
from ..graph.kv_table import derive_kv
from ..graph.probe import probe
from ..graph.program import PassRecord, Program
from ..graph.verify import verify
from .base import PassError
from .oracle import mask_only
from .recipe import Recipe, Step
from .select import Select

Callback = Callable[[PassRecord, Program], None]


def run(program: Program, recipe: Recipe, callback: Callback | None = None) -> Program:
    """Apply the recipe to the program, in place; returns it. `callback` sees every record as it is made.

    After each pass the program is verified. FOVEATE_DEBUG: 1 prints a line per pass; 2 also why an optional pass did not apply; 3 also writes
    `dump/NN-<pass>.txt`; 4 also runs the prefill on random inputs: outputs must be finite, and a cut must equal its mask-only oracle.
    A pass that fails or finds nothing to change is a PassError that names what ran before, unless its step says `optional: true`.
    """
    program.kv = derive_kv(program) if "prefill" in program.stages else program.kv
    for number, step in enumerate(recipe.steps):
        before = program.clone() if _level() >= 4 else None
        record = _apply(program, step)
        program.history.append(record)
        _debug(number, record, program)
        if before is not None:
            _numeric_check(before, program, step)
        if callback:
            callback(record, program)
    return program


def _apply(program: Program, step: Step) -> PassRecord:
    before, start = _nodes(program), time.perf_counter()
    snapshot = program.clone() if step.optional else None
    try:
        changed = step.rewrite.run(program)
        if changed:
            verify(program)
        elif not step.optional and not step.rewrite.may_be_idle:
            raise PassError(f"{step.rewrite.name}: nothing to change; say `optional: true` if that is fine")
    except FoveateError as error:
        if snapshot is None:
            ran = ", ".join(r.name for r in program.history) or "nothing"
            raise PassError(f"{error} (ran before: {ran})") from error
        if _level() >= 2:
            print(f"{step.rewrite.name} did not apply: {error}")
        program.stages, program.facts, program.kv, changed = snapshot.stages, snapshot.facts, snapshot.kv, False
    after = _nodes(program)
    lengths = {f"layer{entry.layer}": entry.length for entry in program.kv}
    return PassRecord(step.rewrite.name, step.rewrite.parameters(), changed, (before, after), lengths, round(1e3 * (time.perf_counter() - start), 3))


def _nodes(program: Program) -> int:
    return sum(len(stage.graph.nodes) for stage in program.stages.values())


def _level() -> int:
    return int(os.environ.get("FOVEATE_DEBUG", "0") or 0)


def _numeric_check(before: Program, program: Program, step: Step) -> None:
    feed = probe(program)
    with torch.no_grad():
        got = program["prefill"].run(feed)
    if bad := [name for name, value in got.items() if not torch.isfinite(value).all()]:
        raise PassError(f"{step.rewrite.name}: outputs {bad} are not finite on random inputs")
    if isinstance(step.rewrite, Select) and program.history[-1].changed:
        with torch.no_grad():
            want = mask_only(before, [step.rewrite])["prefill"].run(feed)["logits"]
        error = float((got["logits"] - want).abs().max() / want.abs().max().clamp(min=1e-6))
        print(f"   {step.rewrite.name}: {error:.1e} from its mask-only oracle, relative to the largest logit")
        if error > 1e-3:
            raise PassError(f"{step.rewrite.name}: logits are {error:.1e} (relative) from the mask-only oracle")


def _debug(number: int, record: PassRecord, program: Program) -> None:
    level = _level()
    if level >= 1:
        tokens = " ".join(dict.fromkeys(record.tokens.values()))
        print(
            f"{number:02d} {record.name}: {'changed' if record.changed else 'idle'}, nodes {record.nodes[0]} -> {record.nodes[1]}, "
            f"tokens {tokens}, {record.ms:.0f} ms"
        )
    if level >= 3:
        Path("dump").mkdir(exist_ok=True)
        Path("dump", f"{number:02d}-{record.name}.txt").write_text(dump(program) + "\n")
