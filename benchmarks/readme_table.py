"""Write the README's "Measured" section and docs/families.md from the committed records: no number in them is typed by hand.

    python benchmarks/readme_table.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
START, END = "<!-- measured: start -->", "<!-- measured: end -->"


def read(name: str) -> Any:
    path = RESULTS / name
    return json.loads(path.read_text()) if path.is_file() else None


def mark(good: bool) -> str:
    return "yes" if good else "**no**"


def speed() -> list[str]:
    lines = ["| what | shape | measured | goal | met |", "|---|---|--:|--:|---|"]
    for shape, row in read("ort_vs_hf_1_threads.json")["shapes"].items():
        labels = {"prefill": "prefill against HF sdpa", "first_token": "first token against HF `generate`", "decode": "decode step against HF `generate`"}
        for name, label in labels.items():
            lines.append(f"| {label} | {shape} | {row['ratio'][name]:.2f}x | {row['goal'][name]:.1f}x | {mark(row['met'][name])} |")
    for shape, row in read("drop_speed_1_threads.json")["shapes"].items():
        what = f"drop to {row['keep']} at layer {row['layer']}"
        of = f"{row['speedup']:.2f}x of {row['flop_ratio']:.2f}x"
        lines += [
            f"| prefill, {what}: {of} | {shape} | {row['of_ideal']:.2f} of ideal | 0.95 | {mark(row['met']['of_ideal'])} |",
            f"| share of prefill spent selecting | {shape} | {100 * row['selection']:.1f}% | 3% | {mark(row['met']['selection'])} |",
            f"| decode step, {what} | {shape} | {row['decode']:.2f}x | 1.0x | {mark(row['met']['decode'])} |",
        ]
    return lines


def cache() -> list[str]:
    """The KV cache: speed at a long context, answers to second questions."""
    fast, right = read("kv_speed.json"), read("kv_accuracy.json")
    answers = {"int8": "int8", "int4": "int4 centred", "zipcache int4/int2": "zipcache int4/int2, 0.22"}
    batches = list(fast["attention"])
    lines = ["", f"KV cache on ONNX Runtime behind {fast['tokens']:,} tokens, times as fast as the float32 cache in place (12 layers of 512; goals: int8 1.5x, "
             "int4 1.2x, mixed 1.0x), and what it costs in answers to second questions on the testbed "
             f"({right['questions']['second_question']} of them, prompts of about {right['tokens_of_a_prompt']} tokens):", ""]
    head = [f"attention, {b}" for b in batches] + [f"decode step, {b}" for b in batches]
    lines += [f"| format | {' | '.join(head)} | smaller than fp16 | points |", "|---|" + "--:|" * (len(head) + 2)]
    for name in fast["recipes"]:
        if name == "float32":
            continue
        ratios = [f"{fast[part][b]['ratio'][name]:.2f}x" for part in ("attention", "step") for b in batches]
        told = right["second_question"].get(answers.get(name, ""))
        points = "{difference:+.1f} ({low:+.1f} to {high:+.1f})".format(**told["points"]) if told else ""
        lines.append(f"| {name} | {' | '.join(ratios)} | {told['compression']['of_fp16'] if told else ''}{'x' if told else ''} | {points} |")
    over = max(abs(m["process_over_computed"] - 1) for m in fast["memory"].values())
    most = fast["nodes"]["float32"]["gain_if_attention_were_free"]
    told = (
        f"Speed on {machine('kv_speed.json')}, load average {fast['machine']['load_average']} when it began. The process grows by the computed bytes "
        f"within {100 * over:.1f}% (goal 5%). Attention that cost nothing would make the step {most:.1f}x as fast at {batches[0]}."
    )
    return [*lines, "", told]


def scaling() -> list[str]:
    record = read("compile_scaling.json")
    lines = ["", "Compile time on the LLaVA-1.5-7B geometry, weights on the meta device, one thread:", ""]
    lines += ["| layers | capture s | peak RSS GB | passes s | ONNX prefill s | ONNX decode s |", "|--:|--:|--:|--:|--:|--:|"]
    for r in record["rows"]:
        lines.append(f"| {r['layers']} | {r['capture_s']} | {r['capture_peak_rss_gb']} | {r['passes_s']} | {r['onnx_prefill_s']} | {r['onnx_decode_s']} |")
    memory = read("optimize_memory.json")
    gib = memory["weights_bytes"] / 2**30
    peak = f"Peak RSS of `foveate optimize` on {gib:.1f} GiB of float32 weights: {memory['ratio']:.2f}x the weights (goal {memory['goal']}x)."
    return [*lines, "", "Goals at 32 layers: 60 s and 3 GB, 10 s, 15 s.", "", peak]


def machine(name: str) -> str:
    m = read(name)["machine"]
    return f"{m['cpu']}, {m['threads']} thread, torch {m['torch']}, transformers {m['transformers']}, onnxruntime {m['onnxruntime']}"


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from benchmarks.family_table import document

    rows = read("families.json")
    (ROOT / "docs" / "families.md").write_text(document(rows))
    text = [f"On {machine('ort_vs_hf_1_threads.json')}; ratios within one run, medians, both sides in turns. No GPU figures yet.", ""]
    text += [*speed(), *cache(), *scaling()]
    text += ["", "Families: [docs/families.md](docs/families.md). Accuracy of the shipped model: [its card](examples/testbed/MODEL_CARD.md)."]
    text += ["Error rates of the gate: [docs/judge.md](docs/judge.md). KV cache: [docs/kv.md](docs/kv.md)."]
    more = read("distill_victor_more.json")
    text += [f"Learned compression: 8 registers in place of the testbed's 144 visual tokens from a quarter of the depth on, trained without labels in minutes, "
             f"lose {more['lost']:.1f} of {100 * more['original']['score']:.1f} points ({more['items']} items): [docs/learned.md](docs/learned.md)."]
    text += ["Runtime policies over artifacts: [docs/policies.md](docs/policies.md)."]
    readme = ROOT / "README.md"
    body = re.sub(f"{START}.*{END}", lambda _: f"{START}\n" + "\n".join(text) + f"\n{END}", readme.read_text(), flags=re.S)
    readme.write_text(body)


if __name__ == "__main__":
    main()
