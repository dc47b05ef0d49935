"""Where visual tokens may go for good: the exit layer, measured on unlabeled prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..graph.errors import GraphError
from ..graph.program import Program
from ..graph.sites import layers
from .base import PassError
from .methods.exit_vision import ExitVision


@dataclass(frozen=True)
class ExitReport:
    """agreement[layer]: the share of prompts whose next token is the same when visual tokens leave there; kl[layer]: mean KL in nats; safe:
    per prompt, the first layer from which on every exit keeps the token."""

    agreement: dict[int, float]
    kl: dict[int, float]
    safe: tuple[int, ...]

    def choose(self, share: float = 0.95) -> int:
        """The first layer that is safe for this share of the prompts."""
        if not 0 < share <= 1:
            raise PassError(f"exit-vision: share is in (0, 1], got {share}")
        return sorted(self.safe)[math.ceil(share * len(self.safe)) - 1]


def exit_layers(program: Program, feeds: Sequence[dict[str, Tensor]], candidates: Sequence[int] | None = None) -> ExitReport:
    """Try every candidate layer (all but the first, unless given) on these prefill inputs, by the label rule of DyVTE: same answer or not.
    """
    known = sorted(layers(program["prefill"], program.facts.layer_path))
    tried = sorted(candidates) if candidates is not None else known[1:]
    if missing := [l for l in tried if l not in known]:
        raise PassError(f"exit-vision: no layers {missing}; this program has {known[0]}..{known[-1]}")
    if not feeds or not tried:
        raise GraphError("exit-vision: needs prompts and at least one candidate layer to choose from")
    with torch.no_grad():
        want = [program["prefill"].run(feed)["logits"].log_softmax(-1) for feed in feeds]
        same, kl = {}, {}
        for layer in tried:
            short = program.clone()
            ExitVision(layer=layer).run(short)
            got = [short["prefill"].run(feed)["logits"].log_softmax(-1) for feed in feeds]
            same[layer] = torch.cat([g.argmax(-1) == w.argmax(-1) for g, w in zip(got, want, strict=True)]).tolist()
            kl[layer] = float(torch.cat([(w.exp() * (w - g)).sum(-1) for g, w in zip(got, want, strict=True)]).mean())
    never = known[-1] + 1
    safe = [next((l for l in tried if all(same[m][i] for m in tried if m >= l)), never) for i in range(len(same[tried[0]]))]
    return ExitReport({l: sum(s) / len(s) for l, s in same.items()}, kl, tuple(safe))
