"""The scales and centres that keys or values are stored with."""

from functools import partial

import torch
from torch import Tensor

from ._define import op

TINY = 1e-6  # a constant row has no range: its scale is this, its codes 0


def _shared(x: Tensor, per: str) -> tuple[Tensor, int]:
    """x, its groups or blocks on an axis of their own, and the axis along which a scale is shared."""
    kind, _, size = per.partition(":")
    if kind == "group":
        return x.unflatten(3, (-1, int(size))), 4
    if kind == "block":
        return torch.nn.functional.pad(x, (0, 0, 0, -x.shape[2] % int(size))).unflatten(2, (-1, int(size))), 3
    return x, 3 if kind == "token" else 2


def _shape(x: Tensor, valid: Tensor, bits: int, per: str, centred: bool, margin: float) -> tuple[Tensor, Tensor]:
    x, axis = _shared(x, per)
    scale = x.amax(axis, keepdim=":" not in per)
    return scale, torch.empty_like(scale)


@partial(op, fake=_shape)
def kv_scale(x: Tensor, valid: Tensor, bits: int, per: str, centred: bool, margin: float) -> tuple[Tensor, Tensor]:
    """x[B, G, T, D], valid[B, T] bool  ->  scale, center of the type of x, over valid rows only

    per: "channel" [B, G, 1, D]; "token" [B, G, T, 1]; "group:n" [B, G, T, D / n]; "block:n" [B, G, ceil(T / n), D].
    plain:    scale = max |x| / (2^(bits-1) - 1),  center 0
    centred:  scale = (max - min) / (2^bits - 1),  center = min + 2^(bits-1) scale, so that all 2^bits codes are used
    margin widens the range about its middle: room for tokens that are yet to come. 1 bit: scale = mean |x - center|, center = mean or 0.
    """
    dtype, held = x.dtype, valid[:, None, :, None].expand(x.shape)
    (x, axis), (held, _) = _shared(x.float(), per), _shared(held, per)
    count = held.sum(axis, keepdim=True).clamp(min=1)
    if bits == 1:
        center = torch.where(held, x, 0).sum(axis, keepdim=True) / count if centred else torch.zeros_like(x.amax(axis, keepdim=True))
        scale = torch.where(held, (x - center).abs(), 0).sum(axis, keepdim=True) / count
    elif centred:
        some = held.any(axis, keepdim=True)
        low = torch.where(some, torch.where(held, x, torch.finfo(x.dtype).max).amin(axis, keepdim=True), 0)
        high = torch.where(some, torch.where(held, x, torch.finfo(x.dtype).min).amax(axis, keepdim=True), 0)
        scale = ((high - low) * (margin / (2**bits - 1))).clamp(min=TINY)
        center = (low + high) / 2 + scale / 2
    else:
        scale = torch.where(held, x.abs(), 0).amax(axis, keepdim=True) * (margin / (2 ** (bits - 1) - 1))
        center = torch.zeros_like(scale)
    if ":" in per:
        scale, center = scale.squeeze(axis), center.squeeze(axis)
    return scale.clamp(min=TINY).to(dtype), center.to(dtype)
