"""How far a candidate still says what the original says; needs no reference answers.

Saved runs give: the share of equal answers, of equal first tokens, and the divergence of the first token's distribution. Two sessions
also give
the log-likelihood gap: how much less likely the candidate finds the original's own answers, per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .datasets import Item
from .errors import RunError
from .evaluate import log_softmax, request_of
from .results import Run
from .session import checked


@dataclass(frozen=True)
class Agreement:
    """Figures over the items that both runs answered; divergences in nats, None where the runs saved no log-probabilities."""

    items: int
    same_answers: float
    same_first_token: float | None = None
    first_token_kl: float | None = None  # mean of KL(baseline || candidate)
    first_token_kl_p99: float | None = None
    likelihood_gap: float | None = None  # mean log-probability per token of the baseline's answers: baseline - candidate
    worst: tuple[str, ...] = ()  # ids of the items that diverge most

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(baseline: Run, candidate: Run, gap: float | None = None) -> Agreement:
    """The figures of two runs of the same items."""
    ids = [i for i, r in candidate.results.items() if i in baseline.results and r.answers and baseline.results[i].answers]
    if not ids:
        raise RunError("agreement: the two runs have no answered item in common")
    b, c = [baseline.results[i] for i in ids], [candidate.results[i] for i in ids]
    same = [x.answers == y.answers for x, y in zip(b, c, strict=True)]
    firsts = [(x.first[0], y.first[0]) for x, y in zip(b, c, strict=True) if x.first and y.first]
    if len(firsts) < len(ids):
        return Agreement(
            len(ids), float(np.mean(same)), likelihood_gap=gap, worst=tuple(i for i, s in zip(ids, same, strict=True) if not s)[:10]
        )
    divergences = np.array([divergence(p, q) for p, q in firsts])
    return Agreement(
        len(ids),
        float(np.mean(same)),
        float(np.mean([p["ids"][0] == q["ids"][0] for p, q in firsts])),
        float(divergences.mean()),
        float(np.quantile(divergences, 0.99)),
        gap,
        tuple(ids[k] for k in np.argsort(-divergences, kind="stable")[:10] if divergences[k] > 0),
    )


def divergence(p: Mapping[str, Any], q: Mapping[str, Any]) -> float:
    """KL(p || q) of two saved distributions over the tokens that both saved, all others as one outcome: a lower bound of the full
    divergence.

    It is exact when the vocabulary was saved whole.
    """
    a, b = dict(zip(p["ids"], p["logp"], strict=True)), dict(zip(q["ids"], q["logp"], strict=True))
    both = [i for i in a if i in b]
    logs = np.array([[a[i], b[i]] for i in both]).reshape(-1, 2)
    mass = np.exp(logs)
    rest = np.maximum(1 - mass.sum(0), 1e-9)
    total = float((mass[:, 0] * (logs[:, 0] - logs[:, 1])).sum() + rest[0] * np.log(rest[0] / rest[1]))
    return max(0.0, total)


def likelihood(session: Any, item: Item, answer: np.ndarray) -> np.ndarray:
    """log-probabilities[T] that a session gives the tokens of an answer to the item's first question, fed one by one."""
    samples = session.prepare([item.pictures()], **request_of(session, [(item, [])]))
    batch = session.encode(samples).batch
    outputs, cache = session.engine.prefill(batch.feeds, batch.length + len(answer))
    logits, found = checked(outputs["logits"], "prefill"), []
    for step, token in enumerate(answer):
        if step:
            logits = checked(session.engine.decode(cache, np.array([[answer[step - 1]]]), batch.step_positions(step - 1)), f"decode step {step}")
        found.append(log_softmax(logits[0])[token])
    return np.array(found)


def likelihood_gap(baseline: Any, candidate: Any, items: Sequence[Item], max_new_tokens: int = 64) -> tuple[float, list[float]]:
    """(mean gap per token, per item) of two sessions on the baseline's own greedy answers."""
    gaps, tokens = [], 0
    for item in items:
        said = baseline.generate(
            [item.pictures()], **request_of(baseline, [(item, [])]), max_new_tokens=max_new_tokens, do_sample=False
        ).tokens[0]
        gaps.append(float((likelihood(baseline, item, said) - likelihood(candidate, item, said)).sum()))
        tokens += len(said)
    if not tokens:
        raise RunError("agreement: there are no items to compare")
    return sum(gaps) / tokens, gaps
