"""Column sums of attention: how much every token receives from all rows, one head at a time."""

import torch
from torch import Tensor

from ._define import op
from .attention import attention_logits


@op
def attention_columns(q: Tensor, k: Tensor, mask: Tensor | None, weight: Tensor, scale: float, causal: bool, softcap: float) -> Tensor:
    """q[B, H, S, D], k[B, G, T, D], mask as in `attention`, weight[B, S]  ->  c[B, H, T] in float32

    c[b, h, j] = sum_i weight[b, i] p[b, h, i, j]

    p is the softmax over j. The second pass over the keys of the methods that sum over rows: with the log-sum-exp of a row, p = exp(logit -
    lse) and the weights fold into the exponent's row, so one head's S x T logits are alive at a time and never the H x S x T of eager
    attention.
    """
    groups = q.shape[1] // k.shape[1]
    columns = []
    for head in range(q.shape[1]):
        one = mask[:, head : head + 1] if mask is not None and mask.dim() == 4 and mask.shape[1] != 1 else mask
        keys = k[:, head // groups : head // groups + 1]
        logits = attention_logits(q[:, head : head + 1], keys, one, None, None, scale, causal, 0, softcap)[:, 0]
        p = (logits - logits.logsumexp(-1, keepdim=True)).exp()
        columns.append((weight.float()[:, None] @ p)[:, 0])
    return torch.stack(columns, 1)
