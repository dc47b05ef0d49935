"""Does a token drop buy what its FLOPs say? Prefill of the ONNX Runtime stages before and after a drop, against the cost model.

    python -m benchmarks.drop_speed [--shape llava-like] [--keep 64] [--layer 2] [--threads 1] [--rounds 15]

Goals: speed-up of prefill >= 0.95 of the FLOP ratio; selection <= 3 % of prefill; a decode step not slower than unreduced.
Selection is measured as the time that a drop which keeps every token adds to the unreduced prefill: scores, top-k and gathers, and
nothing saved.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import torch

from foveate.graph.capture import capture
from foveate.graph.cost import cost
from foveate.graph.kv_table import derive_kv
from foveate.passes.methods.drop_fastv import DropFastV

try:
    from .measure import alternate, machine, ratio, save, summary
    from .ort_vs_hf import STEPS, Ours, lower
    from .shapes import SHAPES, Shape
except ImportError:  # run as a script
    from measure import alternate, machine, ratio, save, summary
    from ort_vs_hf import STEPS, Ours, lower
    from shapes import SHAPES, Shape

GOALS = {"of_ideal": 0.95, "selection": 0.03, "decode": 1.0}


def drop(program: Any, layer: int, keep: int) -> Any:
    reduced = program.clone()
    DropFastV(layer=layer, keep=keep).run(reduced)
    reduced.kv = derive_kv(reduced)
    return reduced


def flops(program: Any, sizes: dict[str, int]) -> float:
    return cost(program, "prefill").at(**sizes)["flops"]


def compare(shape: Shape, layer: int, keep: int, threads: int, rounds: int, clock: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    prompt = shape.prompt()
    whole = capture(shape.model())
    programs = {"whole": whole, "dropped": drop(whole, layer, keep), "kept_all": drop(whole, layer, shape.visual)}
    sizes = {"B": 1, "S": shape.text + shape.visual, "N": shape.visual}
    ideal = flops(programs["whole"], sizes) / flops(programs["dropped"], sizes)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Ours(lower(p, Path(folder) / name, threads=threads), prompt) for name, p in programs.items()}
        prefill = alternate({name: run.prefill for name, run in runs.items()}, rounds, clock=clock)
        ready = {name: run.prefill() for name, run in runs.items()}

        def steps(name: str) -> None:
            logits, cache = ready[name]
            rows = cache.lengths.copy(), cache.slot.copy()
            runs[name].steps(cache, logits, STEPS)
            cache.lengths, cache.slot = rows  # the same steps again, over the same rows

        decode = alternate({name: lambda name=name: steps(name) for name in ("whole", "dropped")}, rounds, clock=clock)
        nbytes = {name: ready[name][1].nbytes for name in ready}
    speedup, selection = ratio(prefill["whole"], prefill["dropped"]), ratio(prefill["kept_all"], prefill["whole"]) - 1
    found = {"of_ideal": speedup / ideal, "selection": selection, "decode": ratio(decode["whole"], decode["dropped"])}
    met = {
        "of_ideal": found["of_ideal"] >= GOALS["of_ideal"],
        "selection": selection <= GOALS["selection"],
        "decode": found["decode"] >= GOALS["decode"],
    }
    return {
        "shape": dataclasses.asdict(shape),
        "layer": layer,
        "keep": keep,
        "flop_ratio": round(ideal, 3),
        "speedup": round(speedup, 3),
        **{n: round(v, 4) for n, v in found.items()},
        "goal": GOALS,
        "met": met,
        "cache_bytes": nbytes,
        "prefill": {n: summary(t) for n, t in prefill.items()},
        "decode_step": {n: summary([x / STEPS for x in t]) for n, t in decode.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="llava-like")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu time is steadier on a shared machine; for one thread only"
    )
    options = parser.parse_args()
    record: dict[str, Any] = {"machine": machine(options.threads), "clock": options.clock, "shapes": {}}
    for name in [*SHAPES] if options.shape == "all" else [options.shape]:
        keep = min(options.keep, SHAPES[name].visual // 2)
        found = record["shapes"][name] = compare(SHAPES[name], options.layer, keep, options.threads, options.rounds, options.clock)
        print(
            f"{name}: {SHAPES[name].visual} -> {keep} at layer {options.layer}: prefill "
            f"{found['speedup']:.2f}x of {found['flop_ratio']:.2f}x ideal = "
            f"{found['of_ideal']:.3f} (goal 0.95), selection {100 * found['selection']:.1f} % (goal 3), "
            f"decode {found['decode']:.2f}x (goal 1)",
            flush=True,
        )
        for part in ("prefill", "decode_step"):
            print(f"    {part:12s}" + "  ".join(f"{n} {t['median_ms']:.2f} ms" for n, t in found[part].items()), flush=True)
    print(save(f"drop_speed_{options.threads}_threads", record).name)


if __name__ == "__main__":
    main()
