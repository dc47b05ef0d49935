"""Random but valid inputs of the prefill stage, from the facts alone: what numeric checks and golden files are made of."""

import torch
from torch import Tensor

from .program import Program


def probe(program: Program, text: tuple[int, ...] = (5, 9), images: tuple[int, ...] = (1, 1), seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    """One sample per entry of `text` (text tokens, >= 2) with images[b] pictures after its first token; padded right (or left), S = max text + N.

    Values are those of a prompt of this model in shape only: ids are random, features are unit normal, positions count valid tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    facts, stage = program.facts, program["prefill"]
    per_image = facts.visual_per_image or max(facts.min_visual, 16)
    rows = max(facts.min_visual, 1, *[per_image * n for n in images])
    length = max(text) + rows
    ids, mask = torch.zeros(len(text), length, dtype=torch.int64), torch.zeros(len(text), length, dtype=torch.int64)
    for b, (words, count) in enumerate(zip(text, images, strict=True)):
        spoken = torch.randint(0, facts.vocab_size, (words,), generator=generator)
        spoken[spoken == facts.image_token_id] = 0 if facts.image_token_id else 1
        row = torch.cat([spoken[:1], torch.full((per_image * count,), facts.image_token_id), spoken[1:]])
        start = length - len(row) if left else 0
        ids[b, start : start + len(row)], mask[b, start : start + len(row)] = row, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    three = stage.placeholder("position_ids").meta["val"].dim() == 3
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": positions[None].expand(3, -1, -1).contiguous() if three else positions}
    if "context_ids" in stage.inputs:
        feed |= _context(program, text, images, per_image, generator)
    for name in stage.inputs:
        if name not in feed:
            value = stage.placeholder(name).meta["val"]
            feed[name] = torch.randn(len(text), rows, value.shape[-1], generator=generator).to(value.dtype)
    return feed


def _context(program: Program, text: tuple[int, ...], images: tuple[int, ...], per_image: int, generator: torch.Generator) -> dict[str, Tensor]:
    """A prefix of some tokens more than stand for it; those stand behind the pictures, as many as there is text for."""
    count, B = int(program.facts.context["tokens"]), len(text)
    held = torch.tensor([count + 2 + 3 * (b % 2) for b in range(B)])
    ids = torch.randint(0, program.facts.vocab_size, (B, int(held.max())), generator=generator)
    positions = torch.arange(ids.shape[1]).expand(B, -1).contiguous()
    three = program["prefill"].placeholder("context_position_ids").meta["val"].dim() == 3
    return {"context_ids": ids, "context_mask": (positions < held[:, None]).long(), "context_at": torch.tensor([1 + per_image * n for n in images]),
            "context_position_ids": positions[None].expand(3, -1, -1).contiguous() if three else positions}
