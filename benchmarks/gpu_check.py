"""One run on a machine with a CUDA torch and no internet (at most 8 minutes): are the graphs right in half precision, and is a drop as fast as it should be?

    make gpu-check       or       python benchmarks/gpu_check.py [--geometry llava-7b] [--out DIR]

1. numbers  a small random LLaVA: every stage of the eager target on the device, float32 / float16 / bfloat16, against float32 on the CPU
2. speed    LLaVA-1.5-7B's geometry, random weights made on the device: prefill and decode, unreduced against drop-fastv, sdpa and torch.compile,
            next to the FLOP ratio of the cost model; peak memory
3. kernel   the fused decode attention over int8, int4 and mixed caches (Triton): right, and its share of a copy's bandwidth (kv_kernel.py)
4. training distillation of registers and adapters: the losses of the CPU, in float32 and bfloat16 (train_check.py)

Writes gpu_check.json and gpu_check.md into $OUT, or --out, or benchmarks/results. Exit code 1 when a bound is broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.simplefilter("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402

# |difference| / largest |reference|. float32: other kernels, other summation order (no TF32). Half types: about sqrt(layers) roundings of 2^-11 and 2^-8.
BOUNDS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
KEPT_OVERLAP = 0.8  # near-equal scores may swap in half precision; a wrong score would overlap like chance, keep / N
COMPILE_SECONDS = 100  # what compiling one more stage may take: not begun with less than that left


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A LLaVA by its sizes."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    vocab: int
    image: int
    patch: int
    vision_hidden: int
    vision_inner: int
    vision_layers: int
    vision_heads: int
    text_tokens: int
    keep: int
    layer: int = 2

    @property
    def visual(self) -> int:
        return (self.image // self.patch) ** 2


GEOMETRIES = {
    g.name: g
    for g in (
        Geometry("llava-7b", 4096, 11008, 32, 32, 32064, 336, 14, 1024, 4096, 24, 16, text_tokens=40, keep=64),
        Geometry("small", 512, 1408, 8, 8, 1000, 112, 14, 256, 1024, 4, 4, text_tokens=24, keep=16),
        Geometry("tiny", 64, 128, 3, 4, 200, 32, 8, 32, 64, 2, 4, text_tokens=12, keep=4, layer=1),
    )
}


def llava(g: Geometry, device: str, dtype: torch.dtype) -> Any:
    """A random model, initialised on the device in its type."""
    import transformers as T

    text = T.LlamaConfig(
        hidden_size=g.hidden,
        intermediate_size=g.inner,
        num_hidden_layers=g.layers,
        num_attention_heads=g.heads,
        num_key_value_heads=g.heads,
        vocab_size=g.vocab,
        max_position_embeddings=4096,
    )
    vision = T.CLIPVisionConfig(
        hidden_size=g.vision_hidden,
        intermediate_size=g.vision_inner,
        num_hidden_layers=g.vision_layers,
        num_attention_heads=g.vision_heads,
        image_size=g.image,
        patch_size=g.patch,
        projection_dim=g.vision_hidden,
    )
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=g.vocab - 1, image_seq_length=g.visual)
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            return T.LlavaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(before)


def programs(g: Geometry, model: Any, *methods: str) -> dict[str, Any]:
    """{"baseline": ..., method: ...} over the same parameters."""
    from foveate.graph.capture import capture
    from foveate.passes.pipeline import run
    from foveate.passes.recipe import load

    baseline = capture(model)
    return {"baseline": baseline, **{m: run(baseline.clone(), load(f"{m}{{layer={g.layer},keep={g.keep}}}, clean-up")) for m in methods}}


# -- 1. numbers


def check_numbers(g: Geometry, device: str) -> list[dict[str, Any]]:
    """Per precision and program: the worst relative difference of features, prefill logits and 4 decode steps, and the overlap of kept tokens."""
    model = llava(g, "cpu", torch.float32)
    found = []
    for name, program in programs(g, model, "drop-uniform", "drop-fastv").items():  # what uniform keeps does not hang on the last bit
        reference = answers(program, g, "cpu", "float32", "reference")
        for precision, bound in BOUNDS.items():
            found.append(_judge(name, precision, bound, reference, answers(program, g, device, precision, "sdpa")))
    return found


def answers(program: Any, g: Geometry, device: str, precision: str, attention: str) -> dict[str, np.ndarray]:
    """Vision, prefill and 4 forced decode steps of the eager target, through a real artifact."""
    from foveate.export.artifact import Artifact
    from foveate.export.backends import find

    backend = find("eager")
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "artifact"
        with Artifact.create(path) as draft:
            settings = backend.settings({"device": device, "precision": precision, "attention": attention})
            draft.manifest["components"] = backend.lower(program, draft.folder, settings)
            draft.manifest.update(target="eager", facts=dataclasses.asdict(program.facts), kv=[dataclasses.asdict(e) for e in program.kv])
        engine = backend.open(Artifact.load(path))
        features = engine.vision({"pixel_values": rng.standard_normal((2, 3, g.image, g.image)).astype(np.float32)})["image_features"]
        feeds = prompt(g, 2, features.astype(np.float32))
        outputs, cache = engine.prefill(feeds, feeds["input_ids"].shape[1] + 8)
        steps = [engine.decode(cache, np.full((2, 1), 5 + i), np.full((2, 1), feeds["input_ids"].shape[1] + i)) for i in range(4)]
        engine.close()
    kept = {k: v for k, v in outputs.items() if k.startswith("kept.")}
    return {"vision": features.astype(np.float32), "prefill": outputs["logits"].astype(np.float32), "decode": np.stack(steps).astype(np.float32), **kept}


def prompt(g: Geometry, batch: int, features: np.ndarray) -> dict[str, np.ndarray]:
    """One picture and text per sample."""
    ids = np.random.default_rng(1).integers(3, g.vocab - 2, (batch, g.text_tokens + g.visual))
    ids[:, 4 : 4 + g.visual] = g.vocab - 1
    positions = np.arange(ids.shape[1])[None].repeat(batch, 0)
    return {"input_ids": ids, "image_features": features.reshape(batch, g.visual, -1), "position_ids": positions, "attention_mask": np.ones_like(ids)}


def _judge(program: str, precision: str, bound: float, reference: dict[str, np.ndarray], got: dict[str, np.ndarray]) -> dict[str, Any]:
    kept = [k for k in reference if k.startswith("kept.")]
    overlap = min((len(set(a) & set(b)) / len(a) for k in kept for a, b in zip(reference[k].tolist(), got[k].tolist(), strict=True)), default=1.0)
    worst = {n: float(np.abs(got[n] - reference[n]).max() / np.abs(reference[n]).max()) for n in ("vision", "prefill", "decode")}
    judged = worst if overlap == 1.0 else {"vision": worst["vision"]}  # other tokens kept: other logits, by right
    return {
        "program": program,
        "precision": precision,
        "bound": bound,
        "worst": worst,
        "kept_overlap": overlap,
        "ok": all(v <= bound for v in judged.values()) and overlap >= (KEPT_OVERLAP if precision != "float32" else 1.0),
    }


# -- 2. speed


class Runner:
    """A program's prefill and decode on one device: plain torch functions in place of dialect ops, fused attention, a static cache."""

    def __init__(self, program: Any, g: Geometry, device: str, dtype: torch.dtype, batch: int = 1):
        self.names = {s: (program[s].inputs, program[s].outputs) for s in ("prefill", "decode")}
        self.calls: dict[str, Callable[..., Any]] = {s: plain(program[s]) for s in ("prefill", "decode")}
        self.kv, self.device = program.kv, device
        features = torch.randn(batch * g.visual, g.hidden, generator=torch.Generator().manual_seed(2)).numpy()
        self.feeds = {n: torch.from_numpy(v).to(device) for n, v in prompt(g, batch, features).items()}
        self.feeds["image_features"] = self.feeds["image_features"].to(dtype)

    def compiled(self) -> None:
        self.calls = {s: torch.compile(c, dynamic=False) for s, c in self.calls.items()}

    @torch.no_grad()
    def prefill(self) -> dict[str, torch.Tensor]:
        inputs, outputs = self.names["prefill"]
        return dict(zip(outputs, self.calls["prefill"](*[self.feeds[n] for n in inputs]), strict=True))

    def cache(self, out: dict[str, torch.Tensor], spare: int = 32) -> dict[str, torch.Tensor]:
        """Decode's feeds after a prefill."""
        B, S = self.feeds["input_ids"].shape
        past = {f"past_{w}.{e.layer}": torch.nn.functional.pad(out[f"{w}.{e.layer}"], (0, 0, 0, spare)) for e in self.kv for w in "kv"}
        ones = torch.ones(B, 1, dtype=torch.int64, device=self.device)
        return {"input_ids": ones, "position_ids": ones * S, "lengths": out["kv_lengths"], **past}

    @torch.no_grad()
    def decode(self, feeds: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.calls["decode"](*[feeds[n] for n in self.names["decode"][0]])[0]


def plain(stage: Any) -> Any:
    """A copy of the stage's module in which every dialect op is its torch body and attention is torch's fused one, so that a compiler sees through."""
    from foveate.export.backends.eager import sdpa
    from foveate.graph.ops import REFERENCE

    copy = stage.clone()
    for node in copy.graph.nodes:
        if node.op == "call_function":
            node.target = sdpa if node.target is torch.ops.foveate.attention.default else REFERENCE.get(node.target, node.target)
    copy.module.recompile()
    return copy.module


def check_speed(g: Geometry, device: str, dtype: torch.dtype, deadline: float, rounds: int, compile_too: bool = True) -> dict[str, Any]:
    from foveate.report import Figures

    made = programs(g, llava(g, device, dtype), "drop-fastv")
    both = {"baseline": made["baseline"], "reduced": made["drop-fastv"]}
    figures = {n: Figures.of(p, text_tokens=g.text_tokens) for n, p in both.items()}
    ideal = figures["baseline"].prefill_flops / figures["reduced"].prefill_flops
    found: dict[str, Any] = {
        "geometry": dataclasses.asdict(g),
        "dtype": str(dtype).removeprefix("torch."),
        "flop_ratio": ideal,
        "gflops": {n: f.prefill_flops / 1e9 for n, f in figures.items()},
        "kv_bytes": {n: f.kv_bytes for n, f in figures.items()},
        "modes": {},
    }
    runners = {n: Runner(p, g, device, dtype) for n, p in both.items()}
    for mode in ("sdpa", "compile"):
        if mode == "compile":
            left = deadline - time.monotonic()
            if not compile_too or left < 4 * COMPILE_SECONDS:
                found["modes"][mode] = {"not_run": f"{left:.0f} s were left, four stages to compile may take {4 * COMPILE_SECONDS} s"}
                continue
            for runner in runners.values():
                runner.compiled()
        found["modes"][mode] = _mode(runners, device, ideal, rounds)
    return found


def _mode(runners: dict[str, Runner], device: str, ideal: float, rounds: int) -> dict[str, Any]:
    """Both programs in turns: medians, the speed-up of neighbours, peak memory above the weights."""
    prefill = alternate({n: r.prefill for n, r in runners.items()}, device, rounds)
    feeds = {n: r.cache(r.prefill()) for n, r in runners.items()}
    decode = alternate({n: (lambda r=r, f=feeds[n]: r.decode(f)) for n, r in runners.items()}, device, rounds)
    speedup = median(b / a for b, a in zip(prefill["baseline"], prefill["reduced"], strict=True))
    return {
        "prefill_ms": {n: median(t) for n, t in prefill.items()},
        "decode_ms": {n: median(t) for n, t in decode.items()},
        "prefill_speedup": speedup,
        "share_of_ideal": speedup / ideal,
        "decode_speedup": median(b / a for b, a in zip(decode["baseline"], decode["reduced"], strict=True)),
        "peak_mb": {n: peak(r.prefill, device) for n, r in runners.items()},
    }


def alternate(candidates: dict[str, Callable[[], Any]], device: str, rounds: int, warm_up: int = 3) -> dict[str, list[float]]:
    """Milliseconds, the device waited for."""
    times: dict[str, list[float]] = {n: [] for n in candidates}
    for turn in range(-warm_up, rounds):
        for name, call in candidates.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def peak(call: Callable[[], Any], device: str) -> float | None:
    """MB that one call needs above what lies on the device; None without CUDA."""
    if not device.startswith("cuda"):
        return None
    wait(device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    wait(device)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


# -- 3. kernel


def check_kernel(device: str, rounds: int) -> dict[str, Any]:
    """`kv_kernel.measure`; where its kernels cannot run, the reason."""
    from benchmarks import kv_kernel

    return kv_kernel.measure(device, max(rounds, 5))


# -- 4. training


def check_training(g: Geometry, device: str) -> dict[str, Any]:
    from benchmarks import train_check

    return train_check.measure(llava(g, "cpu", torch.float32), g, device)


# -- the record


def machine(device: str) -> dict[str, Any]:
    import transformers

    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {"gpu": gpu, "torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__, "python": platform.python_version()}


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        f"# GPU check: {record['machine']['gpu'] or 'no GPU'}, torch {record['machine']['torch']}, {record['seconds']:.0f} s",
        "",
        "| program | precision | vision | prefill | decode | bound | kept overlap | ok |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in record["numbers"]:
        w = r["worst"]
        lines.append(
            f"| {r['program']} | {r['precision']} | {w['vision']:.1e} | {w['prefill']:.1e} | {w['decode']:.1e} | {r['bound']:.0e} "
            f"| {r['kept_overlap']:.2f} | {'yes' if r['ok'] else 'NO'} |"
        )
    s = record["speed"]
    lines += [
        "",
        f"{s['geometry']['name']}, {s['dtype']}, keep {s['geometry']['keep']} of {record['visual']} visual tokens from layer {s['geometry']['layer']} on; "
        f"FLOP ratio {s['flop_ratio']:.2f}",
        "",
        "| mode | prefill ms, before -> after | speed-up | of the FLOP ratio | decode ms, before -> after | peak MB |",
        "|---|---|---|---|---|---|",
    ]
    for mode, m in s["modes"].items():
        if "not_run" in m:
            lines.append(f"| {mode} | not run: {m['not_run']} | | | | |")
            continue
        p, d, memory = m["prefill_ms"], m["decode_ms"], m["peak_mb"]
        used = "-" if memory["baseline"] is None else f"{memory['baseline']:.0f} -> {memory['reduced']:.0f}"
        lines.append(
            f"| {mode} | {p['baseline']:.2f} -> {p['reduced']:.2f} | {m['prefill_speedup']:.2f}x | {m['share_of_ideal']:.0%} "
            f"| {d['baseline']:.2f} -> {d['reduced']:.2f} | {used} |"
        )
    from benchmarks import kv_kernel, train_check

    return "\n".join([*lines, "", kv_kernel.table(record["kernel"]), train_check.table(record["training"])])


def check(device: str, geometry: str, numbers: str, seconds: float, rounds: int, compile_too: bool) -> dict[str, Any]:
    start = time.monotonic()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    g = GEOMETRIES[geometry]
    record = {"machine": machine(device), "visual": g.visual, "numbers": check_numbers(GEOMETRIES[numbers], device)}
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    record["speed"] = check_speed(g, device, dtype, start + seconds, rounds, compile_too)
    record["kernel"] = check_kernel(device, rounds)
    record["training"] = check_training(GEOMETRIES[numbers], device)
    record["seconds"] = round(time.monotonic() - start, 1)
    right = [*(r["ok"] for r in record["numbers"]), record["kernel"].get("right", True), record["training"]["right"]]
    record["ok"] = all(right)  # a bandwidth below its goal is reported, not an error
    return record


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--geometry", choices=GEOMETRIES, default="llava-7b", help="of the speed part")
    p.add_argument("--numbers", choices=GEOMETRIES, default="small", help="of the part about numbers")
    p.add_argument("--seconds", type=float, default=480, help="time budget; torch.compile is left out when it would not fit")
    p.add_argument("--rounds", type=int, default=10)
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or Path(__file__).parent / "results"))
    a = p.parse_args()
    if a.device.startswith("cuda") and not torch.cuda.is_available():
        print("error: gpu-check: torch sees no CUDA device here; --device cpu --geometry tiny --numbers tiny runs the same code on a CPU", file=sys.stderr)
        return 3
    record = check(a.device, a.geometry, a.numbers, a.seconds, a.rounds, not a.no_compile)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "gpu_check.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (a.out / "gpu_check.md").write_text(table(record), encoding="utf-8")
    print(table(record))
    return 0 if record["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
