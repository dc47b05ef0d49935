"""What an engine checks of a cache, whatever holds it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import LowerError


def check_finite(name: str, value: Any) -> None:
    """name: k.3.scale and the like; value: array or tensor. A scale or centre that is not a number means that keys or values were none."""
    which, _, rest = name.partition(".")
    if not rest.endswith((".scale", ".center")):
        return
    bad = ~np.isfinite(np.asarray(value.cpu().float() if hasattr(value, "cpu") else value, np.float32))
    if bad.any():
        rows = sorted({int(b) for b in np.nonzero(bad)[0]})
        kind = "keys" if which == "k" else "values"
        raise LowerError(f"cache: the {kind} of layer {rest.split('.')[0]} hold NaN or infinity in samples {rows}; they cannot be quantized")
