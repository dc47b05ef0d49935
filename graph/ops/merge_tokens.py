"""Weighted sums of groups of tokens."""

from torch import Tensor

from ._define import op


@op
def merge_tokens(x: Tensor, weight: Tensor) -> Tensor:
    """x[B, T, D], weight[B, K, T]  ->  y[B, K, D] = weight x, accumulated in float32"""
    return (weight.float() @ x.float()).to(x.dtype)
