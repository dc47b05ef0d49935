"""Timing that survives a shared machine: candidates alternate within one loop, warm-up first, medians, and the ratio of each pair of
neighbours."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results"


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # cpu: seconds of all threads; steadier where others use the machine


def alternate(candidates: dict[str, Callable[[], Any]], rounds: int, warm_up: int = 2, clock: str = "wall") -> dict[str, list[float]]:
    """Milliseconds of every candidate, measured in turn `rounds` times."""
    now = CLOCKS[clock]
    for _ in range(warm_up):
        for run in candidates.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start = now()
            run()
            times[name].append(1e3 * (now() - start))
    return times


def ratio(slow: list[float], fast: list[float]) -> float:
    """How many times faster: the median over rounds of slow / fast, each pair measured side by side."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def summary(times: list[float]) -> dict[str, float]:
    return {"median_ms": round(median(times), 4), "min_ms": round(min(times), 4), "rounds": len(times)}


def machine(threads: int) -> dict[str, Any]:
    """Hardware and versions, for the record."""
    cpu = (
        next(
            (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
            platform.processor(),
        )
        if Path("/proc/cpuinfo").exists()
        else platform.processor()
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
        "load_average": round(os.getloadavg()[0], 2),
        **{p: version(p) for p in ("torch", "transformers", "onnx", "onnxruntime")},
    }


def save(name: str, record: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
