"""Marks the keys or values that go to the cache."""

from torch import Tensor

from ._define import op


@op
def kv_store(new: Tensor, layer: int, which: str) -> Tensor:
    """new[B, G, T, D]  ->  the same; `which` is "k" or "v". Keys are stored after RoPE."""
    return new.clone()
