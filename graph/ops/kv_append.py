"""Past and new rows as one sequence."""

import torch
from torch import Tensor

from ._define import op


@op
def kv_append(past: Tensor, new: Tensor, layer: int, which: str) -> Tensor:
    """past[B, G, P, D], new[B, G, S, D]  ->  [B, G, P + S, D]; which past rows are valid is `kv_mask`'s business"""
    return torch.cat([past, new], 2)
