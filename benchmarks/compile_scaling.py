"""Seconds and memory of capture, passes and FX -> ONNX against depth, on the LLaVA-1.5-7B geometry with weights on the meta device.

    python benchmarks/compile_scaling.py [--layers 8 16 32 64] [--output benchmarks/results/compile_scaling.json]

Each depth runs in a process of its own, so that peak RSS is its own. Goals: capture of 32 layers <= 60 s and <= 3 GB, passes <= 10 s,
conversion of a stage <= 15 s, all linear in the depth.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECIPE = "drop-fastv{layer=2,keep=64}, clean-up"


def measure(layers: int) -> dict[str, float]:
    import torch
    import transformers as T

    from foveate.export.onnx_weights import WeightFile
    from foveate.export.to_onnx import to_onnx
    from foveate.graph.capture import capture
    from foveate.passes import pipeline, recipe

    torch.set_num_threads(1)
    vision = T.CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14, projection_dim=768
    )
    text = T.LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32, vocab_size=32064)
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=32000, vision_feature_layer=-2)
    with torch.device("meta"):
        model = T.LlavaForConditionalGeneration(config).eval()
    out: dict[str, float] = {"layers": layers}

    def timed(name: str, function):
        start = time.perf_counter()
        result = function()
        out[name] = round(time.perf_counter() - start, 2)
        return result

    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    program = timed("capture_s", lambda: capture(model))
    out["capture_peak_rss_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    out["before_rss_gb"] = round(base, 2)
    out["nodes"] = sum(len(s.graph.nodes) for s in program.stages.values())
    timed("passes_s", lambda: pipeline.run(program, recipe.load(RECIPE)))
    with tempfile.TemporaryDirectory() as folder, WeightFile(Path(folder) / "weights.bin", zeros_for_meta=True) as weights:
        for stage in ("prefill", "decode"):
            timed(f"onnx_{stage}_s", lambda stage=stage: to_onnx(program[stage], stage, weights))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32, 64])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one)))
        return
    rows = []
    for layers in arguments.layers:
        done = subprocess.run([sys.executable, __file__, "--one", str(layers)], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"compile_scaling: {layers} layers failed: {done.stderr.strip().splitlines()[-1]}")
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(rows[-1], flush=True)
    if arguments.output:
        import onnx
        import torch
        import transformers

        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "onnx": onnx.__version__, "python": platform.python_version()}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(
            json.dumps({"machine": platform.processor() or platform.machine(), "threads": 1, "versions": versions, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
