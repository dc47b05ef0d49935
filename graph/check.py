"""A captured family against Hugging Face's own code, on its tiny random model: vision, prefill and decode with padded batches.

    compare(family) -> Comparison     errors relative to the standard deviation of HF's logits (or features)

The reference is `generate` (sdpa), left padded, greedy; our stages are fed its tokens. Used by tests and by the family table of the docs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .capture import capture
from .families import REGISTRY
from .families._tiny import build
from .families.base import Family, Tiny
from .program import Program

TOLERANCE = 2e-5  # float32 with another order of summation: seen 1e-6 .. 1e-5
STEPS = 8


@dataclass(frozen=True)
class Comparison:
    """Largest absolute error over the standard deviation of the reference."""

    family: str
    vision: float
    prefill_left: float  # left padding, as HF itself pads
    prefill_right: float  # right padding, as the runtime pads
    decode: float  # the worst of 8 steps, both paddings

    @property
    def passed(self) -> bool:
        return max(self.vision, self.prefill_left, self.prefill_right, self.decode) <= TOLERANCE


@dataclass(frozen=True)
class Prompts:
    """rows: one id sequence per sample; images: pictures per sample."""

    rows: list[list[int]]
    images: list[int]

    def padded(self, left: bool, pad: int = 0) -> tuple[Tensor, Tensor]:
        """-> input_ids[B, S], attention_mask[B, S]"""
        S = max(map(len, self.rows))
        ids, mask = torch.full((len(self.rows), S), pad), torch.zeros(len(self.rows), S, dtype=torch.int64)
        for b, row in enumerate(self.rows):
            at = slice(S - len(row), S) if left else slice(0, len(row))
            ids[b, at], mask[b, at] = torch.tensor(row), 1
        return ids, mask


def prompts(family: Family, tiny: Tiny, batch: int = 3, seed: int = 0) -> Prompts:
    """Texts of different lengths; the middle sample has two pictures where the family allows it."""
    generator = torch.Generator().manual_seed(seed)
    token = family.image_token_id(tiny.model)

    def text(n: int) -> list[int]:
        return torch.randint(tiny.low, tiny.high, (n,), generator=generator).tolist()

    rows, images = [], []
    for b in range(batch):
        count = 1 if tiny.prefix_only or tiny.one_image else 1 + (b == 1)
        row = [] if tiny.prefix_only else text(3 + b)
        for _ in range(count):
            row += [*tiny.before, *tiny.placeholders(token), *tiny.after, *([] if tiny.prefix_only else text(2))]
        rows.append(row + text(9 - 2 * b))
        images.append(count)
    return Prompts(rows, images)


def per_sample(flat: Tensor, counts: list[int]) -> Tensor:
    """flat[sum n, D] with counts[b] rows of sample b -> [B, max n, D], zero-padded"""
    out = flat.new_zeros(len(counts), max(counts), flat.shape[1])
    for b, rows in enumerate(flat.split(counts)):
        out[b, : len(rows)] = rows
    return out


@torch.no_grad()
def compare(name: str, layers: int = 4, steps: int = STEPS) -> Comparison:
    """Capture the tiny model of model type `name` and compare all stages with HF."""
    family = REGISTRY[name]
    tiny = build(family, layers)
    model = tiny.model
    asked = prompts(family, tiny)
    program = capture(model)
    pixels = family.vision_example(model, sum(asked.images))
    reference = family.hf_vision(model, pixels)
    vision = _worst([_relative(g, r) for g, r in zip(_vision(program, family, model, pixels, sum(asked.images)), reference, strict=True)])
    token = family.image_token_id(model)
    counts = [row.count(token) for row in asked.rows]
    features = {n: per_sample(f, counts) for n, f in zip(program.facts.features, reference, strict=True)}
    tokens, expected = _generate(family, model, asked, pixels, steps + 1)
    errors: dict[bool, list[float]] = {}
    for left in (True, False):
        ids, mask = asked.padded(left)
        positions = family.hf_positions(model, ids, mask, pixels)
        got = replay(program, {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **features}, tokens)
        errors[left] = [_relative(g, e) for g, e in zip(got, expected, strict=True)]
    return Comparison(name, vision, errors[True][0], errors[False][0], _worst(errors[True][1:] + errors[False][1:]))


def _generate(family: Family, model: Any, asked: Prompts, pixels: dict[str, Tensor], steps: int) -> tuple[Tensor, list[Tensor]]:
    """HF's greedy tokens[B, steps] and the logits[B, V] that chose each."""
    ids, mask = asked.padded(left=True)
    out = model.generate(input_ids=ids, attention_mask=mask, **pixels, **family.hf_inputs(model, ids), max_new_tokens=steps, min_new_tokens=steps,
                         do_sample=False, output_logits=True, return_dict_in_generate=True)
    return out.sequences[:, ids.shape[1]:], list(out.logits)


def _vision(program: Program, family: Family, model: Any, pixels: dict[str, Tensor], count: int) -> list[Tensor]:
    """All pictures at once, or one by one where the stage has a fixed count."""
    stage = program["vision"]
    if not family.one_picture:
        return list(stage.run(family.vision_inputs(model, pixels).tensors).values())
    parts = [stage.run(family.vision_inputs(model, family.picture(pixels, i)).tensors) for i in range(count)]
    return [torch.cat([p[name] for p in parts]) for name in stage.outputs]


def replay(program: Program, feeds: dict[str, Tensor], tokens: Tensor) -> list[Tensor]:
    """Prefill, then decode along tokens[B, n]: -> n logits[B, V]. Keeps the cache as the runtime does: valid rows at the front, per layer."""
    mask = feeds["attention_mask"].bool()
    out = program["prefill"].run(feeds)
    logits, lengths = [out["logits"]], out["kv_lengths"].clone()
    order = (~mask).long().argsort(dim=1, stable=True)  # valid rows first, in their order
    past: dict[str, Tensor] = {}
    for row in program.kv:
        for kind in "kv":
            rows = out[f"{kind}.{row.layer}"]
            index = order[:, None, :, None].expand(rows.shape)
            past[f"past_{kind}.{row.layer}"] = torch.cat([rows.gather(2, index), rows.new_zeros(*rows.shape[:2], tokens.shape[1], rows.shape[3])], 2)
        if f"kv_pos.{row.layer}" in out:
            slots = out[f"kv_pos.{row.layer}"].gather(1, order)
            past[f"past_pos.{row.layer}"] = torch.cat([slots, slots.new_zeros(len(slots), tokens.shape[1])], 1)
    past |= {n: x for n, x in out.items() if n.startswith("conv.")}
    position = feeds["position_ids"].amax(-1, keepdim=True)
    if position.dim() == 3:
        position = position.amax(0, keepdim=True).expand(3, -1, -1)
    slot = mask.sum(1, keepdim=True)
    for step in range(tokens.shape[1] - 1):
        inputs = {"input_ids": tokens[:, step: step + 1], "position_ids": position + 1 + step, "lengths": lengths, "slot": slot, **past}
        new = program["decode"].run({n: inputs[n] for n in program["decode"].inputs})
        logits.append(new["logits"])
        for i, row in enumerate(program.kv):
            for kind in "kv":
                held = past[f"past_{kind}.{row.layer}"]
                at = lengths[i][:, None, None, None].expand(-1, held.shape[1], 1, held.shape[3])
                held.scatter_(2, at, new[f"{kind}.{row.layer}"])
            if f"past_pos.{row.layer}" in past:
                past[f"past_pos.{row.layer}"].scatter_(1, lengths[i][:, None], slot)
        past |= {n: x for n, x in new.items() if n.startswith("conv.")}
        lengths, slot = lengths + 1, slot + 1
    return logits


def _relative(got: Tensor, expected: Tensor) -> float:
    if got.shape != expected.shape:
        return float("inf")
    return float((got - expected).abs().max() / expected.float().std())


def _worst(errors: list[float]) -> float:
    return max(errors) if all(e == e for e in errors) else float("nan")
