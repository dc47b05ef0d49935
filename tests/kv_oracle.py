"""The toy with a quantized cache, written again: one sample, no graph, no padding, no symbols; a cache is a list of rows and how each is stored.

Independent of graph/ and passes/: formats in numpy, policies as their papers say, flushes as a queue.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

IMAGE, SCALE = 9, 0.5
SPREAD = np.array([1.0, 0.3, 0.1, 0.03], np.float32)
f4 = np.float32


# -- formats


def ends(x: np.ndarray, bits: int, axis: int, centred: bool, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """Scale and centre over one axis."""
    if bits == 1:
        center = x.mean(axis, keepdims=True, dtype=f4) if centred else np.zeros_like(x.max(axis, keepdims=True))
        return np.maximum(np.abs(x - center).mean(axis, keepdims=True, dtype=f4), f4(1e-6)), center
    if centred:
        low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
        scale = np.maximum((high - low) * f4(margin / (2**bits - 1)), f4(1e-6))
        return scale, (low + high) / 2 + scale / 2
    scale = np.maximum(np.abs(x).max(axis, keepdims=True) * f4(margin / (2 ** (bits - 1) - 1)), f4(1e-6))
    return scale, np.zeros_like(scale)


def through(x: np.ndarray, code: str, scale: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Stored and read again."""
    if code == "float":
        return x
    if code == "fp8":
        scale = scale * f4(127 / 448)
        y = torch.from_numpy(x / scale).clamp(-448, 448)
        return y.to(torch.float8_e4m3fn).float().numpy() * scale
    if code == "fsq4":
        scale = scale * 2
        level = np.clip(np.rint(np.tanh((x - center) / scale) * 7.5), -7, 7)
        return center + scale * np.arctanh(level / 7.5)
    if code == "sign":
        return np.where(x < center, -scale, scale) + center
    bits = int(code[3:])
    return np.clip(np.rint((x - center) / scale), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale + center


@dataclass
class Format:
    """code, what shares a scale, and how the range is taken."""

    code: str
    per: str = "channel"
    centred: bool = False
    margin: float = 1.0
    balance: np.ndarray | None = None
    state: Any = None  # of a channel: the prompt's

    def bits(self) -> int:
        return {"fsq4": 1, "sign": 1, "fp8": 8, "float": 8}.get(self.code) or int(self.code[3:])

    def prompt(self, x: np.ndarray, of: np.ndarray) -> np.ndarray:
        """x[T, D] of the prompt, stored within the ranges of `of`"""
        if self.per == "channel" and len(of):
            self.state = ends(of, self.bits(), 0, self.centred, self.margin)
        return self.rows(x)

    def rows(self, x: np.ndarray) -> np.ndarray:
        if not len(x) or self.code == "float":
            return x
        if self.balance is not None:
            return self._rows(x / self.balance) * self.balance
        return self._rows(x)

    def _rows(self, x: np.ndarray) -> np.ndarray:
        kind, _, size = self.per.partition(":")
        if kind == "channel":
            return through(x, self.code, *self.state)
        if kind == "token":
            return through(x, self.code, *ends(x, self.bits(), 1, self.centred, 1.0))
        parts = np.split(x, range(int(size), x.shape[1 if kind == "group" else 0], int(size)), 1 if kind == "group" else 0)
        axis = 1 if kind == "group" else 0
        return np.concatenate([through(p, self.code, *ends(p, self.bits(), axis, self.centred, 1.0)) for p in parts], axis)


# -- caches


@dataclass
class Prompt:
    """What a policy may look at: q, k, v [T, D], which tokens are visual, and every row's attention p[T, T]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    visual: np.ndarray
    p: np.ndarray


class Kept:
    """Partitions in the order in which rows are appended: the first grows. whole: its ranges are those of all rows of the prompt."""

    def __init__(self, prompt: Prompt, masks: list[np.ndarray], formats: list[tuple[Format, Format]], whole: bool = False) -> None:
        self.formats = formats
        self.parts = [[f.prompt(x[m], x if whole and not i else x[m]) for f, x in zip(pair, (prompt.k, prompt.v), strict=True)]
                      for i, (m, pair) in enumerate(zip(masks, formats, strict=True))]

    def append(self, k: np.ndarray, v: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One new row; -> all keys and values as attention reads them, the new row as stored"""
        self.before()
        self.parts[0] = [np.concatenate([held, f.rows(x)]) for held, f, x in zip(self.parts[0], self.formats[0], (k, v), strict=True)]
        self.query = q
        return tuple(np.concatenate([part[i] for part in self.parts]).astype(f4) for i in range(2))

    def before(self) -> None:
        """A flush, where the policy has one."""


class Flushed(Kept):
    """The first partition is float; when residual + keep rows wait, the oldest are divided by `share`."""

    def __init__(self, prompt, masks, formats, residual, keep, hi=None) -> None:
        super().__init__(prompt, masks, formats)
        self.residual, self.keep, self.hi = residual, keep, hi

    def before(self) -> None:
        if len(self.parts[0][0]) < self.residual + self.keep:
            return
        old = [x[: self.residual] for x in self.parts[0]]
        self.parts[0] = [x[self.residual :] for x in self.parts[0]]
        if self.hi is None:
            groups = [np.arange(self.residual)]
        else:
            logits = (old[0] @ self.query[0]) / math.sqrt(old[0].shape[1])
            order = np.argsort(-logits, kind="stable")
            groups = [np.sort(order[: self.hi]), np.sort(order[self.hi :])]
        for i, group in enumerate(groups, 1):
            self.parts[i] = [np.concatenate([held, f.rows(x[group])]) for held, f, x in zip(self.parts[i], self.formats[i], old, strict=True)]


# -- the policies' importance


def top(score: np.ndarray, pool: np.ndarray, count: int, sinks: int, recent: int) -> np.ndarray:
    """[T] bool: the `count` best of the pool, the prompt's ends first, ties to the earlier"""
    T = len(score)
    always = (np.arange(T) < sinks) | (np.arange(T) >= T - recent)
    ranked = np.where(pool, np.where(always, np.inf, score), -np.inf)
    chosen = np.zeros(T, bool)
    chosen[np.argsort(-ranked, kind="stable")[:count]] = True
    return chosen & pool


def rounded(part: float, count: int) -> int:
    return -(-round(part * 1000) * count // 1000)


def probe_rows(T: int, count: int) -> list[int]:
    return [max(T - 1 - i, 0) for i in range(count)] + [i * T // count for i in range(count)]


def probed(prompt: Prompt, count: int) -> tuple[np.ndarray, np.ndarray]:
    rows = probe_rows(len(prompt.p), count)
    seen = np.array([sum(r >= t for r in rows) for t in range(len(prompt.p))])
    return prompt.p[rows].sum(0), seen


# -- the toy


@dataclass
class Oracle:
    """store: (layer, prompt) -> Kept. cut: (layer, visual tokens to keep by the last row's attention), and whether what goes is projected."""

    weights: dict[str, np.ndarray]
    store: Callable[[int, Prompt], Kept]
    cut: tuple[int, int] | None = None
    caches: list[Kept] = field(default_factory=list)

    @classmethod
    def of(cls, program: Any, store: Any, cut: Any = None) -> Oracle:
        return cls({n: p.detach().numpy() for n, p in program["prefill"].module.named_parameters()}, store, cut)

    def qkv(self, h: np.ndarray, layer: int, at: np.ndarray) -> list[np.ndarray]:
        turn = np.cos(at[:, None].astype(f4) * SPREAD)
        q, k, v = np.split(h @ self.weights[f"lm.layers.{layer}.qkv.weight"].T, 3, 1)
        return [q * turn, k * turn, v]

    def out(self, h: np.ndarray, context: np.ndarray, layer: int) -> np.ndarray:
        h = h + context
        return h + np.maximum(h @ self.weights[f"lm.layers.{layer}.mlp.weight"].T, 0)

    def run(self, ids: np.ndarray, features: np.ndarray, steps: int) -> np.ndarray:
        """-> logits of the prompt and of `steps` tokens behind it"""
        layers = range(sum(n.endswith("qkv.weight") for n in self.weights))
        embed, head = self.weights["lm.embed.weight"], self.weights["lm.head.weight"]
        h, visual, at = embed[ids].copy(), ids == IMAGE, np.arange(len(ids))
        h[visual] = features[: visual.sum()]
        gone, keep, p = None, np.ones(len(ids), bool), np.zeros((0, 0), f4)
        prompts = []
        for layer in layers:
            if self.cut and layer == self.cut[0]:
                score = np.where(visual, p[-1], -np.inf)
                keep = ~visual
                keep[np.argsort(-score, kind="stable")[: min(self.cut[1], int(visual.sum()))]] = True
                gone, h, visual, at = (h[~keep], at[~keep]), h[keep], visual[keep], at[keep]
            q, k, v = self.qkv(h, layer, at)
            p = softmax(np.where(np.tril(np.ones((len(h), len(h)), bool)), q @ k.T * f4(SCALE), -np.inf))
            prompts.append((Prompt(q, k, v, visual, p), gone))
            h = self.out(h, p @ v, layer)
        found = [h[-1] @ head.T]
        self.caches = [self.kept(layer, prompt, rest, keep) for layer, (prompt, rest) in enumerate(prompts)]
        for step in range(steps):
            h = embed[[1 + step % 3]]
            for layer in layers:
                q, k, v = self.qkv(h, layer, np.array([len(ids) + step]))
                keys, values = self.caches[layer].append(k, v, q)
                h = self.out(h, softmax(q @ keys.T * f4(SCALE)) @ values, layer)
            found.append(h[0] @ head.T)
        return np.stack(found)

    def kept(self, layer: int, prompt: Prompt, gone: Any, keep: np.ndarray) -> Kept:
        if self.cut is None:
            return self.store(layer, prompt)
        if gone is None:  # before the cut
            return self.store(layer, prompt, keep)
        _, k, v = self.qkv(gone[0], layer, gone[1])
        both = Prompt(prompt.q, np.concatenate([prompt.k, k]), np.concatenate([prompt.v, v]), prompt.visual, prompt.p)
        return self.store(layer, both, np.arange(len(both.k)) < len(prompt.k))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(f4)
