"""RTX engines of the stage that each method rewrites, built without a GPU: `python -m benchmarks.rtx_methods [method ...]`.

One small CLIP + Llama program (the llava family's tiny model, four vision and three language layers), float16, compute capability 8.9. A method
is built at its defaults, fitted to that model's size, in a process of its own: a builder that crashes takes nothing else with it. The record says
per method how long the build took, or which line TensorRT refused.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from foveate.export.backends.base import find
from foveate.graph.errors import FoveateError
from foveate.graph.families import REGISTRY
from foveate.graph.program import Program
from foveate.passes.base import Pass, discover, make

RECORD = Path(__file__).parent / "results" / "rtx_methods.json"
STAGE = {"vision": "vision", "tower": "vision", "llm": "prefill"}
FITTED: dict[str, dict[str, Any]] = {  # where defaults are for a deeper model, or for several images
    "prune-elip": {"layers": (1,), "ahead": (1,), "keep": (0.6,)},
    "bypass-vision": {"layers": (1,), "keep": (0.5,)},
    "merge-tome": {"r": 8},
    "merge-must-drop": {"keep": 0.5},
    "merge-prumerge": {"keep": 0.25, "neighbours": 8},
    "bypass-mod": {"layers": (1,)},
}


def methods() -> list[str]:
    """Everything that drops tokens, by discovery."""
    return [name for name, cls in discover().items() if cls.place in STAGE and cls.shapes]


def fitted(name: str) -> Pass:
    """The method with its one cut at layer 1 and a quarter of the tokens, where it has such parameters."""
    known = {f.name for f in fields(discover()[name])}
    place = discover()[name].place
    values = {"layer": 1, "layers": (1,), "keep": 0.25, "keeps": (0.25,)} if place == "llm" else {"keep": 0.25} if place == "vision" else {}
    return make(name, {k: v for k, v in (values | FITTED.get(name, {})).items() if k in known})


def tiny() -> Program:
    """64 patches, three vision layers that the features come from, three language layers."""
    import transformers as T

    from foveate.graph.capture import capture
    from foveate.graph.families._tiny import clip_config, llama_config

    torch.manual_seed(0)
    config = T.LlavaConfig(vision_config=T.CLIPVisionConfig(**clip_config(image_size=32, num_hidden_layers=4)), text_config=T.LlamaConfig(**llama_config(3)),
                           image_token_index=500, vision_feature_layer=-2, image_seq_length=64)
    assert "llava" in REGISTRY
    return capture(T.LlavaForConditionalGeneration(config).eval())


def build(program: Program, name: str) -> dict[str, Any]:
    """One row of the record: the engine of the stage that the method rewrites."""
    short, method, start = program.clone(), fitted(name), time.perf_counter()
    row = {"method": name, "parameters": method.parameters(), "stage": STAGE[method.place]}
    try:
        method.run(short)
        make("clean-up").run(short)
        short = replace(short, stages={row["stage"]: short.stages[row["stage"]]})
        shared = getattr(method, "shared", 1)
        options = {"compute_capability": "8.9", **({"images": f"{shared}:{shared}:{2 * shared}"} if shared > 1 else {})}
        with tempfile.TemporaryDirectory() as folder:
            components = find("tensorrt-rtx").lower(short, Path(folder), options)
            size = (Path(folder) / components[row["stage"]]["file"]).stat().st_size
        return row | {"built": True, "seconds": round(time.perf_counter() - start, 1), "megabytes": round(size / 1e6, 2)}
    except FoveateError as error:
        return row | {"built": False, "seconds": round(time.perf_counter() - start, 1), "error": str(error)[:400]}


def apart(name: str) -> dict[str, Any]:
    """The row of one method, from a process of its own."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.rtx_methods", "--one", name], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    told = signal.Signals(-done.returncode).name if done.returncode < 0 else done.stderr.strip().splitlines()[-1][:400]
    return {"method": name, "parameters": fitted(name).parameters(), "built": False, "error": f"the builder's process ended with {told}"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", help="none: every method that drops tokens")
    parser.add_argument("--record", type=Path, default=RECORD, help="where the rows go, after each build; rows of other methods in it stay")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.one:
        print(json.dumps(build(tiny(), chosen.one), default=str))
        return 0
    if unknown := sorted(set(chosen.methods) - set(methods())):
        parser.error(f"no methods {', '.join(unknown)}; there are {', '.join(methods())}")
    if reason := find("tensorrt-rtx").available():
        print(f"tensorrt-rtx: {reason}", file=sys.stderr)
        return 3
    rows = {r["method"]: r for r in json.loads(chosen.record.read_text())["methods"]} if chosen.record.is_file() else {}
    wanted = chosen.methods or methods()
    for name in wanted:
        rows[name] = {"date": datetime.date.today().isoformat()} | apart(name)
        print(f"{name:20} {'built in ' + str(rows[name]['seconds']) + ' s' if rows[name]['built'] else rows[name]['error']}", flush=True)
        about = {"compute_capability": "8.9", "tensorrt_rtx": version("tensorrt-rtx"), "gpu": "none: engines are built, not run",
                 "machine": f"{platform.machine()}, two shared cores; seconds are wall time beside other work"}
        chosen.record.write_text(json.dumps({"about": about, "methods": [rows[n] for n in sorted(rows)]}, indent=1, default=str) + "\n")
    return 0 if all(rows[n]["built"] for n in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
