"""Decode over a long cache on ONNX Runtime: int8, int4 and mixed codes against float32 rows, all written in place.

    python -m benchmarks.kv_speed [--tokens 4096] [--threads 1] [--rounds 25]

Goals at 4096 tokens: int8 >= 1.5x and int4 >= 1.2x the speed of float32, mixed not slower, per attention and per whole step of a model of 12
layers and width 512; growth of the process's memory within 5% of the computed bytes: `KVFormat.bytes`, and what a step unpacks (`scratch_bytes`).
"attention": the nodes of one layer's decode attention, cut out of the lowered program, caches bound in place. "step": a whole decode step. "nodes":
where a step's time goes (profiled, fastest round of every node), and what the step would gain if attention cost nothing. Random weights and random
cache contents: no prefill is timed, and what a step costs does not depend on the values. Attention is compared with the eager program before it is
timed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveate.export.artifact import Artifact
from foveate.export.backends import find
from foveate.export.backends.ort import TYPES, scratch_bytes, share_scratch
from foveate.export.expand import expand
from foveate.export.kv_packing import pack_codes, packed_width
from foveate.export.onnx_contrib import plain
from foveate.export.onnx_dialect import PORTABLE
from foveate.export.onnx_kv import KVContrib
from foveate.export.onnx_kv_ops import KV_OPS
from foveate.export.onnx_registry import EMITTERS
from foveate.export.sizes import evaluate
from foveate.export.to_onnx import to_onnx
from foveate.graph.capture import capture
from foveate.graph.kv_format import BITS, FLOAT, KVFormat
from foveate.graph.program import Program, Stage
from foveate.passes import pipeline, recipe

try:
    from .measure import alternate, machine, ratio, save, summary
    from .node_profile import minima
    from .ort_vs_hf import lower
    from .shapes import SHAPES, Shape
except ImportError:  # run as a script
    from measure import alternate, machine, ratio, save, summary
    from node_profile import minima
    from ort_vs_hf import lower
    from shapes import SHAPES, Shape

RECIPES = {
    "float32": None,
    "int8": "kv-int8",
    "int4": "kv-int4",
    "mixed int8/int4": "kv-zipcache{hi=int8,lo=int4,important=0.25,text=false}",
    "zipcache int4/int2": "kv-int4{layers=[0]}, kv-zipcache{text=false,important=0.22,recent=1}",  # as in kv_accuracy
}
GOALS = {"int8": 1.5, "int4": 1.2, "mixed int8/int4": 1.0}
MEMORY_GOAL = 0.05
SPARE = 64  # rows behind the prompt


def programs(shape: Shape) -> dict[str, Program]:
    base = capture(shape.model())
    made = {}
    for name, text in RECIPES.items():
        made[name] = base.clone()
        if text:
            pipeline.run(made[name], recipe.load(text))
    return made


# ** one attention **


def attention_stage(program: Program, layer: int) -> Stage:
    """What the decode stage does between q, k, v of the new token and the attention's output, as a stage of its own."""
    stage, ops = program["decode"], torch.ops.foveate
    attention = next(n for n in stage.graph.nodes if n.target is ops.attention.default and n.args[-1] == layer)
    new = {n.args[3]: n.args[1] for n in stage.graph.nodes if n.target is ops.kv_append.default and n.args[2] == layer}
    stored = (ops.dequantize_kv.default, ops.quantize_kv.default, ops.kv_store.default)
    for which, node in new.items():
        while (node := plain(node)).target in stored:
            node = node.args[0]
        new[which] = node
    outputs = {"y": attention, **{o: n for o, n in stage.output_nodes.items() if o.split(".")[1:2] == [str(layer)]}}
    graph, copies = torch.fx.Graph(), {}
    for name, node in {"q": attention.args[0], **new}.items():
        copies[node] = graph.placeholder(name)
        copies[node].meta |= {"name": name, "val": node.meta["val"]}
    needed, todo = set(), list(outputs.values())
    while todo:
        node = todo.pop()
        if node not in needed and node not in copies:
            needed.add(node)
            todo += node.all_input_nodes
    for node in (n for n in stage.graph.nodes if n in needed):
        copies[node] = graph.node_copy(node, lambda n: copies[n])
    graph.output(tuple(copies[n] for n in outputs.values()))
    return Stage(torch.fx.GraphModule(stage.module, graph), list(outputs))


class Attention:
    """One layer's decode attention on ONNX Runtime, its caches bound in place, and what eager says of the same values."""

    def __init__(self, program: Program, tokens: int, batch: int, threads: int) -> None:
        import onnxruntime

        stage = attention_stage(program, 1)  # zipcache treats the first layer otherwise
        feeds = _feeds(stage, program, tokens, batch)
        self.want = stage.run(feeds)["y"].numpy()
        packed = pack_codes(stage, program.kv)
        held = expand(packed, {**EMITTERS, **PORTABLE, **KV_OPS}).clone()
        contrib = KVContrib(held, "decode", program.kv)
        model = to_onnx(held, "attention", None, KV_OPS, at=contrib.emitters)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        self.session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self.io = self.session.io_binding()
        self.arrays = {i.name: _stored(feeds[i.name].numpy(), i) for i in self.session.get_inputs()}
        for name, array in self.arrays.items():
            self.io.bind_input(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)
        self.arrays |= {f"past_{name}": a for name, a in share_scratch(contrib.scratch, self.arrays).items()}
        for output in self.session.get_outputs():
            past = f"past_{output.name}"
            if output.name not in (*contrib.in_place, *contrib.scratch):
                sizes = [batch if isinstance(s, str) else s for s in output.shape]
                self.arrays[past] = np.empty(sizes, TYPES[output.type])
            array = self.arrays[past]
            self.io.bind_output(output.name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        self.session.run_with_iobinding(self.io)

    def error(self) -> float:
        self.run()
        return float(np.abs(self.arrays["past_y"].reshape(self.want.shape) - self.want).max() / np.abs(self.want).max())


def _feeds(stage: Stage, program: Program, tokens: int, batch: int) -> dict[str, torch.Tensor]:
    """Random values; every partition has the rows that its prompt of `tokens` would give it, and room for more."""
    generator = torch.Generator().manual_seed(0)
    table = {e.layer: e.format or FLOAT for e in program.kv}
    feeds = {}
    for node in stage.graph.nodes:
        if node.op != "placeholder":
            continue
        name, val = node.meta.get("name", node.name), node.meta["val"]
        sizes = [s if isinstance(s, int) else batch for s in val.shape]
        if name.startswith("lengths"):
            part = name.partition(".")[2]
            rows = [_rows(table[e.layer], part, e.length, tokens) for e in program.kv]
            feeds[name] = torch.tensor(rows)[:, None].expand(-1, batch).contiguous()
            continue
        if name.startswith("past_") and not isinstance(val.shape[2], int):
            layer, part = int(name.split(".")[1]), _part(name)
            sizes[2] = _rows(table[layer], part, program.kv[0].length, tokens) + (1 if part else SPARE)
        feeds[name] = _random(sizes, val.dtype, name, table, generator)
    return feeds


def _part(name: str) -> str:
    return next((p for p in name.split(".")[2:] if p not in ("scale", "center", "balance")), "")


def _rows(form: KVFormat, part: str, length: str, tokens: int) -> int:
    found = next((p.rows if form is not FLOAT else length for p in form.partitions if p.name == part), "0")
    return evaluate(found, {"S": tokens, "N": tokens - 32})


def _random(sizes: list[int], kind: torch.dtype, name: str, table: dict[int, KVFormat], generator: torch.Generator) -> torch.Tensor:
    if kind == torch.int8:
        part = next(p for p in table[int(name.split(".")[1])].partitions if p.name == _part(name))
        top = 2 ** (BITS[part.code] - 1)
        return torch.randint(-top, top, sizes, generator=generator, dtype=torch.int8)
    value = torch.randn(sizes, generator=generator)
    return value.abs() * 0.02 + 0.01 if name.endswith(".scale") else value


def _stored(array: np.ndarray, spec: Any) -> np.ndarray:
    """As the engine stores it: sub-byte codes packed."""
    kind = TYPES[spec.type]
    if kind is np.uint8:
        bits = next(b for b in (4, 2, 1) if packed_width(array.shape[3], b) == spec.shape[3])
        array = torch.ops.foveate.pack_kv(torch.from_numpy(array), bits).numpy().view(np.uint8) ^ 128
    return np.ascontiguousarray(array, kind)


# ** a whole step **


def filled(engine: Any, program: Program, tokens: int, batch: int) -> Any:
    """A cache as after a prompt of `tokens`, with random contents."""
    feeds = {"input_ids": np.zeros((batch, tokens), np.int64), "image_features": np.zeros((batch, tokens - 32, 1), np.float32)}
    cache, random = engine._new_cache(feeds, SPARE), np.random.default_rng(0)
    for name, array in cache.buffers.items():
        if array.dtype == np.float32:
            array[...] = random.standard_normal(array.shape, np.float32) if not name.endswith(".scale") else 0.02
        else:
            array.view(np.uint8)[...] = random.integers(0, 256, array.shape, np.uint8)
    table = [(e.format or FLOAT, e.length) for e in program.kv]
    for part in {p.name for form, _ in table for p in form.partitions}:
        rows = [_rows(form, part, length, tokens) for form, length in table]
        cache.parts[f"lengths.{part}" if part else "lengths"] = np.array(rows, np.int64)[:, None].repeat(batch, 1)
    cache.slot = np.full((batch, 1), tokens)
    return cache


def computed(program: Program, cache: Any) -> int:
    """Bytes by `KVFormat.bytes` for the rows that the cache has room for."""
    total = 0
    for e in program.kv:
        form = e.format or FLOAT
        rows = {p.name: cache.buffers[f"past_k.{e.layer}{p.suffix()}"].shape[2] for p in form.partitions}
        total += cache.batch * form.bytes(rows, e.heads, e.head_dim, e.value_dim, 4)
    return total


def stepper(engine: Any, cache: Any, tokens: int) -> Any:
    """A decode step that leaves the cache as it found it."""
    ids, positions = np.full((cache.batch, 1), 7), np.full((cache.batch, 1), tokens)

    def step() -> None:
        engine.decode(cache, ids, positions)
        cache.parts["lengths"] = cache.lengths - 1
        cache.slot = cache.slot - 1

    return step


def nodes(engine: Any, folder: Path, cache: Any, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a step in attention, in products with weights and in all other nodes; how many nodes there are."""
    plain, step, found = engine.sessions["decode"], stepper(engine, cache, tokens), {"attention": 0.0, "weights": 0.0, "other": 0.0}

    def once(profiled: Any) -> None:
        if engine.sessions["decode"] is not profiled:
            engine.sessions["decode"], cache.bound = profiled, None
        step()

    try:
        times = minima(folder / "components" / "decode.onnx", once, rounds)
    finally:
        engine.sessions["decode"], cache.bound = plain, None
    for kind, ms in times.values():
        found[{"GroupQueryAttention": "attention", "MatMul": "weights", "Gemm": "weights"}.get(kind, "other")] += ms
    rest = found["weights"] + found["other"]
    return {**{n: round(ms, 3) for n, ms in found.items()}, "nodes": len(times), "gain_if_attention_were_free": round((found["attention"] + rest) / rest, 3)}


# ** memory **


def memory(program: Program, folder: Path, tokens: int, batch: int) -> dict[str, Any]:
    """Growth of a process's peak memory from a short cache to one of `tokens`, steps included, against the computed bytes."""
    code = (
        "from pathlib import Path\n"
        "from benchmarks import kv_speed as K\n"
        f"K.measure_memory(Path({str(folder)!r}), {tokens}, {batch})"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if run.returncode:
        raise SystemExit(f"kv_speed: the memory measurement failed:\n{run.stderr[-2000:]}")
    grown, held, want, unpacked = (int(x) for x in run.stdout.split()[-4:])
    return {
        "computed_mib": _mib(want + unpacked),
        "of_these_scratch_mib": _mib(unpacked),
        "buffers_mib": _mib(held),
        "process_mib": _mib(grown),
        "process_over_computed": round(grown / (want + unpacked), 4),
    }


def measure_memory(folder: Path, tokens: int, batch: int) -> None:
    """Prints growth of peak memory, bytes of the buffers, computed bytes of the cache and of what a step unpacks."""
    artifact = Artifact.load(folder)
    engine = find("ort").open(artifact)
    program = Bare(artifact.manifest["kv"])
    short = filled(engine, program, 64, batch)
    for _ in range(3):
        stepper(engine, short, 64)()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts here; a child's getrusage would begin with its parent's
    before = _resident("VmHWM")
    cache = filled_in_place(engine, program, tokens, batch)
    for _ in range(3):
        stepper(engine, cache, tokens)()
    unpacked = scratch_bytes(engine.manifest["decode"]["scratch"], cache.buffers)
    print(_resident("VmHWM") - before, cache.nbytes, computed(program, cache), unpacked)


def _resident(field: str) -> int:
    """Bytes, by the kernel's account of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


class Bare:
    """The KV table of a manifest, as a program has it."""

    def __init__(self, table: list[dict[str, Any]]) -> None:
        from foveate.graph.program import KVLayer

        self.kv = [KVLayer(**{**entry, "format": KVFormat.read(entry["format"])}) for entry in table]


def filled_in_place(engine: Any, program: Any, tokens: int, batch: int) -> Any:
    """`filled` with constants: random arrays would count as memory themselves."""
    feeds = {"input_ids": np.zeros((batch, tokens), np.int64), "image_features": np.zeros((batch, tokens - 32, 1), np.float32)}
    cache = engine._new_cache(feeds, SPARE)
    for array in cache.buffers.values():
        array.fill(1)
    for part in {p.name for e in program.kv for p in (e.format or FLOAT).partitions}:
        rows = [_rows(e.format or FLOAT, part, e.length, tokens) for e in program.kv]
        cache.parts[f"lengths.{part}" if part else "lengths"] = np.array(rows, np.int64)[:, None].repeat(batch, 1)
    cache.slot = np.full((batch, 1), tokens)
    return cache


def _mib(count: int) -> float:
    return round(count / 2**20, 3)


# ** all of it **


def compare(shape: Shape, tokens: int, threads: int, rounds: int, batches: list[int]) -> dict[str, Any]:
    torch.set_num_threads(threads)
    made = programs(shape)
    record: dict[str, Any] = {"shape": shape.name, "tokens": tokens, "recipes": RECIPES, "attention": {}, "step": {}, "nodes": {}, "memory": {}}
    for batch in batches:
        layers = {name: Attention(p, tokens, batch, threads) for name, p in made.items()}
        errors = {name: layer.error() for name, layer in layers.items()}
        if max(errors.values()) > 1e-5:  # float32 sums over 4096 rows in another order stay an order below this
            raise SystemExit(f"kv_speed: an attention differs from eager: {errors}")
        times = alternate({name: layer.run for name, layer in layers.items()}, 2 * rounds)
        record["attention"][f"batch {batch}"] = _line(times) | {"error": {n: float(f"{e:.1e}") for n, e in errors.items()}}
        _show(f"attention, batch {batch}", record["attention"][f"batch {batch}"])
    with tempfile.TemporaryDirectory() as folder:
        engines = {name: lower(p, Path(folder) / name.replace("/", "-"), threads=threads) for name, p in made.items()}
        for batch in batches:
            runs = {name: stepper(e, filled(e, made[name], tokens, batch), tokens) for name, e in engines.items()}
            record["step"][f"batch {batch}"] = _line(alternate(runs, rounds))
            _show(f"step, batch {batch}", record["step"][f"batch {batch}"])
        for name, e in engines.items():
            record["nodes"][name] = nodes(e, Path(folder) / name.replace("/", "-"), filled(e, made[name], tokens, batches[0]), tokens, 10)
            print(f"nodes of a step, batch {batches[0]}, {name}: {record['nodes'][name]}", flush=True)
        for name, program in made.items():
            record["memory"][name] = memory(program, Path(folder) / name.replace("/", "-"), tokens, batches[-1])
            print(f"memory, batch {batches[-1]}, {name}: {record['memory'][name]}", flush=True)
    record["goal"] = GOALS
    record["met"] = {
        part: {batch: {n: line["ratio"][n] >= g for n, g in GOALS.items()} for batch, line in record[part].items()} for part in ("attention", "step")
    } | {"memory": {n: abs(m["process_over_computed"] - 1) <= MEMORY_GOAL for n, m in record["memory"].items()}}
    return record


def _line(times: dict[str, list[float]]) -> dict[str, Any]:
    return {
        "ms": {n: summary(t) for n, t in times.items()},
        "ratio": {n: round(ratio(times["float32"], t), 3) for n, t in times.items()},
        "ratio_of_min": {n: round(min(times["float32"]) / min(t), 3) for n, t in times.items()},
    }


def _show(title: str, line: dict[str, Any]) -> None:
    print(f"{title}: " + "  ".join(f"{n} {t['median_ms']:.3f} ms ({line['ratio'][n]:.2f}x)" for n, t in line["ms"].items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="llava-like")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    options = parser.parse_args()
    start = time.perf_counter()
    record = {"machine": machine(options.threads), **compare(SHAPES[options.shape], options.tokens, options.threads, options.rounds, options.batches)}
    record["seconds"] = round(time.perf_counter() - start, 1)
    print(record["met"])
    print(save("kv_speed", record).name)


if __name__ == "__main__":
    main()
