"""The unreduced baseline must be honest: our ONNX Runtime stages against Hugging Face `generate` (sdpa), same threads, same weights.

    python -m benchmarks.ort_vs_hf [--shape testbed] [--threads 1] [--rounds 15]

Goals: prefill >= 1.0x, decode >= 1.5x. Logits must agree before anything is timed. "generate" lines are whole calls of HF's generate:
one new token (encoder, prefill), and the step time (T(1 + n) - T(1)) / n; "forward" lines are HF's bare modules without the generation
loop.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from foveate.export.artifact import Artifact
from foveate.export.backends import find
from foveate.graph.capture import capture

try:
    from .measure import alternate, machine, ratio, save, summary
    from .shapes import SHAPES, Shape
except ImportError:  # run as a script
    from measure import alternate, machine, ratio, save, summary
    from shapes import SHAPES, Shape

STEPS = 16
GOALS = {"prefill": 1.0, "decode": 1.5, "first_token": 1.0}


def lower(program: Any, folder: Path, target: str = "ort", **options: Any) -> Any:
    """A program as an open engine of a target, through a real artifact."""
    backend = find(target)
    with Artifact.create(folder) as draft:
        components = backend.lower(program, draft.folder, options)
        draft.manifest.update(
            target=target, facts=dataclasses.asdict(program.facts), kv=[dataclasses.asdict(e) for e in program.kv], components=components
        )
    return backend.open(Artifact.load(folder))


class Ours:
    """Vision, prefill and decode of an engine on one prompt."""

    def __init__(self, engine: Any, prompt: dict[str, torch.Tensor]) -> None:
        self.engine = engine
        self.pixels = {"pixel_values": prompt["pixel_values"].numpy()}
        ids = prompt["input_ids"].numpy()
        self.batch, self.length = ids.shape
        features = engine.vision(self.pixels)["image_features"]
        self.feeds = {
            "input_ids": ids,
            "image_features": features.reshape(self.batch, -1, features.shape[-1]),
            "position_ids": np.arange(self.length)[None].repeat(self.batch, 0),
            "attention_mask": np.ones_like(ids),
        }

    def prefill(self) -> tuple[np.ndarray, Any]:
        outputs, cache = self.engine.prefill(self.feeds, self.length + STEPS + 1)
        return outputs["logits"], cache

    def first(self) -> None:
        self.engine.vision(self.pixels)
        self.prefill()

    def steps(self, cache: Any, logits: np.ndarray, count: int) -> np.ndarray:
        """Greedy: `count` tokens on; returns the tokens."""
        tokens = []
        for i in range(count):
            token = logits.argmax(-1)[:, None]
            tokens.append(token)
            logits = self.engine.decode(cache, token, np.full((self.batch, 1), self.length + i))
        return np.concatenate(tokens, 1)


class Theirs:
    """The same with transformers."""

    def __init__(self, model: Any, prompt: dict[str, torch.Tensor], features: np.ndarray) -> None:
        self.model, self.prompt = model, prompt
        embeds = model.get_input_embeddings()(prompt["input_ids"])
        mask = (prompt["input_ids"] == model.config.image_token_index)[..., None].expand_as(embeds)
        self.embeds = embeds.masked_scatter(mask, torch.from_numpy(features))
        self.language = model.model.language_model

    def prefill(self) -> tuple[torch.Tensor, Any]:
        with torch.no_grad():
            out = self.language(inputs_embeds=self.embeds, use_cache=True)
            return self.model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values

    def steps(self, cache: Any, logits: torch.Tensor, count: int) -> None:
        with torch.no_grad():
            for _ in range(count):
                token = logits.argmax(-1)[:, None]
                out = self.language(input_ids=token, past_key_values=cache, use_cache=True)
                logits = self.model.lm_head(out.last_hidden_state[:, -1])

    def generate(self, count: int) -> torch.Tensor:
        with torch.no_grad():
            return self.model.generate(**self.prompt, max_new_tokens=count, do_sample=False)[:, self.prompt["input_ids"].shape[1] :]


def compare(shape: Shape, threads: int, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    model, prompt = shape.model(), shape.prompt()
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(lower(capture(model), Path(folder) / "model", threads=threads), prompt)
        theirs = Theirs(model, prompt, ours.feeds["image_features"])
        agreement = _agreement(ours, theirs)
        times = alternate({"ours": ours.prefill, "forward": theirs.prefill}, rounds)
        first = alternate({"ours": ours.first, "generate": lambda: theirs.generate(1)}, rounds)
        decode = _decode(ours, theirs, rounds)
    ratios = {
        "prefill": ratio(times["forward"], times["ours"]),
        "first_token": ratio(first["generate"], first["ours"]),
        "decode": ratio(decode["generate"], decode["ours"]),
        "decode_vs_forward": ratio(decode["forward"], decode["ours"]),
    }
    return {
        "shape": dataclasses.asdict(shape),
        "agreement": agreement,
        "prefill": {n: summary(t) for n, t in times.items()},
        "first_token": {n: summary(t) for n, t in first.items()},
        "decode_step": {n: summary(t) for n, t in decode.items()},
        "ratio": {n: round(r, 3) for n, r in ratios.items()},
        "goal": GOALS,
        "met": {n: ratios[n] >= g for n, g in GOALS.items()},
    }


def _agreement(ours: Ours, theirs: Theirs) -> dict[str, Any]:
    logits, cache = ours.prefill()
    want, _ = theirs.prefill()
    error = float(np.abs(logits - want.numpy()).max() / want.std())
    if error > 1e-4:  # float32 sums in another order stay two orders below this
        raise SystemExit(f"ort_vs_hf: the logits differ by {error:.1e} of their scale: nothing to time")
    tokens = ours.steps(cache, logits, STEPS)
    return {"prefill_error": error, "greedy_tokens_equal": bool((tokens == theirs.generate(STEPS).numpy()).all())}


def _decode(ours: Ours, theirs: Theirs, rounds: int) -> dict[str, list[float]]:
    """Milliseconds per step, prompts prefilled outside of the clock; generate's step is what STEPS more tokens add to a call."""
    import time

    def timed(run: Any) -> float:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)

    found: dict[str, list[float]] = {"ours": [], "forward": [], "generate": []}
    one = median(timed(lambda: theirs.generate(1)) for _ in range(3))
    for i in range(rounds + 1):
        logits, cache = ours.prefill()
        mine = timed(lambda c=cache, l=logits: ours.steps(c, l, STEPS)) / STEPS
        want, past = theirs.prefill()
        bare = timed(lambda c=past, l=want: theirs.steps(c, l, STEPS)) / STEPS
        one = timed(lambda: theirs.generate(1))
        whole = (timed(lambda: theirs.generate(1 + STEPS)) - one) / STEPS
        if i:  # the first round warms up
            for name, value in (("ours", mine), ("forward", bare), ("generate", whole)):
                found[name].append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES, "all"], default="all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    chosen = list(SHAPES) if options.shape == "all" else [options.shape]
    record = {"machine": machine(options.threads), "shapes": {}}
    for name in chosen:
        found = record["shapes"][name] = compare(SHAPES[name], options.threads, options.rounds)
        print(
            f"{name}: " + "  ".join(f"{k} {v:.2f}x" + (f" (goal {GOALS[k]})" if k in GOALS else "") for k, v in found["ratio"].items()),
            flush=True,
        )
        for part in ("prefill", "first_token", "decode_step"):
            print(f"    {part:12s}" + "  ".join(f"{n} {t['median_ms']:.2f} ms" for n, t in found[part].items()), flush=True)
    print(save(f"ort_vs_hf_{options.threads}_threads", record).name)


if __name__ == "__main__":
    main()
