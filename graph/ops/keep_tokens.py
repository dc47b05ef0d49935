"""Gather K of T tokens."""

from torch import Tensor

from ._define import op


@op
def keep_tokens(x: Tensor, index: Tensor) -> Tensor:
    """x[B or 1, T, *rest], index[B, K]  ->  y[B, K, *rest],  y[b, k] = x[b, index[b, k]]"""
    rest = x.shape[2:]
    x = x.expand(index.shape[0], *x.shape[1:])
    return x.gather(1, index.reshape(*index.shape, *[1] * len(rest)).expand(*index.shape, *rest))
