"""What registers buy in time: Victor against the original, FastV and a vision-side method at equal FLOPs, on the 576-token shape.

    python -m benchmarks.victor_speed [--rounds 7] [--threads 1]

Prefill against the cost model (goal: >= 0.95 of the FLOP ratio, and >= 3x); end to end as in the paper's section 4 (arXiv:2410.14072): vision,
prefill and two tokens of a batch of 16 prompts with 64 text tokens; and ten questions of 16 tokens about one picture, each prefilled in full, or read behind a
cache of the picture (question-blind registers: the cache holds 8 rows per layer instead of 584). Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.measure import alternate, machine, ratio, save, summary
from benchmarks.ort_vs_hf import Ours, lower
from benchmarks.shapes import SHAPES
from foveate.graph.capture import capture
from foveate.graph.cost import cost
from foveate.passes import pipeline, recipe
from foveate.passes.insert import settle

LAYER, BATCH, TEXT, ANSWER = 3, 16, 64, 2
QUESTIONS, QUESTION = 10, 16  # about one picture, and their length
GOALS = {"of_ideal": 0.95, "speedup": 3.0}
RECIPES = {
    "original": "clean-up{optional=true}",
    "victor 8": f"victor{{registers=8,layer={LAYER}}}, clean-up{{optional=true}}",
    "victor 32": f"victor{{registers=32,layer={LAYER}}}, clean-up{{optional=true}}",
    "victor 8, gather-early": f"victor{{registers=8,layer={LAYER}}}, gather-early, clean-up{{optional=true}}",
    "fastv 8": f"drop-fastv{{layer={LAYER},keep=8}}, clean-up{{optional=true}}",
}
BLIND = {f"blind {m}": f"victor{{registers={m},layer={LAYER},question_blind=true}}, clean-up{{optional=true}}" for m in (8, 32)}


def rewritten(program: Any, text: str) -> Any:
    made = pipeline.run(program.clone(), recipe.load(text))
    settle(made)
    return made


def flops(program: Any, batch: int, text: int, visual: int) -> float:
    tokens = program.facts.features_per_image or visual
    return cost(program, "prefill").at(B=batch, S=text + tokens, N=tokens)["flops"]


def vision_side(program: Any, target: float, batch: int, visual: int) -> tuple[str, int]:
    """prune-fopru (best at a quarter of the testbed's tokens) with as many tokens as cost the target's FLOPs, not fewer."""
    for keep in range(8, visual, 4):
        text = f"prune-fopru{{keep={keep}}}, clean-up{{optional=true}}"
        if flops(rewritten(program, text), batch, TEXT, visual) >= target:
            return text, keep
    raise SystemExit("victor_speed: no number of tokens costs as much")


class Runs(Ours):
    """As `Ours`, for a vision stage that may return fewer tokens."""

    def __init__(self, engine: Any, prompt: dict[str, torch.Tensor], visual: int) -> None:
        given = engine.vision({"pixel_values": prompt["pixel_values"].numpy()})["image_features"]
        tokens = given.reshape(len(prompt["input_ids"]), -1, given.shape[-1]).shape[1]
        super().__init__(engine, {**prompt, "input_ids": torch.cat([prompt["input_ids"][:, : 1 + tokens], prompt["input_ids"][:, 1 + visual :]], 1)})

    def two_tokens(self) -> None:
        self.engine.vision(self.pixels)
        logits, cache = self.prefill()
        self.steps(cache, logits, ANSWER - 1)


def behind_one(engine: Any, prompt: dict[str, torch.Tensor], visual: int) -> Callable[[], None]:
    """Ten questions, token by token behind copies of one picture's cache."""
    begin = {n: t[:1] for n, t in prompt.items()}
    begin |= {n: begin[n][:, : 1 + visual] for n in ("input_ids", "attention_mask")}
    one = Ours(engine, begin)
    asked = prompt["input_ids"][0, 1 + visual :].numpy()

    def run() -> None:
        engine.vision(one.pixels)
        _, cache = engine.prefill(one.feeds, one.length + QUESTION + ANSWER)
        many = cache.take(np.zeros(QUESTIONS, np.int64))
        for i in range(QUESTION + ANSWER - 1):
            token = np.full((QUESTIONS, 1), asked[min(i, QUESTION - 1)], np.int64)
            engine.decode(many, token, np.full((QUESTIONS, 1), one.length + i))

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shape = dataclasses.replace(SHAPES["llava-like"], text=TEXT)
    whole, visual = capture(shape.model()), shape.visual
    programs = {n: rewritten(whole, t) for n, t in {**RECIPES, **BLIND}.items()}
    text, keep = vision_side(whole, flops(programs["victor 8"], 1, TEXT, visual), 1, visual)
    equal = f"prune-fopru {keep}"
    programs[equal] = rewritten(whole, text)
    record: dict[str, Any] = {"machine": machine(options.threads), "shape": dataclasses.asdict(shape), "layer": LAYER, "goals": GOALS,
                              "recipes": {**RECIPES, equal: text, **BLIND}}
    with tempfile.TemporaryDirectory() as folder:
        engines = {n: lower(p, Path(folder) / n.replace(" ", "-"), threads=options.threads) for n, p in programs.items()}
        judged = [*RECIPES, equal]
        runs = {n: Runs(engines[n], shape.prompt(1), visual) for n in judged}
        prefill = alternate({n: r.prefill for n, r in runs.items()}, options.rounds)
        ideal = {n: flops(programs["original"], 1, TEXT, visual) / flops(programs[n], 1, TEXT, visual) for n in judged}
        record["prefill"] = {n: {**summary(t), "speedup": round(ratio(prefill["original"], t), 3), "flop_ratio": round(ideal[n], 3),
                                 "of_ideal": round(ratio(prefill["original"], t) / ideal[n], 3)} for n, t in prefill.items()}
        sixteen = {n: Runs(engines[n], shape.prompt(BATCH), visual) for n in judged}
        whole_runs = alternate({n: r.two_tokens for n, r in sixteen.items()}, max(options.rounds // 2, 3), warm_up=1)
        record["end_to_end"] = {n: {**summary(t), "samples_per_s": round(BATCH / (summary(t)["median_ms"] / 1e3), 2),
                                    "speedup": round(ratio(whole_runs["original"], t), 3)} for n, t in whole_runs.items()}
        short = dataclasses.replace(shape, text=1 + QUESTION)
        ten = {f"{n}, in full": Runs(engines[n], short.prompt(QUESTIONS), visual).two_tokens for n in ("original", "victor 8")}
        ten |= {f"{n}, cached picture": behind_one(engines[n], short.prompt(1), visual) for n in ("original", *BLIND)}
        times = alternate(ten, max(options.rounds // 2, 3), warm_up=1)
        record["ten_questions"] = {n: {**summary(t), "speedup": round(ratio(times["original, in full"], t), 3)} for n, t in times.items()}
    for part in ("prefill", "end_to_end", "ten_questions"):
        print(part)
        for n, found in record[part].items():
            print("   ", n, {k: v for k, v in found.items() if k not in ("min_ms", "rounds")})
    print(save("victor_speed", record).name)


if __name__ == "__main__":
    main()
