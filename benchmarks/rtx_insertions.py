"""RTX engines of what every learned insertion rewrites, built without a GPU: `python -m benchmarks.rtx_insertions [pass ...]`.

The tiny CLIP + Llama program of `benchmarks/rtx_methods.py`, float16, compute capability 8.9, adapters folded as `foveate optimize` folds them; one
process per insertion. The record says how long the build took, or which line TensorRT refused.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.rtx_methods import tiny
from foveate.export.backends.base import find
from foveate.graph.errors import FoveateError
from foveate.passes import pipeline, recipe
from foveate.passes.insert import settle

RECORD = Path(__file__).parent / "results" / "rtx_insertions.json"
CASES = {  # name -> recipe, the stages that it changes
    "victor": ("victor{registers=8,layer=1}", ("prefill",)),
    "victor-content": ("victor{registers=8,layer=1,content=visual}", ("prefill",)),
    "victor-blind": ("victor{registers=8,layer=1,question_blind=true}", ("prefill",)),
    "lora": ("lora{rank=4}", ("prefill", "decode")),
    "lora-registers": ("victor{registers=8,layer=1}, lora{rank=4,rows=registers}", ("prefill",)),
    "space-to-depth": ("space-to-depth{side=2}", ("vision",)),
    "matryoshka-mix": ("matryoshka-mix{tokens=16}", ("vision",)),
    "conv-downsample": ("conv-downsample{side=2}", ("vision",)),
    "query-pool": ("query-pool{side=2}", ("vision",)),
    "meta-tokens": ("meta-tokens{tokens=16,layer=1}", ("vision",)),
    "prefusion": ("prefusion{registers=2,layer=1}", ("prefill", "decode")),
    "exit-router": ("exit-router{layers=[1,2],hidden=8}", ("prefill",)),
    "context-registers": ("context-registers{tokens=8,depth=1}", ("prefill",)),
    "layer-expert": ("layer-expert{layers=[1],keep=0.25}", ("prefill",)),
}


def build(name: str) -> dict[str, Any]:
    text, stages = CASES[name]
    start = time.perf_counter()
    row: dict[str, Any] = {"insertion": name, "recipe": text, "stages": list(stages)}
    try:
        program = pipeline.run(tiny(), recipe.load(f"{text}, clean-up"))
        settle(program)
        program = replace(program, stages={s: program.stages[s] for s in stages})
        with tempfile.TemporaryDirectory() as folder:
            components = find("tensorrt-rtx").lower(program, Path(folder), {"compute_capability": "8.9"})
            size = sum((Path(folder) / c["file"]).stat().st_size for c in components.values())
        return row | {"built": True, "seconds": round(time.perf_counter() - start, 1), "megabytes": round(size / 1e6, 2)}
    except FoveateError as error:
        return row | {"built": False, "seconds": round(time.perf_counter() - start, 1), "error": str(error)[:400]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("insertions", nargs="*", help=f"of {', '.join(CASES)}; all when none is named")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.one:
        print(json.dumps(build(chosen.one)))
        return 0
    if unknown := sorted(set(chosen.insertions) - set(CASES)):
        parser.error(f"no insertions {', '.join(unknown)}; there are {', '.join(CASES)}")
    if reason := find("tensorrt-rtx").available():
        print(f"tensorrt-rtx: {reason}", file=sys.stderr)
        return 3
    rows = {r["insertion"]: r for r in json.loads(RECORD.read_text())["insertions"]} if RECORD.is_file() else {}
    wanted = chosen.insertions or list(CASES)
    for name in wanted:
        done = subprocess.run([sys.executable, "-m", "benchmarks.rtx_insertions", "--one", name], capture_output=True, text=True, check=False)
        lost = {"insertion": name, "recipe": CASES[name][0], "built": False, "error": f"the builder's process ended with {done.returncode}"}
        row = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else lost
        rows[name] = {"date": datetime.date.today().isoformat()} | row
        print(f"{name:20} {'built in ' + str(row['seconds']) + ' s' if row['built'] else row['error']}", flush=True)
        about = {"compute_capability": "8.9", "tensorrt_rtx": version("tensorrt-rtx"), "gpu": "none: engines are built, not run",
                 "machine": f"{platform.machine()}, two shared cores; seconds are wall time beside other work"}
        RECORD.write_text(json.dumps({"about": about, "insertions": [rows[n] for n in CASES if n in rows]}, indent=1) + "\n")
    return 0 if all(rows[n]["built"] for n in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
