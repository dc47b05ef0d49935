"""What a student is told by its teacher: KL on answer rows, and how far its hidden rows are from the teacher's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .distill_data import Row


@dataclass(frozen=True)
class Target:
    """The teacher's side of a batch, padded. totals are over the whole batch, of which these rows may be a part."""

    logits: Tensor  # [B, R, K] log-probabilities
    index: Tensor | None  # [B, R, K], None: all of the vocabulary
    answer: Tensor  # bool[B, R]
    wanted: Tensor  # int64[B, R] the answers
    hidden: Mapping[int, Tensor]  # layer -> [B, Q, D]
    text: Tensor  # bool[B, Q]
    answers: int
    texts: int


def target(rows: Sequence[Row], answers: int = 0, texts: int = 0) -> Target:
    """Of these rows; `answers`, `texts`: the numbers to divide by, those of the rows unless given."""
    R, Q = max(r.answers for r in rows), max(r.texts for r in rows)
    held = torch.arange(R)[None] < torch.tensor([[r.answers] for r in rows])
    said = torch.arange(Q)[None] < torch.tensor([[r.texts] for r in rows])
    index = None if rows[0].index is None else _stack([r.index for r in rows], R).long()  # type: ignore[arg-type]
    return Target(_stack([r.logits for r in rows], R).float(), index, held, _stack([torch.from_numpy(r.wanted) for r in rows], R),  # type: ignore[arg-type]
                  {l: _stack([r.hidden[l] for r in rows], Q).float() for l in rows[0].hidden}, said, answers or sum(r.answers for r in rows),
                  texts or sum(r.texts for r in rows))


def _stack(parts: Sequence[Tensor], length: int) -> Tensor:
    out = parts[0].new_zeros(len(parts), length, *parts[0].shape[1:])
    for target, part in zip(out, parts, strict=True):
        target[: len(part)] = part
    return out


def kl(logits: Tensor, to: Target, temperature: float = 1.0) -> Tensor:
    """logits[B, R, V] of the student -> sum over answer rows of tau^2 KL(teacher || student), in nats, divided by the batch's number of answers"""
    return divergences(logits, to, temperature).sum() / to.answers


def divergences(logits: Tensor, to: Target, temperature: float = 1.0) -> Tensor:
    """logits[B, R, V] of the student -> tau^2 KL(teacher || student) of every answer row, one sample after the other, in nats

    Where only the teacher's best tokens are known, the rest of the vocabulary is one outcome; at a temperature other than 1 it is left out.
    """
    mine, theirs = logits[to.answer].float(), to.logits[to.answer]
    if to.index is None:
        p, q = (theirs / temperature).log_softmax(-1), (mine / temperature).log_softmax(-1)
    else:
        index = to.index[to.answer]
        if temperature == 1.0:
            q = mine.log_softmax(-1).gather(1, index)
            p, q = _with_rest(theirs), _with_rest(q)
        else:
            p, q = (theirs / temperature).log_softmax(-1), (mine.gather(1, index) / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


def gaps(divergence: Tensor, rows: Sequence[Row]) -> Tensor:
    """The mean of `divergences` over the answers of each of these rows."""
    return torch.stack([part.mean() for part in divergence.detach().split([r.answers for r in rows])])


def _with_rest(log_p: Tensor) -> Tensor:
    rest = (1 - log_p.exp().sum(1, keepdim=True)).clamp(min=1e-6).log()
    return torch.cat([log_p, rest], 1)


def hidden_error(hidden: Mapping[int, Tensor], to: Target) -> Tensor:
    """layer -> [B, Q, D] of the student -> sum over layers of mean ||h - h_T||^2 / ||h_T||^2 over text rows"""
    total = torch.zeros((), device=next(iter(hidden.values())).device) if hidden else torch.zeros(())
    for layer, mine in hidden.items():
        theirs = to.hidden[layer][to.text]
        error = (mine[to.text].float() - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-6)
        total = total + error.sum() / to.texts
    return total


def agreeing(logits: Tensor, to: Target, rows: Sequence[Row]) -> list[bool]:
    """Per question: is every answer token the student's first choice? Fed with the teacher's answer, that is: would it say the same."""
    right = (logits.argmax(-1) == to.wanted) | ~to.answer
    found = []
    for b, row in enumerate(rows):
        at = 0
        for segment in row.segments:
            found.append(bool(right[b, at : at + len(segment.answer)].all()))
            at += len(segment.answer)
    return found
