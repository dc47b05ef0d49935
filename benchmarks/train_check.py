"""Part of gpu_check.py: a few steps of distillation on the device and on the CPU, over made-up rows, and how long a step takes.

float32 must give the CPU's losses; bfloat16, with what is trained kept in float32, must come near them.
"""

from __future__ import annotations

import copy
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

RECIPE = "victor{{registers=4,layer={layer},content=visual}}, lora{{rank=4}}"
STEPS = 8
BOUNDS = {"float32": 2e-3, "bfloat16": 5e-2}  # of a loss: other kernels and sums, which Adam amplifies in the first steps; roundings of 2^-8


class Rows:
    """What `Cache` gives a trainer, from a random generator: pictures' features, three questions each, a teacher's distributions and hidden rows."""

    def __init__(self, g: Any, layers: tuple[int, ...], count: int = 6) -> None:
        from foveate.distill_data import Row, Segment

        self.count = count
        rng, draw = np.random.default_rng(0), torch.Generator().manual_seed(0)
        self._rows = []
        for _ in range(count):
            beginning = np.concatenate([rng.integers(3, g.vocab - 2, 2), np.full(g.visual, g.vocab - 1)])
            segments = tuple(Segment(rng.integers(3, g.vocab - 2, 4), rng.integers(3, g.vocab - 2, 3)) for _ in range(3))
            row = Row(beginning, segments, 1, {}, {"image_features": torch.randn(g.visual, g.hidden, generator=draw)})
            logits = torch.randn(row.answers, g.vocab, generator=draw).log_softmax(-1)
            hidden = {l: torch.randn(row.texts, g.hidden, generator=draw) for l in layers}
            self._rows.append(replace(row, logits=logits, hidden=hidden))

    def rows(self, source: int) -> list[Any]:
        return [self._rows[source]]

    def lengths(self, source: int) -> int:
        return 1


def losses(model: Any, g: Any) -> tuple[list[float], list[float]]:
    """The loss and the milliseconds of every step, where the model is, in its type."""
    from foveate.distill_train import Settings, Student, Trainer
    from foveate.distill_view import training_view
    from foveate.graph.capture import capture
    from foveate.passes.insert import learned
    from foveate.passes.pipeline import run
    from foveate.passes.recipe import load

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = (g.layers // 2, g.layers)
    view = run(training_view(capture(model), layers), load(RECIPE.format(layer=g.layer)))
    said: list[dict[str, Any]] = []
    marks = [time.perf_counter()]

    def say(line: dict[str, Any]) -> None:
        if "loss" in line:
            said.append(line)
            marks.append(time.perf_counter())

    settings = Settings(steps=STEPS, batch=4, held_out=2, evaluate_every=STEPS, save_every=STEPS, warmup=1)
    with tempfile.TemporaryDirectory() as folder:
        Trainer([Student.of("student", view, layers, False)], lambda step: 0, learned(view), Rows(g, layers), settings, Path(folder), say).run()  # type: ignore[arg-type]
    return [l["loss"] for l in said], [1e3 * (b - a) for a, b in itertools.pairwise(marks)]


def measure(model: Any, g: Any, device: str) -> dict[str, Any]:
    """model: in float32 on the CPU."""
    reference, ms = losses(copy.deepcopy(model), g)
    record: dict[str, Any] = {"steps": STEPS, "cpu": reference, "cpu_ms": round(median(ms[1:]), 2), "precisions": {}}
    for name, bound in BOUNDS.items():
        got, ms = losses(copy.deepcopy(model).to(device, getattr(torch, name)), g)
        worst = max(abs(a - b) / abs(b) for a, b in zip(got, reference, strict=True))
        record["precisions"][name] = {"losses": got, "worst": worst, "bound": bound, "ms": round(median(ms[1:]), 2), "ok": worst <= bound}
    record["right"] = all(p["ok"] for p in record["precisions"].values())
    return record


def table(record: dict[str, Any]) -> str:
    lines = [f"{record['steps']} steps of distillation; a step takes {record['cpu_ms']:.1f} ms on the CPU", "",
             "| training | largest difference of a loss | bound | ms a step | ok |", "|---|---|---|---|---|"]
    lines += [f"| {n} | {p['worst']:.1e} | {p['bound']:.0e} | {p['ms']:.1f} | {'yes' if p['ok'] else 'NO'} |" for n, p in record["precisions"].items()]
    return "\n".join(lines) + "\n"
