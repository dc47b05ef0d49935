"""Query pooling: every region's average asks its own tokens what it has lost."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn import functional

from ..insert_vision import Initial, VisionInsertion, to_blocks
from ..vision_place import Place


@dataclass(frozen=True)
class QueryPool(VisionInsertion):
    """One token per `side` x `side` region: its average, and what the average reads from the region by attention.

    rewrite:
        x[I, n, D] -> projector  =>  m = mean of region;  m + out(softmax(q(m) k(region)^T) v(region)) -> projector

    QueCC (Li et al. 2024) pools regions by cross-attention from their downsampled tokens, to which it adds the question. The question is left out
    here: features stay the same for all questions about a picture, and can be cached. `out` starts at zero, so that before training this is exactly
    average pooling, and q and k share an identity, so that it starts to read by likeness.
    """

    name: ClassVar[str] = "query-pool"
    paper: ClassVar[str] = "arXiv:2411.03312"

    side: Annotated[int, Ge(2)] = 3

    def count(self, place: Place) -> int:
        return self.blocks(place, self.side)

    def initial(self, place: Place, width: int) -> Initial:
        return {"query": lambda: torch.eye(width), "key": lambda: torch.eye(width), "value": lambda: torch.eye(width), "out": lambda: torch.zeros(width, width)}

    def map(self, x: Tensor, place: Place, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> Tensor:
        region = to_blocks(x, self.grid(place), self.side)  # [I, K, side^2, D]
        mean = region.mean(2)
        q, k, v = functional.linear(mean, query)[:, :, None], functional.linear(region, key), functional.linear(region, value)
        p = ((q.float() @ k.float().transpose(2, 3)) * x.shape[-1] ** -0.5).softmax(-1).to(x.dtype)
        return mean + functional.linear((p @ v).squeeze(2), out)
