"""Caches of others on the questions of kv_accuracy.py: transformers' QuantizedCache and kvpress, in an environment of their own.

    python -m benchmarks.kv_accuracy --export build/kv_questions.npz                                          # here
    python -m venv ENV && ENV/bin/pip install torch==2.13.0 && ENV/bin/pip install -c <(echo torch==2.13.0) \\
        'transformers>=4.56,<5.3' kvpress optimum-quanto pillow                                               # kvpress 0.5.5 wants that one
    ENV/bin/python benchmarks/kv_theirs.py build/kv_questions.npz build/kv_theirs.json [--speed]              # there; goes on where it stopped
    python -m benchmarks.kv_accuracy --theirs build/kv_theirs.json                                            # here: scores, intervals

Nothing of foveate is imported. The same tokens in the same steps as ours: the first question's prompt and picture are read at once, its reference
answer and the second question token by token, then greedy tokens. A press shortens the cache behind the prompt, before the second question is
known; positions go on as if it had not. "float" is a plain DynamicCache: its answers are to be those of our float cache.
Bytes are of what the cache holds, packed as its bits say, scales included, per number of all tokens so far: behind the prompt, and at the end.
--speed: medians, one question at a time, milliseconds of CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import kvpress
import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, DynamicCache, GenerationConfig, LlavaForConditionalGeneration, QuantizedCache

CHECKPOINT = Path(__file__).resolve().parent.parent / "examples" / "testbed" / "checkpoint"
ROOM, BATCH, WINDOW = 8, 30, 32  # as kv_accuracy.py; of SnapKV: the last rows that look, as in evict-snapkv
PRESSES = {"snapkv": ("SnapKVPress", {"window_size": WINDOW}), "knorm": ("KnormPress", {}), "expected attention": ("ExpectedAttentionPress", {})}
KEEPS = (0.27, 0.5)  # the first: the bytes of kv-int4


def caches() -> dict[str, tuple[Callable[[Any], Any], Any]]:
    """name -> how to make the cache, and the press or None"""
    found: dict[str, tuple[Callable[[Any], Any], Any]] = {"float": (lambda model: DynamicCache(), None)}
    for bits in (4, 2):
        found[f"quanto {bits} bit"] = (lambda model, bits=bits: QuantizedCache("quanto", model.config.get_text_config(), nbits=bits), None)
    for keep in KEEPS:
        for name, (kind, options) in PRESSES.items():
            found[f"kvpress {name}, {keep}"] = (lambda model: DynamicCache(), getattr(kvpress, kind)(compression_ratio=1 - keep, **options))
    return found


def load() -> Any:
    """The testbed's model, whose checkpoint has the names that Llava has had on disk since 2023."""
    model = LlavaForConditionalGeneration(AutoConfig.from_pretrained(CHECKPOINT))
    known = set(model.state_dict())
    tower = "model.vision_tower.vision_model." if any("vision_tower.vision_model." in n for n in known) else "model.vision_tower."
    names = {"language_model.lm_head.": "lm_head.", "language_model.model.": "model.language_model.", "vision_tower.": tower,
             "multi_modal_projector.": "model.multi_modal_projector."}
    stored = {new + n.removeprefix(old): t for n, t in load_file(CHECKPOINT / "model.safetensors").items() for old, new in names.items() if n.startswith(old)}
    model.load_state_dict(stored)  # strict: a parameter that is missing is an error
    return model.float().eval()


class Asked:
    """The exported questions."""

    def __init__(self, path: Path) -> None:
        file = np.load(path)
        self.digest = str(file["digest"])
        self.prompts, self.rests = ([row[:n] for row, n in zip(file[k], file[f"{k}_lengths"], strict=True)] for k in ("prompt", "rest"))
        self.pixels = torch.from_numpy(file["pixel_values"])

    def batches(self, size: int = BATCH) -> Iterator[list[int]]:
        """Places of questions with prompts of one length."""
        for length in sorted({len(p) for p in self.prompts}):
            group = [i for i, p in enumerate(self.prompts) if len(p) == length]
            yield from (group[at : at + size] for at in range(0, len(group), size))


@torch.no_grad()
def prefill(model: Any, asked: Asked, places: list[int], make: Callable[[Any], Any], press: Any) -> Any:
    ids = torch.from_numpy(np.stack([asked.prompts[i] for i in places]).astype(np.int64))
    cache = make(model)
    with press(model) if press else nullcontext():
        model(input_ids=ids, pixel_values=asked.pixels[places], past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def step(model: Any, cache: Any, tokens: np.ndarray, position: int) -> np.ndarray:
    """tokens[B] at that position  ->  logits[B, V]"""
    at = torch.full((len(tokens), 1), position)
    return model(input_ids=torch.from_numpy(tokens[:, None]), past_key_values=cache, position_ids=at, use_cache=True).logits[:, -1].numpy()


def answers(model: Any, asked: Asked, make: Callable[[Any], Any], press: Any, eos: set[int]) -> dict[str, Any]:
    made: list[list[int]] = [[] for _ in asked.prompts]
    held: dict[str, list[tuple[float, float]]] = {"prompt": [], "end": []}
    start = time.perf_counter()
    for places in asked.batches():
        cache, length = prefill(model, asked, places, make, press), len(asked.prompts[places[0]])
        held["prompt"].append(bits(cache, length))
        rests = [asked.rests[i] for i in places]
        token = np.array([r[0] for r in rests], np.int64)
        for i in range(max(len(r) for r in rests) + ROOM):
            chosen = step(model, cache, token, length + i).argmax(-1)
            for b, place in enumerate(places):
                if i + 1 >= len(rests[b]) and not (made[place] and made[place][-1] in eos):
                    made[place].append(int(chosen[b]))
            if all(made[p] and made[p][-1] in eos for p in places):
                break
            token = np.array([r[i + 1] if i + 1 < len(r) else chosen[b] for b, r in enumerate(rests)], np.int64)
        held["end"].append(bits(cache, length + i + 1))
    share = {part: dict(zip(("of_fp16", "of_float32"), np.mean(found, 0).tolist(), strict=True)) for part, found in held.items()}
    return {"tokens": made, "share": share, "seconds": round(time.perf_counter() - start, 1)}


def bits(cache: Any, length: int) -> tuple[float, float]:
    """Bytes held over those of `length` rows of floats, with scales and floats of 2 and of 4 bytes."""
    found = []
    for element in (2, 4):
        have = whole = 0.0
        for layer in cache.layers:
            for which in ("keys", "values"):
                kept, stored = getattr(layer, which), getattr(layer, f"_quantized_{which}", None)
                shape = kept.shape if stored is None else stored.shape
                have += kept.numel() * element + (0 if stored is None else stored.numel() * (layer.nbits / 8 + 2 * element / layer.q_group_size))
                whole += shape[0] * shape[1] * length * shape[3] * element
        found.append(have / whole)
    return found[0], found[1]


def speed(model: Any, asked: Asked, make: Callable[[Any], Any], press: Any, questions: int = 11, steps: int = 12) -> dict[str, float]:
    """Medians of a prefill, its picture included, and of a step behind it: milliseconds of this one thread (CPU time: the machine may be busy)."""
    prefills, decodes = [], []
    for place in range(questions):
        start = time.process_time()
        cache = prefill(model, asked, [place], make, press)
        prefills.append(1e3 * (time.process_time() - start))
        for i in range(steps):
            start = time.process_time()
            step(model, cache, np.array([5]), len(asked.prompts[place]) + i)
            decodes.append(1e3 * (time.process_time() - start))
    return {"prefill_ms": round(median(prefills[1:]), 3), "step_ms": round(median(decodes[steps:]), 3)}  # the first question warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", type=Path)
    parser.add_argument("record", type=Path)
    parser.add_argument("--speed", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("kvpress").setLevel(logging.ERROR)  # says of every prefill that Llava is none of the models it is tested with
    asked, model = Asked(options.questions), load()
    eos = GenerationConfig.from_pretrained(CHECKPOINT).eos_token_id
    eos = set(eos if isinstance(eos, list) else [eos])
    record = json.loads(options.record.read_text()) if options.record.is_file() else {}
    if record.get("digest") != asked.digest:
        record = {"digest": asked.digest, "answers": {}, "speed": {}}
    record["versions"] = {p: version(p) for p in ("torch", "transformers", "kvpress", "optimum-quanto")}
    for name, (make, press) in caches().items():
        if options.speed:
            record["speed"][name] = speed(model, asked, make, press)
            print(name, record["speed"][name], flush=True)
        elif name not in record["answers"]:
            record["answers"][name] = answers(model, asked, make, press, eos)
            print(name, record["answers"][name]["share"], record["answers"][name]["seconds"], flush=True)
        options.record.write_text(json.dumps(record))


if __name__ == "__main__":
    main()
