"""ZipVL's cache: as many tokens in more bits as it takes to hold a share of the attention."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from ..kv_mixed import Code, MixedKV, Share
from ..kv_saliency import onlookers, probes, received


@dataclass(frozen=True)
class KVZipVL(MixedKV):
    """The number of important tokens is the layer's own: as many as hold `mass` of what the probes give, at most the share `important`.

    rewrite:
        a[t] = sum_(h, r) attention_rows(q, k, probes)[h, r, t],  n = min{n : the n largest a hold mass * sum a}
        k.l, v.l  ->  hi: text, sinks, recent, top(a / probes that see the token, min(n, important));  lo: the others

    He et al., "ZipVL", 2024, first version (the second drops the rest: drop-zip-vl). The count is data, the shapes are bounds: rows beyond it
    are filler that nothing attends to. The bits of the two classes are not published; int8 and int4 here.
    """

    name: ClassVar[str] = "kv-zipvl"
    paper: ClassVar[str] = "arXiv:2410.08584"

    mass: Annotated[float, Gt(0), Le(1)] = 0.975
    probes: Annotated[int, Ge(1)] = 32
    important: Share = 0.5
    hi: Code = "int8"
    lo: Code = "int4"

    def importance(self, q: Tensor, k: Tensor, mask: Tensor | None, valid: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
        rows = probes(valid, self.probes, self.probes)
        return received(q, k, mask, rows, scale, causal, softcap) / onlookers(valid, rows, causal)

    def limit(self, q: Tensor, k: Tensor, mask: Tensor | None, valid: Tensor, pool: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
        a = received(q, k, mask, probes(valid, self.probes, self.probes), scale, causal, softcap)
        a = torch.where(pool, a, 0).sort(dim=1, descending=True).values
        short = a.cumsum(1) < self.mass * a.sum(1, keepdim=True)
        return torch.where(pool.any(1), short.sum(1) + 1, 0)
