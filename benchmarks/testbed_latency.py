"""Latency of the testbed table's configurations on ONNX Runtime, per stage, every one in turns with the unreduced model.

One picture, one question, one thread. Vision-side methods leave the prefill graph as it is and methods inside leave the vision stage; both are
timed as they are lowered all the same. A configuration that has a latency of this commit and machine already is not timed again.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import alternate, machine, ratio
from benchmarks.testbed_configs import NONE, RENUMBERED, plan
from benchmarks.testbed_table import Bench, Line, Reader, RecordError, append, read, revision

STEPS = 8  # decode steps per timing
STAGES = ("vision", "prefill", "decode")


class Stages:
    """The three stages of one session on one sample, ready to be timed."""

    def __init__(self, bench: Bench, session: Reader, extra: str) -> None:
        item = next(i for i in bench.items if len(i.sources) == 1)
        given = {k: v for k, v in bench.given(extra, [item], 0).items()}
        sample = bench.sample(item, ())
        self.engine = session.engine
        self.pixels = {"pixel_values": sample.vision["pixel_values"], **given}
        self.feeds = session.encode([sample], extra=given).batch.feeds
        self.length = int(self.feeds["input_ids"].shape[1])
        outputs, self.cache = self.engine.prefill(self.feeds, self.length + STEPS + 1)
        self.token = outputs["logits"].argmax(-1)[:, None]

    def vision(self) -> None:
        self.engine.vision(self.pixels)

    def prefill(self) -> None:
        self.engine.prefill(self.feeds, self.length + STEPS + 1)

    def decode(self) -> None:
        """The same steps over the same rows, again and again."""
        parts, slot = {name: rows.copy() for name, rows in self.cache.parts.items()}, self.cache.slot.copy()
        for step in range(STEPS):
            self.engine.decode(self.cache, self.token, self.feeds["position_ids"][:, -1:] + 1 + step)
        self.cache.parts, self.cache.slot = parts, slot


def stage_times(this: Stages, none: Stages, rounds: int) -> dict[str, Any]:
    """stage -> {ms, none_ms, speedup}: medians, and the median ratio of neighbours; decode per token"""
    found = {}
    for stage in STAGES:
        runs: dict[str, Callable[[], Any]] = {"none": getattr(none, stage), "this": getattr(this, stage)}
        times = alternate(runs, rounds)
        per = STEPS if stage == "decode" else 1
        ms, base = median(times["this"]) / per, median(times["none"]) / per
        found[stage] = {"ms": round(ms, 4), "none_ms": round(base, 4), "speedup": round(ratio(times["none"], times["this"]), 3)}
    return found


def wanted(done: dict[str, Line], commit: str) -> list[tuple[str, str]]:
    """(recipe, outside input) of every measured configuration without a latency of this commit

    Random controls cost what the uniform ones cost, and renumber-positions runs the graphs of the recipe without it.
    """
    configs = {NONE: "", **{c.recipe: c.extra for c in plan() if not c.method.endswith("-random") and c.section != RENUMBERED}}
    return [(r, e) for r, e in configs.items() if r in done and done[r].right and (done[r].latency or {}).get("commit") != commit]


def time_all(path: Path, rounds: int, only: str = "", seconds: float = 345.0) -> None:
    done, commit = read(path), revision()
    if not done:
        raise RecordError(f"{path.name}: no configuration in it; run `testbed_table run` first")
    items = next(iter(done.values())).items
    left, start = [(r, e) for r, e in wanted(done, commit) if only in r], time.perf_counter()
    print(f"{len(left)} configurations to time; load average {machine(1)['load_average']}", flush=True)
    bench = Bench(18)
    with tempfile.TemporaryDirectory() as folder:
        none = Stages(bench, bench.open(bench.build(NONE), Path(folder) / "none"), "")
        for at, (recipe, extra) in enumerate(left):
            if time.perf_counter() - start > seconds:
                print(f"{seconds:.0f} s are over: {len(left) - at} configurations are left for the next call", flush=True)
                return
            with tempfile.TemporaryDirectory() as place:
                session = bench.open(bench.build(recipe), Path(place) / "artifact")
                found = stage_times(Stages(bench, session, extra), none, rounds)
                session.close()
            append(path, {"recipe": recipe, "items": items, "latency": {**found, "rounds": rounds, "commit": commit, "machine": machine(1)}})
            print(f"{at + 1}/{len(left)} {recipe}: " + "  ".join(f"{s} {found[s]['ms']:.2f} ms ({found[s]['speedup']:.2f}x)" for s in STAGES), flush=True)
