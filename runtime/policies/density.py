"""How much there is to see in a picture: figures that need no language model. Larger = denser."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

MASS = 0.95  # of the energy; ZipVL (arXiv:2410.08584) counts the tokens that hold a share of the attention
FLAT = 8.0  # grey levels of 255: a pixel that differs less from its neighbours is part of a plain area
FROM_PICTURE = ("edges", "detail")
FROM_FEATURES = ("mass", "dissimilarity", "rank")
SIGNALS = (*FROM_PICTURE, *FROM_FEATURES)


def of_picture(picture: Image.Image, signal: str) -> float:
    """edges: the share of pixels that differ from the next one right or below; detail: bits per pixel of a JPEG of it (quality 75)."""
    if signal == "detail":
        return _bits(picture)
    grey = np.asarray(picture.convert("L"), np.float32)
    right, below = np.abs(np.diff(grey, axis=1))[:-1], np.abs(np.diff(grey, axis=0))[:, :-1]
    return float((np.maximum(right, below) > FLAT).mean()) if right.size and below.size else 0.0


def of_features(features: np.ndarray, signal: str) -> float:
    """features[n, D] of one picture -> mass: how many tokens hold MASS of the energy around the mean token; dissimilarity: mean pairwise
    1 - cosine; rank: the effective number of directions (exponential of the entropy of the spectrum, Roy and Vetterli 2007)."""
    x = np.asarray(features, np.float64)
    if signal == "dissimilarity":
        unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
        n, total = len(x), float((unit.sum(0) ** 2).sum())
        return 1 - (total - n) / max(n * (n - 1), 1)
    x = x - x.mean(0)
    if signal == "mass":
        energy = np.sort((x**2).sum(1))[::-1]
        return float((energy.cumsum() < MASS * energy.sum()).sum() + 1)
    p = np.linalg.svd(x, compute_uv=False) ** 2
    p = p[p > 0] / max(p.sum(), 1e-300)
    return float(np.exp(-(p * np.log(p)).sum()))


def densest(values: Sequence[float]) -> float:
    """Of several pictures the densest decides; a request without pictures needs the least."""
    return max(values, default=-np.inf)


def _bits(picture: Image.Image) -> float:
    import io

    out = io.BytesIO()
    picture.save(out, "JPEG", quality=75)
    return 8 * out.tell() / (picture.width * picture.height)
