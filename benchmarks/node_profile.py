"""Time per ONNX node, by ONNX Runtime's own profile, and which nodes a pass has added."""

from __future__ import annotations

import collections
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime

from foveate.export.onnx_builder import nodes_within

MARK = "selection"


def mark(program: Any, before: Any) -> None:
    """Name nodes that are not in `before` after a module "selection": their ONNX nodes carry it, and so do profiles.

    Nodes that keep the name of their module (what gather-early moves) are not new work and stay as they are.
    """
    for name, stage in program.stages.items():
        old = {n.name for n in before[name].graph.nodes}
        for node in stage.graph.nodes:
            if node.op == "call_function" and node.name not in old and not node.meta.get("nn_module_stack"):
                node.meta["nn_module_stack"] = {MARK: (MARK, "")}


def session(file: Path, profile: Path | None = None) -> Any:
    """One thread, as the benchmarks measure."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def minima(file: Path, run: Callable[[Any], Any], rounds: int) -> dict[str, tuple[str, float]]:
    """node -> (operator, milliseconds of its fastest round after the first); run(session) runs once.

    A loop is charged as one node: what is inside is in it. The profile charges every node 1 to 2 us of its own.
    """
    graph = onnx.load(str(file), load_external_data=False).graph
    inside = {inner.name for node in graph.node for inner in nodes_within(node) if inner is not node}
    times: dict[str, list[float]] = collections.defaultdict(list)
    kinds: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        profiled = session(file, Path(folder) / "profile")
        for _ in range(rounds + 1):
            run(profiled)
        events = json.loads(Path(profiled.end_profiling()).read_text())
    for event in events:
        name = event["name"].removesuffix("_kernel_time")
        if event.get("cat") == "Node" and name != event["name"] and name not in inside:
            times[name].append(event["dur"] / 1e3)
            kinds[name] = event["args"]["op_name"]
    return {name: (kinds[name], min(found[1:])) for name, found in times.items() if len(found) > 1}


def prefill(ours: Any, file: Path, rounds: int) -> dict[str, tuple[str, float]]:
    """`minima` of the prefill of an `ort_vs_hf.Ours`."""
    sessions = ours.engine.sessions
    plain = sessions["prefill"]

    def once(profiled: Any) -> None:
        sessions["prefill"] = profiled
        ours.prefill()

    try:
        return minima(file, once, rounds)
    finally:
        sessions["prefill"] = plain


def added(found: dict[str, tuple[str, float]]) -> dict[str, float]:
    """Of these, what `mark` marked: node -> milliseconds."""
    return {name.removeprefix(f"{MARK}/"): ms for name, (_, ms) in found.items() if name.startswith(f"{MARK}/")}
