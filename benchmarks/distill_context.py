"""A described scene in front of the picture, read compressed: context registers on the testbed against dropping the description.

    python -m benchmarks.distill_context --work build/context [--reader 250] [--steps 120]      # writes benchmarks/results/distill_context.json

The shipped model does not read descriptions (measured too), so it is first trained to, on labelled answers: that is the teacher. Its prompt is a
description of three to five things, a grey picture, a question about the things. Students are then distilled on unlabelled descriptions for so many
steps each; the share of the teacher's answers is of descriptions that nothing was trained on.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from benchmarks.measure import machine, save
from examples.testbed.evaluate import CHECKPOINT
from examples.testbed.questions import ask, describe, pick
from examples.testbed.scenes import scene
from examples.testbed.words import BOS, EOS, IMAGE, encode
from foveate.distill_data import Cache, Row, Segment, Source, collate
from foveate.distill_loss import agreeing, target
from foveate.distill_train import Settings, Student
from foveate.distill_view import trainable, training_view
from foveate.distillation import distill, making_of
from foveate.graph.capture import capture
from foveate.graph.program import Program
from foveate.passes.pipeline import run
from foveate.passes.recipe import load
from foveate.runtime.stats import wilson

GREY = Image.new("RGB", (96, 96), (128, 128, 128))
QUESTIONS, SEED, THIN = 8, 7003, 4
KINDS = ("digit_at", "shape_at", "color_at", "color_of", "where", "which_digit", "which_shape")  # what one line of the description says
STUDENTS = {  # name -> recipe, trained
    "8 latents": ("context-registers{tokens=8,depth=4}", True),
    "8 averages, untrained": ("context-registers{tokens=8,depth=4}", False),
    "prefix dropped, untrained": ("context-registers{tokens=0}", False),
    "prefix dropped, adapters": ("context-registers{tokens=0}, lora{rank=16}", True),
    "4 latents": ("context-registers{tokens=4,depth=4}", True),
}


def asked(number: int) -> tuple[str, dict[str, str]]:
    """A description and what is asked about it, with the answers: a function of the number alone."""
    rng = np.random.default_rng([SEED, number])
    things = scene(rng, "train").things
    found: dict[str, str] = {}
    for _ in range(60):
        qa = ask(rng, pick(rng, KINDS), things)
        if qa and len(found) < QUESTIONS:
            found.setdefault(qa.question, qa.answer)
    return describe(rng, things)[1], found  # type: ignore[index]


def teach(program: Program, steps: int, processor: Any) -> list[float]:
    """Train the language model in place to answer from descriptions; a few of the grey picture's tokens stand for all."""
    view = training_view(program)
    forward = trainable(view["prefill"], ["logits"])
    pixels = torch.as_tensor(np.asarray(processor.image_processor(GREY, return_tensors="np")["pixel_values"]))
    grey = program["vision"].run({"pixel_values": pixels})["image_features"].detach()
    facts = asdict(program.facts) | {"features_per_image": THIN, "positions": {"kind": "linear", "original": True}}
    weights = [t for n, t in program.parameters() if "language_model" in n or "lm_head" in n]
    weights = [t.requires_grad_(True) for t in weights if t.is_floating_point() and isinstance(t, torch.nn.Parameter)]
    optimizer, losses = torch.optim.Adam(weights, betas=(0.9, 0.98)), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        rows = []
        for number in range(step * 8, step * 8 + 8):
            text, pairs = asked(1_000_000 + number)
            segments = tuple(Segment(np.array(encode(q)), np.array([*encode(a), EOS])) for q, a in pairs.items())
            rows.append(Row(np.array([BOS, *encode(text), *[IMAGE] * len(grey)]), segments, 1, {}, {"image_features": grey[torch.randperm(len(grey))[:THIN]]}))
        logits = forward(collate(rows, facts))["logits"]
        wanted = torch.full(logits.shape[:2], -100)
        for b, row in enumerate(rows):
            wanted[b, : row.answers] = torch.from_numpy(row.wanted)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 25 == 0:
            print(f"reader {step}/{steps} {np.mean(losses[-25:]):.3f}", flush=True)
    for tensor in weights:
        tensor.requires_grad_(False)
    return losses


def correct(cache: Cache, numbers: range) -> list[bool]:
    """Are the teacher's cached answers right?"""
    found = []
    for place, number in enumerate(numbers):
        said = {tuple(s.question): [*map(int, s.answer)] for row in cache.rows(place) for s in row.segments}
        found += [said.get(tuple(encode(q))) == [*encode(a), EOS] for q, a in asked(number)[1].items()]
    return found


@torch.no_grad()
def agreement(program: Program, recipe: str, weights: Path | None, cache: Cache, held: int) -> dict[str, Any]:
    """The share of held-out questions that get the teacher's answer, and what the prompt and the prefix are on average."""
    from foveate.passes.insert import load_weights

    view = run(training_view(program, (), cache.making.packed), load(recipe))
    if weights:
        load_weights(view, weights)
    student = Student.of("judged", view, (), False)
    right: list[bool] = []
    for i in range(held):
        rows = [replace(r, hidden={}) for r in cache.rows(i)]
        right += agreeing(student(rows, "cpu")["logits"], target(rows), rows)
    return {"kept": sum(right) / len(right), "interval": list(wilson(sum(right), len(right), 0.95)), "questions": len(right)}


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--work", type=Path, required=True)
    p.add_argument("--reader", type=int, default=250, help="steps that the teacher learns to read in")
    p.add_argument("--steps", type=int, default=120, help="of every student")
    p.add_argument("--sources", type=int, default=256)
    p.add_argument("--held", type=int, default=32)
    args = p.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    program = capture(model, processor)
    for _, tensor in program.parameters():
        tensor.requires_grad_(False) if tensor.is_floating_point() else None
    numbers = range(args.sources)
    data = [Source((GREY,), tuple(asked(n)[1]), asked(n)[0]) for n in numbers]
    settings = Settings(steps=args.steps, batch=4, lr=3e-3, held_out=args.held, evaluate_every=60, max_new_tokens=12, hidden_weight=0.5,
                        rates={"context-registers": 1e-3, "context-registers.map": 3e-3, "context-registers.queries": 1e-2})
    shipped = Cache.build(program, processor, data[:32], args.work / "shipped", replace(making_of(program, settings), until="image"))
    before = correct(shipped, numbers[:32])
    saved = args.work / "reader.pt"
    held = {n: t for n, t in program.parameters() if isinstance(t, torch.nn.Parameter)}
    if saved.is_file():
        with torch.no_grad():
            for n, t in torch.load(saved).items():
                held[n].copy_(t)
    else:
        teach(program, args.reader, processor)
        torch.save({n: t.detach() for n, t in held.items()}, saved)
    cache = Cache.build(program, processor, data, args.work / "teacher", replace(making_of(program, settings), until="image"), lambda l: print(l, flush=True))
    after = correct(cache, numbers[: args.held])
    lengths = [len(encode(s.context)) for s in data[: args.held]]
    record = {"reader_steps": args.reader, "shipped_right": float(np.mean(before)), "teacher_right": float(np.mean(after)),
              "prefix_tokens": float(np.mean(lengths)), "sources": args.sources, "steps": args.steps, "students": {}}
    print(record, flush=True)
    for name, (recipe, trained) in STUDENTS.items():
        weights = None
        if trained:
            folder = args.work / name.replace(" ", "-").replace(",", "")
            weights = distill(program, data, recipe, processor=processor, output=folder, cache=args.work / "teacher", settings=settings).weights
        row = {"recipe": recipe, "trained": trained} | agreement(program, recipe, weights, cache, args.held)
        record["students"][name] = row
        print(name, row, flush=True)
        save("distill_context", record | machine(1))


if __name__ == "__main__":
    sys.exit(main())
