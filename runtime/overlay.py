"""Kept tokens drawn on the picture: the original, then one panel per site with what was dropped in the dark."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw

from .errors import RunError

if TYPE_CHECKING:
    from .result import Generation, Picture

PANEL = 336  # pixels of a panel's longer side
CAPTION = 18
GAP = 8
DARK = 0.22  # brightness of a dropped token
EDGE = (255, 196, 0)


def draw(result: Generation, path: Path, sample: int | None = None) -> Path:
    """Rows: pictures of all samples (or of one). Columns: the picture, then every site with kept tokens. Written whole or not at all."""
    if sample is not None and not 0 <= sample < len(result.pictures):
        raise RunError(f"overlay: no sample {sample}; this result has {len(result.pictures)}")
    chosen = result.pictures if sample is None else result.pictures[sample : sample + 1]
    rows = [_row(p) for group in chosen for p in group]
    if not rows:
        raise RunError("overlay: this result has no picture; it was generated from text alone")
    width, height = max(r.width for r in rows), sum(r.height for r in rows) + GAP * (len(rows) - 1)
    sheet = Image.new("RGB", (width, height), "white")
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    partial = path.with_name(f".{path.name}.part")
    try:
        sheet.save(partial, format="PNG")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunError(f"overlay: cannot write {path} ({error.strerror or error})") from None
    return path


def _row(picture: Picture) -> Image.Image:
    scale = PANEL / max(picture.image.size)
    size = (max(1, round(picture.image.width * scale)), max(1, round(picture.image.height * scale)))
    base = picture.image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
    panels = [_captioned(base, f"{picture.tokens} tokens")]
    for site, kept in picture.kept.items():
        panels.append(_captioned(panel(base, kept, picture.tokens, picture.grid), f"{site}: {len(kept)} of {picture.tokens}"))
    sheet = Image.new("RGB", (sum(p.width for p in panels) + GAP * (len(panels) - 1), panels[0].height), "white")
    left = 0
    for p in panels:
        sheet.paste(p, (left, 0))
        left += p.width + GAP
    return sheet


def panel(base: Image.Image, kept: np.ndarray, tokens: int, grid: tuple[int, int] | None) -> Image.Image:
    """The picture with the cells of dropped tokens darkened and kept ones framed.

    Without a known grid (pictures cut into tiles) tokens are a strip below the picture, in reading order, since their place is not known.
    """
    shape = grid if grid and grid[0] * grid[1] == tokens else _square(tokens)
    if shape is None:
        return _strip(base, kept, tokens)
    mask = np.zeros(tokens, bool)
    mask[kept] = True
    rows, columns = shape
    w, h = base.size
    light = (
        np.asarray(Image.fromarray(mask.reshape(rows, columns).astype(np.uint8) * 255).resize((w, h), Image.Resampling.NEAREST))[..., None]
        > 127
    )
    pixels = np.asarray(base).astype(np.float32)
    out = Image.fromarray(np.where(light, pixels, pixels * DARK).astype(np.uint8))
    pen = ImageDraw.Draw(out)
    for index in np.flatnonzero(mask):
        r, c = divmod(int(index), columns)
        box = (round(c * w / columns), round(r * h / rows), round((c + 1) * w / columns) - 1, round((r + 1) * h / rows) - 1)
        if box[2] > box[0] and box[3] > box[1]:
            pen.rectangle(box, outline=EDGE)
    return out


def _square(tokens: int) -> tuple[int, int] | None:
    side = math.isqrt(tokens)
    return (side, side) if side * side == tokens else None


def _strip(base: Image.Image, kept: np.ndarray, tokens: int) -> Image.Image:
    out = base.copy()
    bar = max(6, base.height // 12)
    pen = ImageDraw.Draw(out)
    pen.rectangle((0, base.height - bar, base.width, base.height), fill=(40, 40, 40))
    for index in kept:
        left = int(index) * base.width / tokens
        pen.rectangle((left, base.height - bar, left + max(1.0, base.width / tokens - 0.5), base.height), fill=EDGE)
    return out


def _captioned(image: Image.Image, text: str) -> Image.Image:
    out = Image.new("RGB", (image.width, image.height + CAPTION), "white")
    out.paste(image, (0, CAPTION))
    ImageDraw.Draw(out).text((2, 3), text, fill="black")
    return out
