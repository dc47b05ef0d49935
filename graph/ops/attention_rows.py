"""The score tap: attention probabilities of a few query rows, beside the layer's own fused attention."""

import torch
from torch import Tensor

from ._define import op
from .attention import attention_logits


@op
def attention_rows(q: Tensor, k: Tensor, mask: Tensor | None, rows: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
    """q[B, H, S, D], k[B, G, S, D], mask as in `attention`, rows[B, R] query indices  ->  p[B, H, R, S] in float32

    The rows of softmax(q k^T scale) that a method needs (FastV: the last one; CLS methods: row 0), at R/S of the cost.
    """
    index = rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])
    picked = q.gather(2, index)
    if mask is not None and mask.dim() == 4 and mask.shape[2] != 1:
        mask = mask.expand(rows.shape[0], -1, -1, -1).gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    k_pos = torch.arange(k.shape[2], device=q.device)[None] if causal else None
    return attention_logits(picked, k, mask, rows if causal else None, k_pos, scale, causal, 0, softcap).softmax(-1)
