"""Where to cut and how many tokens to keep, before anything is trained: agreement by exit layer, and the scaling law's budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from .distill_data import Row, Teacher, collate, sources
from .distill_error import DistillError
from .distill_loss import agreeing, kl, target
from .distill_train import Settings
from .distill_view import trainable, training_view
from .distillation import making_of
from .graph.program import Program
from .graph.sites import layers
from .passes.methods.exit_vision import ExitVision
from .runtime.stats import wilson

# Li et al., "Inference Optimal VLMs Need Only One Visual Token but Larger Models" (arXiv 2411.03312): for visual reasoning and understanding the
# error falls about five times faster with the language model's size than with the number of visual tokens, so few tokens are compute-optimal; for
# reading text it falls faster with the tokens, so nearly all of them are. The fractions are where a search should start, not figures of the paper.
TASKS = {"reasoning": 1 / 144, "understanding": 1 / 72, "counting": 1 / 9, "spatial": 1 / 9, "reading": 1 / 2}


@dataclass(frozen=True)
class Calibration:
    """agreement, kl: layer -> of the questions' answers when all visual tokens leave at its entry (no training); intervals are Wilson's at 95%."""

    agreement: dict[int, float]
    interval: dict[int, tuple[float, float]]
    kl: dict[int, float]
    questions: int
    share: float
    untrained: int | None  # the first layer from which on visual tokens may leave as the model is
    trained: int | None  # the first layer worth training a cut at
    visual: int | None
    budget: int | None
    task: str | None

    def as_dict(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def __str__(self) -> str:
        lines = ["layer  agreement  95% interval      KL"]
        for layer, share in self.agreement.items():
            low, high = self.interval[layer]
            lines.append(f"{layer:5d}  {100 * share:8.1f}%  [{100 * low:5.1f}, {100 * high:5.1f}]  {self.kl[layer]:.4f}")
        free = f"layer {self.untrained}" if self.untrained is not None else "no layer"
        lines.append(f"all visual tokens may leave at {free} without training ({100 * self.share:.0f}% of {self.questions} questions keep their answer)")
        if self.trained is not None:
            lines.append(f"with registers and adapters, start at layer {self.trained}: there the first half of what the image gives has reached the text")
        if self.budget is not None:
            lines.append(f"for {self.task}, the scaling law's prior is {self.budget} of {self.visual} visual tokens")
        return "\n".join(lines)


def calibrate(program: Program, processor: Any, data: Any, *, share: float = 0.95, task: str | None = None, candidates: Sequence[int] | None = None,
              settings: Settings | None = None, say: Callable[[str], None] = lambda line: None) -> Calibration:
    """Ask the teacher, then ask it again with all visual tokens removed at the entry of each layer, fed with its own answers.

    `untrained`: the first layer from which on at least `share` of the questions keep their answer. `trained`: the first one where the agreement is
    at least half way between removal at the first layer and none; a trained cut a quarter of the depth earlier has been seen to work (T1), registers
    alone need about this depth. Raises DistillError for an unknown task or layer, or data without pictures.
    """
    if task is not None and task not in TASKS:
        raise DistillError(f"calibrate: no task class {task!r}; there are {', '.join(TASKS)}")
    if not 0 < share <= 1:
        raise DistillError(f"calibrate: share is in (0, 1], got {share}")
    known = sorted(layers(program["prefill"], program.facts.layer_path))
    tried = sorted(candidates) if candidates is not None else known
    if missing := [l for l in tried if l not in known]:
        raise DistillError(f"calibrate: no layers {missing}; this program has {known[0]}..{known[-1]}")
    config = settings or Settings()
    making = replace(making_of(program, config), hidden=())
    teacher = Teacher(program, processor, making)
    rows = [row for source in sources(data) for row in teacher.rows(source)]
    rows = [r for i in range(0, len(rows), 8) for r in teacher.judge(rows[i : i + 8])]
    teacher.close()
    say(f"teacher: {sum(len(r.segments) for r in rows)} questions answered")
    base, agreement, interval, distance = training_view(program, (), making.packed), {}, {}, {}
    for layer in tried:
        view = base.clone()
        ExitVision(layer=layer).run(view)
        right, distance[layer] = _judge(trainable(view["prefill"], ["logits"]), rows, teacher.facts)
        agreement[layer], interval[layer] = sum(right) / len(right), wilson(sum(right), len(right), 0.95)
        say(f"layer {layer}: {100 * agreement[layer]:.1f}%")
    blind = agreement[tried[0]]
    safe = next((l for l in tried if all(agreement[m] >= share for m in tried if m >= l)), None)
    half = next((l for l in tried if agreement[l] >= (1 + blind) / 2), None)
    visual = program.facts.visual_per_image
    budget = None if task is None or visual is None else max(1, round(TASKS[task] * visual))
    return Calibration(agreement, interval, distance, len(right), share, safe, half, visual, budget, task)


@torch.no_grad()
def _judge(forward: Any, rows: Sequence[Row], facts: dict[str, Any]) -> tuple[list[bool], float]:
    right, total, answers = [], 0.0, 0
    for i in range(0, len(rows), 8):
        some = rows[i : i + 8]
        to, logits = target(some), forward(collate(some, facts))["logits"]
        right += agreeing(logits, to, some)
        total, answers = total + float(kl(logits, to)) * to.answers, answers + to.answers
    return right, total / answers
