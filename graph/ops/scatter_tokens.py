"""Put processed tokens back among those that bypassed a layer."""

from torch import Tensor

from ._define import op


@op
def scatter_tokens(x: Tensor, y: Tensor, index: Tensor) -> Tensor:
    """x[B, T, D], y[B, K, D], index[B, K]  ->  z[B, T, D],  z[b, index[b, k]] = y[b, k], x elsewhere"""
    return x.scatter(1, index[..., None].expand(*index.shape, x.shape[-1]), y)
