"""Registers by distillation on the testbed: Victor against its controls at equal training budget. One configuration after another, resumable.

    python benchmarks/distill_victor.py --work build/distill --data-only      # the teacher answers the training questions (once)
    python benchmarks/distill_victor.py --work build/distill                  # train and judge what is left to do, most informative first
    python benchmarks/distill_victor.py --only victor-m8-k2 --seconds 600     # one of them, with another budget
    python benchmarks/distill_victor.py --table                               # benchmarks/results/distill_victor.jsonl -> docs/distill_victor.md

Training sees pictures and questions only; answers are the original model's own. Judged on labelled `test` items (other digits) through the ONNX
Runtime artifact and greedy decoding, with Wilson intervals, by slice.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.testbed.questions import PAGE, SCENE, TRAINING_ONLY, ask, pick
from examples.testbed.scenes import page, scene
from foveate.distill_data import Source

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "examples/testbed/checkpoint"
SEED, QUESTIONS = 7001, 10


def source(number: int) -> Source:
    """Picture `number` of the training stream, and what is asked about it: a function of the number alone. No answer is kept."""
    rng = np.random.default_rng([SEED, number])
    paged = rng.random() < 0.2
    picture = page(rng) if paged else scene(rng, "train")
    kinds = list(PAGE) if paged else [k for k in SCENE if k not in TRAINING_ONLY]
    asked: dict[str, None] = {}
    for _ in range(60):
        found = ask(rng, pick(rng, kinds), picture.things)
        if found:
            asked.setdefault(found.question)
        if len(asked) == QUESTIONS:
            break
    return Source((Image.fromarray(picture.pixels),), tuple(asked))
