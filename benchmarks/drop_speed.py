"""Does a token drop buy what its FLOPs say? Prefill of the ONNX Runtime stages before and after a drop, against the cost model.

    python -m benchmarks.drop_speed [--shape llava-like] [--keep 64] [--layer 2] [--threads 1] [--rounds 15]

Recipe: drop-fastv, clean-up; "early" adds gather-early. Goals: speed-up of prefill >= 0.95 of the FLOP ratio; selection <= 3 % of prefill; a
decode step not slower than unreduced.
Selection, twice: the time of the nodes that the drop adds, by ONNX Runtime's profile (sum of their fastest rounds; an upper bound), and what a
drop that keeps every token adds to whole runs (scores, top-k and gathers, and nothing saved).
`where` says what the rest of the difference is. The FLOP ratio prices rows only. A product over few rows still reads its whole weight matrix
from memory: `products` sets the time of a layer's products in the model beside the same products on weights that stay in the cache.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from foveate.graph.capture import capture
from foveate.graph.cost import cost
from foveate.graph.kv_table import derive_kv
from foveate.passes.methods.clean_up import CleanUp
from foveate.passes.methods.drop_fastv import DropFastV
from foveate.passes.methods.gather_early import GatherEarly

try:
    from . import node_profile
    from .measure import alternate, machine, ratio, save, summary
    from .ort_vs_hf import STEPS, Ours, lower
    from .shapes import SHAPES, Shape
except ImportError:  # run as a script
    import node_profile
    from measure import alternate, machine, ratio, save, summary
    from ort_vs_hf import STEPS, Ours, lower
    from shapes import SHAPES, Shape

GOALS = {"of_ideal": 0.95, "selection": 0.03, "decode": 1.0}


def drop(program: Any, layer: int, keep: int, early: bool = False) -> Any:
    reduced = program.clone()
    DropFastV(layer=layer, keep=keep).run(reduced)
    if early:
        GatherEarly().run(reduced)
    CleanUp().run(reduced)
    reduced.kv = derive_kv(reduced)
    node_profile.mark(reduced, program)
    return reduced


def flops(program: Any, sizes: dict[str, int]) -> float:
    return cost(program, "prefill").at(**sizes)["flops"]


PARTS = {"MatMul": "products", "Gemm": "products", "GroupQueryAttention": "attention"}


def parts(found: dict[str, tuple[str, float]]) -> dict[str, float]:
    """Milliseconds of a profile by what they are spent on."""
    total: dict[str, float] = collections.defaultdict(float)
    for name, (kind, ms) in found.items():
        total["selection" if name.startswith(f"{node_profile.MARK}/") else PARTS.get(kind, "rest")] += ms
    return dict(total)


def where(shape: Shape, layer: int, keep: int, runs: dict[str, Any], folder: Path, rounds: int) -> dict[str, Any]:
    """Per part: milliseconds unreduced, what its rows (products, rest) or pairs (attention) leave of them, and what was found."""
    found = {n: node_profile.prefill(runs[n], folder / n / "components/prefill.onnx", rounds) for n in ("whole", "dropped")}
    whole, dropped = parts(found["whole"]), parts(found["dropped"])
    long, short = shape.text + shape.visual, shape.text + keep
    rows = (layer + (shape.layers - layer) * short / long) / shape.layers
    pairs = (layer + (shape.layers - layer) * (short / long) ** 2) / shape.layers
    ideal = {"products": whole["products"] * rows, "rest": whole["rest"] * rows, "attention": whole["attention"] * pairs, "selection": 0.0}
    slow = sorted(node_profile.added(found["dropped"]).items(), key=lambda item: -item[1])[:6]
    return {
        "parts_ms": {n: {"whole": round(whole.get(n, 0), 3), "ideal": round(ideal[n], 3), "dropped": round(dropped[n], 3)} for n in ideal},
        "selection_nodes": sum(n.startswith(f"{node_profile.MARK}/") for n in found["dropped"]),
        "slowest_selection_nodes_ms": {n: round(ms, 3) for n, ms in slow},
    }


def products(shape: Shape, rows: int, rounds: int = 15) -> dict[str, float]:
    """Milliseconds of one layer's products over so many rows: weights in the cache (one layer again and again), or one layer after the other."""
    kv = shape.groups * shape.width // shape.heads
    sizes = [(shape.width, n) for n in (shape.width, kv, kv, shape.width, shape.inner, shape.inner)] + [(shape.inner, shape.width)]
    cached = sum(_product(rows, k, n, 1, rounds) for k, n in sizes)
    memory = sum(_product(rows, k, n, shape.layers, rounds) for k, n in sizes)
    return {"cached_ms": round(cached, 4), "from_memory_ms": round(memory, 4)}


def _product(rows: int, k: int, n: int, copies: int, rounds: int) -> float:
    """Fastest milliseconds of one [rows, k] x [k, n]; `copies` different matrices take turns."""
    generator = np.random.default_rng(0)
    weights = [numpy_helper.from_array(generator.standard_normal((k, n), np.float32), f"w{i}") for i in range(copies)]
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(copies)]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, [rows, n]) for i in range(copies)]
    graph = helper.make_graph(nodes, "products", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [rows, k])], outputs, weights)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    x, binding = generator.standard_normal((rows, k), np.float32), session.io_binding()
    binding.bind_cpu_input("x", x)
    kept = [np.empty((rows, n), np.float32) for _ in range(copies)]
    for i, y in enumerate(kept):
        binding.bind_output(f"y{i}", "cpu", 0, np.float32, y.shape, y.ctypes.data)
    times = alternate({"once": lambda: session.run_with_iobinding(binding)}, rounds)["once"]
    return min(times) / copies


def compare(shape: Shape, layer: int, keep: int, threads: int, rounds: int, clock: str) -> dict[str, Any]:
    torch.set_num_threads(threads)
    prompt = shape.prompt()
    whole = capture(shape.model())
    early = drop(whole, layer, keep, early=True)
    programs = {"whole": whole, "dropped": drop(whole, layer, keep), "early": early, "kept_all": drop(whole, layer, shape.visual)}
    CleanUp().run(whole)
    sizes = {"B": 1, "S": shape.text + shape.visual, "N": shape.visual}
    ideal, ideal_early = (flops(programs["whole"], sizes) / flops(programs[n], sizes) for n in ("dropped", "early"))
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Ours(lower(p, Path(folder) / name, threads=threads), prompt) for name, p in programs.items()}
        prefill = alternate({name: run.prefill for name, run in runs.items()}, rounds, clock=clock)
        ready = {name: run.prefill() for name, run in runs.items()}

        def steps(name: str) -> None:
            logits, cache = ready[name]
            parts, slot = dict(cache.parts), cache.slot
            runs[name].steps(cache, logits, STEPS)
            cache.parts, cache.slot = parts, slot  # the same steps again, over the same rows

        decode = alternate({name: lambda name=name: steps(name) for name in ("whole", "dropped")}, rounds, clock=clock)
        nbytes = {name: ready[name][1].nbytes for name in ready}
        spent = where(shape, layer, keep, runs, Path(folder), max(rounds // 3, 3))
    speedup, selection = ratio(prefill["whole"], prefill["dropped"]), ratio(prefill["kept_all"], prefill["whole"]) - 1
    speedup_early = ratio(prefill["whole"], prefill["early"])
    nodes = spent["parts_ms"]["selection"]["dropped"] / min(prefill["whole"])
    found = {
        "of_ideal": speedup / ideal,
        "of_ideal_fastest": min(prefill["whole"]) / min(prefill["dropped"]) / ideal,
        "selection": nodes,
        "selection_by_runs": selection,
        "decode": ratio(decode["whole"], decode["dropped"]),
    }
    met = {n: found[n] <= goal if n == "selection" else found[n] >= goal for n, goal in GOALS.items()}
    return {
        "shape": dataclasses.asdict(shape),
        "layer": layer,
        "keep": keep,
        "flop_ratio": round(ideal, 3),
        "speedup": round(speedup, 3),
        **{n: round(v, 4) for n, v in found.items()},
        "early": {"flop_ratio": round(ideal_early, 3), "speedup": round(speedup_early, 3), "of_ideal": round(speedup_early / ideal_early, 4),
                  "of_ideal_of_the_drop": round(speedup_early / ideal, 4)},
        "goal": GOALS,
        "met": met,
        "where": spent | {"products_of_a_layer": {str(r): products(shape, r) for r in (shape.text + keep, shape.text + shape.visual)}},
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
            f"{found['of_ideal']:.3f} (goal 0.95; of the fastest runs {found['of_ideal_fastest']:.3f}), gather-early {found['early']['speedup']:.2f}x "
            f"of {found['early']['flop_ratio']:.2f}x, selection {100 * found['selection']:.2f} % by nodes (goal 3), "
            f"{100 * found['selection_by_runs']:.1f} % by runs, decode {found['decode']:.2f}x (goal 1)",
            flush=True,
        )
        for part in ("prefill", "decode_step"):
            print(f"    {part:12s}" + "  ".join(f"{n} {t['median_ms']:.2f} ms" for n, t in found[part].items()), flush=True)
        print(f"    {'where, ms':12s}" + "  ".join(f"{n} {t['whole']:.2f} -> {t['dropped']:.2f} (rows alone: {t['ideal']:.2f})"
                                                  for n, t in found["where"]["parts_ms"].items()), flush=True)
        print(f"    {'products':12s}" + "  ".join(f"{r} rows: {t['cached_ms']:.2f} ms cached, {t['from_memory_ms']:.2f} ms from memory"
                                                 for r, t in found["where"]["products_of_a_layer"].items()), flush=True)
    print(save(f"drop_speed_{options.threads}_threads", record).name)


if __name__ == "__main__":
    main()
