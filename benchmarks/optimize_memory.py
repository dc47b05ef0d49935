"""Peak host memory of `foveate optimize` against the size of the weights: they stream to disk, and are never there twice.

    python benchmarks/optimize_memory.py [--width 2048] [--layers 24] [--output benchmarks/results/optimize_memory.json]

A LLaVA of random float32 weights is saved as a checkpoint; the command runs on it in a process of its own (target ort, drop-fastv). Goal: peak RSS <=
1.3x the weights. The model is large enough that the interpreter's own half gigabyte does not decide.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def checkpoint(folder: Path, width: int, layers: int) -> int:
    """Save the model with the testbed's processor; returns the bytes of its weights."""
    import shutil

    import torch
    import transformers as T

    shipped = ROOT / "examples" / "testbed" / "checkpoint"
    config = T.AutoConfig.from_pretrained(shipped)
    text = {**config.text_config.to_dict(), "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "head_dim": 64}
    config.text_config = T.LlamaConfig(**{**text, "num_attention_heads": width // 64, "num_key_value_heads": width // 64})
    torch.manual_seed(0)
    T.LlavaForConditionalGeneration(config).save_pretrained(folder)
    for file in shipped.iterdir():
        if file.is_file() and not (folder / file.name).exists():
            shutil.copy(file, folder)
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = checkpoint(Path(folder) / "model", arguments.width, arguments.layers)
        command = [sys.executable, "-m", "foveate.cli", "optimize", f"{folder}/model", "-o", f"{folder}/out", "-r", "drop-fastv{layer=2,keep=64}", "-q"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"optimize_memory: {done.stderr.strip()}")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        written = sum(f.stat().st_size for f in (Path(folder) / "out" / "components").iterdir())
    record = {"weights_bytes": weights, "peak_rss_bytes": peak, "ratio": round(peak / weights, 3), "components_bytes": written, "goal": 1.3,
              "met": peak <= 1.3 * weights, "machine": platform.machine(), "python": platform.python_version()}
    print(json.dumps(record))
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
