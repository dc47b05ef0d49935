"""Image features into the places that wait for them."""

import torch
from torch import Tensor

from ._define import op


@op
def splice_image_features(embeds: Tensor, features: Tensor, visual: Tensor) -> Tensor:
    """embeds[B, T, D], features[B, N, D], visual[B, T] bool  ->  y[B, T, D]

    The i-th True of row b takes features[b, i]; rows with fewer visual tokens leave the end of their features unread.
    """
    index = (visual.long().cumsum(1) - 1).clamp(min=0)
    return torch.where(visual[..., None], features.gather(1, index[..., None].expand(*index.shape, features.shape[2])).to(embeds.dtype), embeds)
