"""What an engine checks of a cache, whatever holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...graph.kv_format import BITS, KVFormat
from ..errors import LowerError

FIXED = ("int8", "int4", "int2")  # codes with a first and a last level


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


def clip_rate(formats: Mapping[int, KVFormat], start: np.ndarray, now: np.ndarray, codes: Callable[[str], np.ndarray]) -> float | None:
    """Share of first and last levels among the rows appended since `start`[L, B], where a scale per channel was frozen by the prompt.

    codes: name of a past -> its codes int8[B, G, C, D]. None where no layer has such a format, 0 where nothing was appended.
    """
    counts, fixed = np.zeros(2, np.int64), False
    for row, (layer, form) in enumerate(formats.items()):
        part = form.partitions[0]
        for which in "kv":
            if part.code not in FIXED or part.per(which) != "channel":
                continue
            fixed, top = True, 2 ** (BITS[part.code] - 1)
            stored = codes(f"past_{which}.{layer}")
            for b in range(start.shape[1]):
                new = stored[b, :, int(start[row, b]) : int(now[row, b])]
                counts += ((new == -top) | (new == top - 1)).sum(), new.size
    return (float(counts[0] / counts[1]) if counts[1] else 0.0) if fixed else None
