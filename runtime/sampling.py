"""The next token: greedy in numpy; sampling and penalties with transformers' logits processors (torch is imported only then)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from .errors import RunError

Choose = Callable[[np.ndarray, list[np.ndarray]], np.ndarray]  # logits[B, V], per sample prompt + generated tokens -> tokens[B]

WARPERS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")  # used when sampling only
PENALTIES = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "min_new_tokens")
NEUTRAL: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
}


def greedy(logits: np.ndarray, history: list[np.ndarray]) -> np.ndarray:
    """logits[B, V] -> the first largest of each row, int64[B]"""
    return logits.argmax(-1).astype(np.int64)


def chooser(config: Mapping[str, Any], eos: tuple[int, ...], prompt_lengths: list[int], seed: int | None) -> Choose:
    """config: transformers' generation parameters by name (None = unset) -> how to choose.

    transformers' documented default top_k of 50 applies when sampling and nothing is set.
    """
    sample = bool(config.get("do_sample"))
    wanted = {k: config[k] for k in PENALTIES + (WARPERS if sample else ()) if config.get(k) is not None}
    if sample:
        wanted.setdefault("top_k", 50)
    wanted = {k: v for k, v in wanted.items() if v != NEUTRAL.get(k)}
    if not sample and not wanted:
        return greedy
    processors = [_processors(wanted, eos, n) for n in prompt_lengths]
    return _with_processors(processors, np.random.default_rng(seed) if sample else None)


def _with_processors(processors: list[Any], rng: np.random.Generator | None) -> Choose:
    import torch

    def choose(logits: np.ndarray, history: list[np.ndarray]) -> np.ndarray:
        out = np.empty(len(logits), np.int64)
        for b, row in enumerate(logits):  # one by one: prompts differ in length and padding must not count as history
            scores = processors[b](torch.from_numpy(history[b])[None], torch.from_numpy(row.astype(np.float32))[None])[0]
            out[b] = int(scores.argmax()) if rng is None else _draw(scores.double().softmax(-1).numpy(), rng)
        return out

    return choose


def _draw(p: np.ndarray, rng: np.random.Generator) -> int:
    return int(rng.choice(len(p), p=p / p.sum()))


def _processors(wanted: Mapping[str, Any], eos: tuple[int, ...], prompt_length: int) -> Any:
    """transformers' processors in the order in which `generate` applies them"""
    import torch
    from transformers.generation import logits_process as hf

    ends = torch.tensor(list(eos))
    make: dict[str, Callable[[Any], Any]] = {
        "repetition_penalty": lambda v: hf.RepetitionPenaltyLogitsProcessor(float(v)),
        "no_repeat_ngram_size": lambda v: hf.NoRepeatNGramLogitsProcessor(int(v)),
        "bad_words_ids": lambda v: hf.NoBadWordsLogitsProcessor(v, ends),
        "min_new_tokens": lambda v: hf.MinNewTokensLengthLogitsProcessor(prompt_length, int(v), ends),
        "suppress_tokens": lambda v: hf.SuppressTokensLogitsProcessor(v),
        "temperature": lambda v: hf.TemperatureLogitsWarper(float(v)),
        "top_k": lambda v: hf.TopKLogitsWarper(int(v)),
        "top_p": lambda v: hf.TopPLogitsWarper(float(v)),
        "min_p": lambda v: hf.MinPLogitsWarper(float(v)),
        "typical_p": lambda v: hf.TypicalLogitsWarper(float(v)),
        "epsilon_cutoff": lambda v: hf.EpsilonLogitsWarper(float(v)),
        "eta_cutoff": lambda v: hf.EtaLogitsWarper(float(v)),
    }
    out = hf.LogitsProcessorList()
    for name, build in make.items():
        if name in wanted:
            try:
                out.append(build(wanted[name]))
            except ValueError as error:
                raise RunError(f"generate: {name}={wanted[name]!r} is not possible: {error}") from None
    return out
