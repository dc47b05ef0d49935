"""The table of families: what of the path from capture to engine holds for each, on its tiny random model.

    python benchmarks/family_table.py [family ...] [--no-engines] [--json benchmarks/results/families.json] [--markdown docs/families.md]

Columns, each a number or a reason:
    vision, prefill, decode   error against Hugging Face's sdpa, relative to the standard deviation of its outputs (goal 2e-5): images; prompts padded
                              left and right, batch 3; 8 greedy steps
    cut                       drop-fastv at a layer against its mask-only oracle (same scores, nothing gathered, dropped columns masked), relative
                              to the largest logit (goal 2e-5)
    onnx                      the portable ONNX of all three stages, the prefill cut, on ONNX Runtime's CPU provider against eager (goal 1e-4:
                              MLAS sums in another order than torch, through every layer)
    engine                    TensorRT-RTX engines of all three stages, the prefill cut, built for compute capability 8.9
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from foveate.graph.capture import capture
from foveate.graph.check import compare
from foveate.graph.errors import FoveateError
from foveate.graph.families import REGISTRY
from foveate.graph.families._tiny import build
from foveate.graph.probe import probe
from foveate.graph.program import Program, Stage
from foveate.graph.verify import verify
from foveate.passes.base import make
from foveate.passes.oracle import mask_only

GOALS = {"vision": 2e-5, "prefill": 2e-5, "decode": 2e-5, "cut": 2e-5, "onnx": 1e-4}
LAYERS = 4
Feeds = dict[str, torch.Tensor]


def measure(family: str, engines: bool) -> dict[str, Any]:
    """One row. A step that raises is recorded by its message; later steps run where they can."""
    row: dict[str, Any] = {"family": family}
    start = time.perf_counter()
    _attempt(row, ("vision", "prefill", "decode"), lambda: _against_hf(family))
    torch.manual_seed(0)
    tiny = build(REGISTRY[family], LAYERS)
    program = _attempt(row, ("capture",), lambda: _captured(tiny.model))
    if isinstance(program, Program):
        row["capture"] = "ok"
        cut = _attempt(row, ("cut",), lambda: _cut(row, program))
        if isinstance(cut, Program):
            _attempt(row, ("onnx",), lambda: {"onnx": _onnx(cut)})
            if engines:
                _attempt(row, ("engine",), lambda: {"engine": _engines(cut)})
    row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _attempt(row: dict[str, Any], names: tuple[str, ...], step: Any) -> Any:
    try:
        result = step()
    except Exception as error:  # a row is a report: the cause goes into the table, whatever it is
        row.update({name: f"{type(error).__name__}: {str(error).splitlines()[0][:200]}" for name in names})
        return None
    if isinstance(result, dict):
        row.update(result)
    return result


def _against_hf(family: str) -> dict[str, float]:
    found = compare(family)
    return {"vision": found.vision, "prefill": max(found.prefill_left, found.prefill_right), "decode": found.decode}


def _captured(model: Any) -> Program:
    program = capture(model)
    verify(program)
    return program


def _cut(row: dict[str, Any], program: Program) -> Program:
    """The program cut at the first layer where the oracle applies; the error against it."""
    reasons = []
    for layer in range(1, LAYERS):
        selection = make("drop-fastv", {"layer": layer, "keep": 8})
        cut = program.clone()
        try:
            selection.run(cut)
            masked = mask_only(program, [selection])
        except FoveateError as error:
            reasons.append(f"layer {layer}: {error}")
            continue
        verify(cut)
        one_image = (1, 1)
        errors = []
        for left in (False, True):
            feed = probe(cut, images=one_image, left=left)
            with torch.no_grad():
                got, want, whole = (p["prefill"].run(feed)["logits"] for p in (cut, masked, program))
            scale = want.abs().max()
            errors.append(float((got - want).abs().max() / scale))
            if not float((got - whole).abs().max() / scale) > 10 * GOALS["cut"]:
                raise RuntimeError(f"dropping tokens at layer {layer} changes nothing, so this comparison proves nothing")
        row.update({"cut": max(errors), "cut_layer": layer})
        if max(errors) <= GOALS["cut"]:
            return cut
    raise RuntimeError("; ".join(reasons) or f"no layer agrees with the oracle; the last error is {row.get('cut')}")


def _onnx(program: Program) -> float:
    import onnx
    import onnxruntime

    from foveate.export.onnx_weights import WeightFile
    from foveate.export.to_onnx import to_onnx

    worst = 0.0
    for name, stage in program.stages.items():
        feed = _feed(program, name, stage)
        with torch.no_grad():
            want = stage.run(feed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{name}.onnx"
            with WeightFile(Path(folder) / "weights.bin") as weights:
                onnx.save_model(to_onnx(stage, name, weights), str(path))
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 1
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            known = {i.name for i in session.get_inputs()}
            got = session.run(None, {k: v.numpy() for k, v in feed.items() if k in known})
        for output, value in zip(session.get_outputs(), got, strict=True):
            reference = want[output.name.removesuffix(".out")]  # an output that shares an input's name is told apart
            error = (torch.from_numpy(value).double() - reference.double()).abs().max() if reference.numel() else torch.zeros(())
            worst = max(worst, float(error / reference.double().abs().max().clamp(min=1.0)))
    return worst


def _feed(program: Program, name: str, stage: Stage) -> Feeds:
    """Random inputs of a stage: a prompt for prefill, hinted shapes elsewhere."""
    if name == "prefill":
        return probe(program)
    generator = torch.Generator().manual_seed(1)
    feed: Feeds = {}
    for node in stage.graph.nodes:
        if node.op == "placeholder":
            value = node.meta["val"]
            shape = [int(d) if isinstance(d, int) else d.node.hint for d in value.shape]
            feed[node.meta["name"]] = (
                torch.randn(shape, generator=generator).to(value.dtype) if value.is_floating_point() else torch.full(shape, 3, dtype=value.dtype)
            )
    return feed


def _engines(program: Program) -> str:
    from foveate.export.backends.base import find

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        components = find("tensorrt-rtx").lower(program, Path(folder), {"compute_capability": "8.9", "new_tokens": 32})
        sizes = [(Path(folder) / c["file"]).stat().st_size for c in components.values()]
    return f"{len(components)} in {time.perf_counter() - start:.0f} s, {sum(sizes) / 1e6:.1f} MB"


def markdown(rows: list[dict[str, Any]]) -> str:
    columns = ("vision", "prefill", "decode", "cut", "onnx", "engine")
    lines = [
        "| family | capture | vision = HF | prefill = HF | decode = HF | cut = oracle (layer) | ONNX on ORT | RTX engines |",
        "|---|---|---|---|---|---|---|---|",
    ]
    notes = []
    for row in rows:
        cells = []
        for name in columns:
            value = row.get(name, "not run")
            good = (isinstance(value, float) and value <= GOALS[name]) or (name == "engine" and str(value)[:1].isdigit())
            if not good:
                notes.append(f"- **{row['family']}, {name}**: {value}")
            shown = f"{value:.0e}" if isinstance(value, float) else (value if good else "see below")
            cells.append(f"{shown} ({row['cut_layer']})" if name == "cut" and good else ("✗ " if not good else "") + shown)
        lines.append(f"| {row['family']} | {'ok' if row.get('capture') == 'ok' else '✗'} | {' | '.join(cells)} |")
    green = sum(all(f"**{r['family']}," not in n for n in notes) for r in rows)
    return "\n".join([*lines, "", f"{green} of {len(rows)} families are green in every column.", "", *notes]) + "\n"


def document(rows: list[dict[str, Any]]) -> str:
    """docs/families.md"""
    columns = (__doc__ or "").split("Columns", 1)[1].rstrip()
    head = "# Families\n\nMade by `python benchmarks/family_table.py` and `python benchmarks/readme_table.py`."
    return f"{head}\n\n```\nColumns{columns}\n```\n\n{markdown(rows)}"


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("families", nargs="*", default=[])
    parser.add_argument("--no-engines", action="store_true")
    parser.add_argument("--json", type=Path, help="rows are merged into this file")
    parser.add_argument("--markdown", type=Path)
    arguments = parser.parse_args()
    if unknown := [f for f in arguments.families if f not in REGISTRY]:
        sys.exit(f"family_table: unknown families {unknown}; there are {sorted(REGISTRY)}")
    rows = {r["family"]: r for r in json.loads(arguments.json.read_text())} if arguments.json and arguments.json.exists() else {}
    for family in arguments.families or sorted(REGISTRY):
        rows[family] = measure(family, not arguments.no_engines)
        print(json.dumps(rows[family]), flush=True)
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_text(json.dumps([rows[f] for f in sorted(rows)], indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(document([rows[f] for f in sorted(rows)]))


if __name__ == "__main__":
    main()
