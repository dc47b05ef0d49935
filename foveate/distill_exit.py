"""Training of exit routers: per question and layer, does the teacher say the same without its image from there on? A small network learns to know."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .distill_data import Cache, Row, collate
from .distill_error import DistillError
from .distill_loss import agreeing, target
from .distill_train import CURVE, WEIGHTS, Settings
from .distill_view import trainable, training_view
from .graph.program import Program
from .graph.sites import role, site
from .graph.splice import splice
from .passes.insert import learned, save_weights
from .passes.methods.exit_router import ExitRouter, rate, seen
from .passes.methods.exit_vision import ExitVision

Say = Callable[[dict[str, Any]], None]


@torch.no_grad()
def examples(program: Program, router: ExitRouter, rows: Sequence[Row], say: Say = lambda line: None) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """layer -> what its router reads, f[questions, 2 D], and whether the answer stays, bool[questions]; every row is one question"""
    facts = json.loads(json.dumps(asdict(program.facts)))
    view = training_view(program, (), packed=False)
    stage = view["prefill"]
    for layer in router.layers:
        where = site(view, layer)
        stage.add_output(f"router.{layer}", splice(stage, where.first, seen, where.hidden, *[role(view, n, where.first) for n in ("visual", "valid")]))
    stage.module.recompile()
    read = trainable(stage, [f"router.{l}" for l in router.layers])
    base, without = training_view(program, (), packed=False), {}
    for layer in router.layers:
        short = base.clone()
        ExitVision(layer=layer).run(short)
        without[layer] = trainable(short["prefill"], ["logits"])
    f: dict[int, list[Tensor]] = {l: [] for l in router.layers}
    same: dict[int, list[bool]] = {l: [] for l in router.layers}
    for i in range(0, len(rows), 32):
        some = rows[i : i + 32]
        asked = [replace(r, segments=(replace(r.segments[0], answer=r.segments[0].answer[:1]),)) for r in some]  # the prompt alone
        for name, value in read(collate(asked, facts)).items():
            f[int(name.partition(".")[2])].append(value)
        to, feeds = target(some), collate(some, facts)
        for layer in router.layers:
            same[layer] += agreeing(without[layer](feeds)["logits"], to, some)
        say({"questions": min(i + 32, len(rows)), "of": len(rows)})
    return {l: torch.cat(v).float() for l, v in f.items()}, {l: torch.tensor(v) for l, v in same.items()}


def train_routers(program: Program, student: Program, router: ExitRouter, cache: Cache, settings: Settings, folder: Path, say: Say) -> dict[str, Any]:
    """Fit every layer's router on the cache's questions; the learned tensors of `student` (the program after the recipe) take the result.

    The threshold stays 0: the bias is then set so that, of the held-out questions that a router lets go, at least 95% keep their answer (calibrated
    on teacher agreement); where no bias does, the router lets none go. Returns the report.
    """
    held = min(settings.held_out, cache.count - 1)
    if cache.count < 2:
        raise DistillError(f"distill: {cache.count} source is too few; one is held out to judge by, and at least one more is needed")
    parts = [[one for i in span for row in cache.rows(i) for one in row.split()] for span in (range(held), range(held, cache.count))]
    (f_held, y_held), (f, y) = (examples(program, router, part, say) for part in parts)
    tensors, report = learned(student), {"questions": len(parts[1]), "held_out_questions": len(parts[0]), "layers": {}}
    curve: list[dict[str, Any]] = []
    for layer in router.layers:
        first, second, bias = (tensors[f"learned.{router.name}.layer{layer}.{n}"] for n in ("first", "second", "bias"))
        losses = _fit(f[layer], y[layer], first, second, bias, settings)
        curve += [{"step": i + 1, "layer": layer, "loss": loss} for i, loss in enumerate(losses)]
        with torch.no_grad():
            score = rate(f_held[layer], first, second, bias)
            shift = threshold(score, y_held[layer])
            bias.sub_(shift)
            gone = score - shift > 0
        kept = float(y_held[layer][gone].float().mean()) if gone.any() else None
        report["layers"][layer] = {"safe": float(y_held[layer].float().mean()), "exits": float(gone.float().mean()), "kept_answer": kept,
                                   "loss": [losses[0], losses[-1]]}
        say({"step": settings.steps, "layer": layer, **report["layers"][layer]})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CURVE).write_text("".join(json.dumps(l) + "\n" for l in curve), encoding="utf-8")
    save_weights(student, folder / WEIGHTS)
    return report


def _fit(f: Tensor, y: Tensor, first: nn.Parameter, second: nn.Parameter, bias: nn.Parameter, settings: Settings) -> list[float]:
    with torch.no_grad():
        share = y.float().mean().clamp(0.02, 0.98)
        bias.fill_(float((share / (1 - share)).log()))
    for tensor in (first, second, bias):
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW([first, second, bias], lr=settings.lr, weight_decay=1e-2)
    generator, losses = torch.Generator().manual_seed(settings.seed), []
    for step in range(settings.steps):
        some = torch.randint(len(f), (min(256, len(f)),), generator=generator)
        loss = nn.functional.binary_cross_entropy_with_logits(rate(f[some], first, second, bias), y[some].float())
        if not torch.isfinite(loss):
            raise DistillError(f"distill: the router's loss is {float(loss.detach())} at step {step + 1}; try a smaller lr (now {settings.lr})")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    for tensor in (first, second, bias):
        tensor.requires_grad_(False)
    return losses


def threshold(score: Tensor, safe: Tensor, share: float = 0.95) -> float:
    """The smallest score above which at least this share is safe; above all scores where there is none."""
    order = score.argsort(descending=True)
    good = safe[order].float().cumsum(0) / torch.arange(1, len(order) + 1) >= share
    if not good.any():
        return float(score.max()) + 1.0
    last = int(good.nonzero().max())
    return float(score[order[last]]) - 1e-6 if last + 1 == len(order) else float((score[order[last]] + score[order[last + 1]]) / 2)


def spoken(report: Mapping[str, Any]) -> str:
    return "; ".join(f"layer {l}: {100 * r['exits']:.0f}% of the questions exit" for l, r in report["layers"].items())
