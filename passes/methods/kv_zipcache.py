"""ZipCache: salient tokens in more bits, the rest in fewer, by attention normalized over the probes that can see a token."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge
from torch import Tensor

from ..kv_mixed import Code, MixedKV, Share
from ..kv_saliency import onlookers, probes, received


@dataclass(frozen=True)
class KVZipCache(MixedKV):
    """Keep the most salient tokens of a layer in `hi` codes and the rest in `lo` codes; what is generated in `appended` codes.

    rewrite:
        rows = the last `probes` valid rows and `probes` rows at a fixed stride                            (after the layer's attention)
        a[t] = sum_(h, r) attention_rows(q, k, rows)[h, r, t] / |{r : rows[r] >= t}|
        k.l, v.l  ->  the recent rows;  k.l.hi: rows of text, sinks, top(a, important);  k.l.lo: the others                     (v alike)

    He et al., "ZipCache", NeurIPS 2024. The published code divides by L - t although it sums probes only, so early tokens score up to ten
    times too low; here the divisor counts the probes that see a token, as the paper's equation says, and the probes are the same in every
    run. One list per layer (all heads together). The published setting is hi=int4, lo=int2, important=0.6, text=false; the defaults here
    treat text as important. Keys and values are channelwise in all classes, where the paper has values token by token, and what is generated
    has eight bits: it does not keep to the ranges of the prompt (docs/kv.md).
    """

    name: ClassVar[str] = "kv-zipcache"
    paper: ClassVar[str] = "arXiv:2405.14256"

    hi: Code = "int4"
    lo: Code = "int2"
    important: Share = 0.6
    probes: Annotated[int, Ge(1)] = 32

    def importance(self, q: Tensor, k: Tensor, mask: Tensor | None, valid: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
        rows = probes(valid, self.probes, self.probes)
        return received(q, k, mask, rows, scale, causal, softcap) / onlookers(valid, rows, causal)
