"""Thresholds from unlabelled requests: what every bucket answers is compared with the full artifact's answer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..datasets import Item
from ..errors import RunError
from ..evaluate import request_of
from ..session import Session
from .policy import Policy

COMBINATIONS = 40_000  # sets of thresholds that are tried at most; above, quantiles stand for all values


@dataclass(frozen=True)
class Calibration:
    """What a policy did on the data that its thresholds come from; shares, except `flops`."""

    requests: int
    agreement: float  # answers equal to the teacher's, token by token
    cost: float  # mean FLOPs per request over those of the finest bucket asked alone
    flops: float
    shares: tuple[float, ...]  # of the requests, per bucket that answers
    asked: str  # what was demanded

    def __str__(self) -> str:
        parts = ", ".join(f"{100 * s:.1f}%" for s in self.shares)
        return (f"{self.requests} requests, {self.asked}: {100 * self.agreement:.1f}% answered as the full artifact does, at {100 * self.cost:.1f}% of its "
                f"cost; answered by bucket: {parts}")


@dataclass(frozen=True)
class Trace:
    """What would happen to n requests if each bucket in turn answered all of them. Costs hold the runs that lead to the bucket."""

    signal: np.ndarray  # [thresholds, n]
    agree: np.ndarray  # bool[buckets, n]
    flops: np.ndarray  # [buckets, n]
    full: float  # mean FLOPs of the finest bucket asked alone

    def at(self, policy: Policy, thresholds: Sequence[float]) -> tuple[float, float, np.ndarray]:
        """(agreement, mean FLOPs, bucket per request)"""
        bucket, every = policy.bucket_of(self.signal, thresholds), np.arange(self.signal.shape[1])
        return float(self.agree[bucket, every].mean()), float(self.flops[bucket, every].mean()), bucket


def calibrate(
    policy: Policy,
    data: Sequence[Any],
    *,
    agreement: float | None = None,
    cost: float | None = None,
    teacher: Session | None = None,
    batch: int = 16,
    max_new_tokens: int = 64,
    progress: Callable[[str], None] = lambda line: None,
) -> Policy:
    """The policy with thresholds: of least mean cost at which at least the share `agreement` of the answers is the teacher's; or of most
    agreement at a mean cost of at most `cost`, a share of what the finest bucket costs alone.

    data: items of a data set (their first questions; references are not read) or pairs (pictures, question or messages). teacher: the last artifact
    when None, asked about the whole picture. The share is met on this data; on other data it is met as far as they are alike. Raises a RunError.
    """
    if (agreement is None) == (cost is None):
        raise RunError("calibrate: give exactly one of agreement (a share of answers) and cost (a share of the finest artifact's)")
    if not (0 < (agreement if agreement is not None else cost) <= 1):  # type: ignore[operator]
        raise RunError(f"calibrate: {'agreement' if cost is None else 'cost'} is {agreement if cost is None else cost}; it is a share, above 0 and at most 1")
    if not data:
        raise RunError("calibrate: there is no calibration data; give pictures with questions, answers are not needed")
    trace = follow(policy, data, teacher, batch, max_new_tokens, progress)
    thresholds = fit(policy, trace, agreement, cost)
    equal, flops, bucket = trace.at(policy, thresholds)
    done = type(policy)(policy.buckets, thresholds, **{n: getattr(policy, n) for n in policy.settings})
    asked = f"agreement of at least {agreement:g}" if cost is None else f"cost of at most {cost:g}"
    shares = tuple(float((bucket == k).mean()) for k in range(len(policy.buckets)))
    done.calibration = Calibration(len(data), equal, flops / trace.full, flops, shares, asked)
    return done


def follow(policy: Policy, data: Sequence[Any], teacher: Session | None, batch: int, max_new_tokens: int, progress: Callable[[str], None]) -> Trace:
    """Send all requests to each bucket in turn, by thresholds at their ends."""
    answers, signal, flops = [], [], []
    for k in range(len(policy.buckets)):
        progress(f"bucket {k + 1} of {len(policy.buckets)}: {len(data)} requests")
        forced = type(policy)(policy.buckets, policy.always(k), **{n: getattr(policy, n) for n in policy.settings})
        made = [forced.generate(*images, **rest, max_new_tokens=max_new_tokens, do_sample=False) for images, rest in batches(policy, data, batch)]
        answers.append([t.tolist() for m in made for t in m.tokens])
        signal.append([c for m in made for c in m.confidence])
        flops.append([f for m in made for f in m.flops])
    if teacher is None and policy.whole:
        right = answers[-1]
    else:
        progress(f"teacher: {len(data)} requests")
        said = teacher or policy.buckets[-1]
        asked = (said.generate(*images, **rest, max_new_tokens=max_new_tokens, do_sample=False) for images, rest in batches(policy, data, batch))
        right = [t.tolist() for m in asked for t in m.tokens]
    agree = np.array([[a == b for a, b in zip(own, right, strict=True)] for own in answers])
    last = len(policy.buckets) - 1
    steps = np.mean([len(t) - 1 for t in answers[last]])
    alone = policy.prices[last].total + policy.prices[last].decode * steps
    return Trace(np.array(signal[:last], float), agree, np.array(flops), float(alone))


def fit(policy: Policy, trace: Trace, agreement: float | None, cost: float | None) -> list[float]:
    """Exhaustive over the values that tell requests apart."""
    each = int(COMBINATIONS ** (1 / len(trace.signal)))
    best: tuple[Any, ...] | None = None
    reached = None
    for thresholds in itertools.product(*(between(row, each) for row in trace.signal)):
        try:
            policy._check(thresholds)
        except RunError:  # density thresholds that fall
            continue
        equal, flops, _ = trace.at(policy, thresholds)
        fits = equal >= agreement if agreement is not None else flops <= cost * trace.full  # type: ignore[operator]
        rank = (flops, -equal) if agreement is not None else (-equal, flops)
        if fits and (best is None or rank < best[0]):
            best = (rank, thresholds)
        other = equal if agreement is not None else -flops
        reached = other if reached is None else max(reached, other)
    if best is None:
        if agreement is not None:
            raise RunError(f"calibrate: an agreement of {agreement:g} cannot be reached with these artifacts, {reached:.4g} can; add a finer one")
        raise RunError(f"calibrate: a cost of {cost:g} cannot be reached with these artifacts, {-reached / trace.full:.4g} can; add a cheaper one")
    return list(best[1])


def between(values: np.ndarray, most: int) -> list[float]:
    """Thresholds that part the values in every way, or in `most` ways at quantiles: the two ends, and the middles of neighbours."""
    unique = np.unique(values[np.isfinite(values)])
    middles = (unique[1:] + unique[:-1]) / 2
    if len(middles) > most - 2:
        middles = middles[np.unique(np.linspace(0, len(middles) - 1, max(most - 2, 1)).round().astype(int))]
    return [-np.inf, *middles.tolist(), np.inf]


def batches(policy: Policy, data: Sequence[Any], size: int) -> list[tuple[tuple[Any], dict[str, Any]]]:
    """generate's arguments, batch after batch: ((images,), messages= or prompt=)"""
    found = []
    for at in range(0, len(data), size):
        part = data[at : at + size]
        if isinstance(part[0], Item):
            found.append((([i.pictures() for i in part],), request_of(policy, [(i, []) for i in part])))
        else:
            images = [p if isinstance(p, (list, tuple)) else [] if p is None else [p] for p, _ in part]
            found.append(((images,), _said(policy, [q for _, q in part])))
    return found


def _said(policy: Policy, questions: Sequence[Any]) -> dict[str, Any]:
    if not getattr(policy.processor, "chat_template", None):
        return {"prompt": list(questions)}
    return {"messages": [[{"role": "user", "content": q}] if isinstance(q, str) else q for q in questions]}


__all__ = ["Calibration", "Trace", "calibrate", "fit", "follow"]
