"""What a vision-side method may read about the tokens it chooses among, each computed only when asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .vision_layout import Layout

F = torch.ops.foveate
FROM_CLS = frozenset({"cls", "cls_first", "cls_layers", "cls_joint", "cls_logits", "cls_feature"})
OPERANDS = ("q", "k", "v", "mask", "scale")
FROM_ATTENTION = FROM_CLS | {*OPERANDS, "attended", "received", "keys", "key_mean"}
EXTERNAL = ("text", "saliency")  # further inputs of the vision stage, supplied from outside


@dataclass(frozen=True)
class Attention:
    """The operands of one vision layer: q[I, H, T, D], k, v[I, G, T, D], mask, scale."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    scale: float


@dataclass(frozen=True)
class Signals:
    """I images of n tokens each. A method's arguments are these names.

    features[I, n, D]           the tokens themselves
    q, k, v, mask, scale        of the last vision attention, as they are (T = CLS + patches)
    cls[I, H, n]                attention of the CLS token in the last layer; cls_first: in the first; cls_layers[I, L, H, n]: in all
    cls_logits[I, H, n]         the same before the softmax, last layer
    cls_joint[I, n]             the same from queries and keys of all heads as one head
    cls_feature[I, 1, D]        the CLS token beside the features
    received[I, H, n]           mean attention that a token gets from all query rows
    attended[I, H, n]           cls; in a tower without one, received (as the published ports to such towers do)
    keys[I, n, H D], key_mean[I, n, D]   keys of all heads, side by side or averaged
    grid                        (rows, columns) of the tokens
    text[I, D], saliency[I, n]  supplied from outside
    Where the projector merges m x m patches into one token, everything per patch is averaged over the token's patches here, once; so it is
    over the patches of a row of a packed picture (`layout`), unless the method works on its tiles (`pooled` False: then I counts tiles).
    """

    features: Tensor
    layers: tuple[Attention, ...] = ()
    skip: int = 1  # tokens before the patches: the CLS
    grid: tuple[int, int] | None = None
    merge: int = 1
    extra: dict[str, Tensor] = field(default_factory=dict)
    cls_feature: Tensor | None = None
    layout: Layout | None = None
    pooled: bool = True

    def read(self, name: str) -> Any:
        """The signal of that name."""
        if name in OPERANDS:
            return getattr(self.layers[-1], name)
        return self.extra[name] if name in EXTERNAL else getattr(self, name)

    @cached_property
    def cls(self) -> Tensor:
        return self._cls(self.layers[-1])

    @cached_property
    def cls_first(self) -> Tensor:
        return self._cls(self.layers[0])

    @cached_property
    def cls_layers(self) -> Tensor:
        return torch.stack([self._cls(layer) for layer in self.layers], 1)

    @cached_property
    def cls_joint(self) -> Tensor:
        q, k = (x.transpose(1, 2).flatten(2).float() for x in (self.layers[-1].q, self.layers[-1].k))
        p = ((q[:, :1] @ k.transpose(1, 2)) * k.shape[-1] ** -0.5).softmax(-1)
        return self._pool(p[:, 0, self.skip :])

    @cached_property
    def cls_logits(self) -> Tensor:
        last = self.layers[-1]
        return self._pool((last.q[:, :, :1].float() @ last.k.float().transpose(-1, -2) * last.scale)[:, :, 0, self.skip :])

    @cached_property
    def received(self) -> Tensor:
        last = self.layers[-1]
        even = torch.full_like(last.q[:, 0, :, 0], 1 / last.q.shape[2], dtype=torch.float32)
        return self._pool(F.attention_columns(last.q, last.k, last.mask, even, last.scale, False, 0.0)[..., self.skip :])

    @cached_property
    def attended(self) -> Tensor:
        return self.cls if self.skip else self.received

    @cached_property
    def keys(self) -> Tensor:
        return self._pool(self.layers[-1].k[:, :, self.skip :].transpose(1, 2).flatten(2).transpose(1, 2)).transpose(1, 2)

    @cached_property
    def key_mean(self) -> Tensor:
        return self._pool(self.layers[-1].k[:, :, self.skip :].mean(1).transpose(1, 2)).transpose(1, 2)

    def _cls(self, layer: Attention) -> Tensor:
        first = torch.zeros_like(layer.q[:, 0, :1, 0], dtype=torch.int64)
        return self._pool(F.attention_rows(layer.q, layer.k, layer.mask, first, layer.scale, False, 0.0)[:, :, 0, self.skip :])

    def _pool(self, x: Tensor) -> Tensor:
        """x[..., patches] -> [..., n]: the mean over the patches of every token (square blocks, in reading order; or as the layout says)"""
        if self.layout is not None and self.pooled:
            return self.layout.pool(x) if x.dim() == 3 else self.layout.pool(x[:, None])[:, 0]
        if self.merge == 1:
            return x
        assert self.grid is not None  # the base refuses a merging projector without a grid
        rows, columns = self.grid
        return x.unflatten(-1, (rows, self.merge, columns, self.merge)).mean((-3, -1)).flatten(-2)


def cosine(x: Tensor, y: Tensor | None = None) -> Tensor:
    """x[..., n, D], y[..., m, D] -> [..., n, m], in float32; a zero vector is like nothing"""
    x, y = (z.float() / z.float().norm(dim=-1, keepdim=True).clamp(min=1e-12) for z in (x, x if y is None else y))
    return x @ y.transpose(-1, -2)


def rank(score: Tensor) -> Tensor:
    """score[..., n] -> its place in the falling order, 0 = best; ties go to the lower index"""
    return score.sort(dim=-1, descending=True, stable=True).indices.argsort(-1)


def bilinear(size: int, wanted: int, device: torch.device) -> Tensor:
    """[wanted, size]: the weights of a resize along one axis, corners not aligned (a constant; a resize operator is another thing on each
    backend)"""
    weight = [[0.0] * size for _ in range(wanted)]
    for i in range(wanted):
        at = max((i + 0.5) * size / wanted - 0.5, 0.0)
        low = int(at)
        weight[i][low] += 1 - (at - low)
        weight[i][min(low + 1, size - 1)] += at - low
    return torch.tensor(weight, device=device)


def evenly(count: int, candidate: Tensor) -> Tensor:
    """candidate[I, n] bool -> [I, n] bool: `count` of the candidates (or all, if fewer), evenly spaced in reading order"""
    n = candidate.sum(-1, keepdim=True).clamp(min=1)
    place = candidate.long().cumsum(-1) - 1
    return candidate & (((place + 1) * count) // n > (place * count) // n)


__all__ = ["EXTERNAL", "FROM_ATTENTION", "FROM_CLS", "Attention", "Signals", "bilinear", "cosine", "evenly", "rank"]
