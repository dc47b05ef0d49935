"""Deterministic pictures: scenes of coloured shapes and handwritten digits, and pages of short text needles."""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.random import Generator

SIZE, PATCH = 96, 8
GRID = SIZE // PATCH                                    # 12 x 12 = 144 visual tokens
CELL = SIZE // 3
ROWS, COLS = ["top", "middle", "bottom"], ["left", "center", "right"]
DIGITS = [str(d) for d in range(10)]
SHAPES = ["circle", "square", "triangle", "cross"]
LETTERS = list("ACEFHKLMPTUX")
KINDS = DIGITS + SHAPES + LETTERS                       # an object's kind indexes this list
COLORS = ["red", "green", "blue", "yellow", "purple", "white"]
RGB = np.array([[225, 40, 40], [45, 200, 60], [60, 95, 250], [235, 215, 45], [195, 60, 215], [245, 245, 245]], np.float32)

SPLITS = {"train": slice(0, 1337), "val": slice(1337, 1437), "test": slice(1437, 1797)}    # of the 1,797 handwritten digits
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

# 5x7 pixel font, one number per row, the highest of five bits leftmost.
FONT = {
    "0": (14, 17, 19, 21, 25, 17, 14), "1": (4, 12, 4, 4, 4, 4, 14), "2": (14, 17, 1, 2, 4, 8, 31),
    "3": (31, 2, 4, 2, 1, 17, 14), "4": (2, 6, 10, 18, 31, 2, 2), "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14), "7": (31, 1, 2, 4, 8, 8, 8), "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12), "A": (14, 17, 17, 31, 17, 17, 17), "C": (14, 17, 16, 16, 16, 17, 14),
    "E": (31, 16, 16, 30, 16, 16, 31), "F": (31, 16, 16, 30, 16, 16, 16), "H": (17, 17, 17, 31, 17, 17, 17),
    "K": (17, 18, 20, 24, 20, 18, 17), "L": (16, 16, 16, 16, 16, 16, 31), "M": (17, 27, 21, 21, 17, 17, 17),
    "P": (30, 17, 17, 30, 16, 16, 16), "T": (31, 4, 4, 4, 4, 4, 4), "U": (17, 17, 17, 17, 17, 17, 14),
    "X": (17, 17, 10, 4, 10, 17, 17),
}


class Thing(NamedTuple):
    """A shape or digit of a scene, in one cell of its 3x3 grid."""

    row: int
    col: int
    kind: int
    color: int


class Needle(NamedTuple):
    """A line of a page, such as K47, in one cell of its 3x2 grid."""

    row: int
    col: int
    key: int
    tens: int
    ones: int
    color: int


# Per-patch training labels; -1 where a label says nothing. `kind` and `color` are 0 on background.
LABELS = {"kind": 1 + len(KINDS), "color": 1 + len(COLORS), "row": 3, "col": 3, "up": 15, "down": 15, "left": 15, "right": 15,
          "center": 2, "same_color": 6, "same_kind": 6, "key": len(LETTERS), "tens": 10, "ones": 10}
LABEL_ID = {name: i for i, name in enumerate(LABELS)}
BLANK = np.full((len(LABELS), GRID, GRID), -1, np.int64)
BLANK[[LABEL_ID["kind"], LABEL_ID["color"], LABEL_ID["center"]]] = 0
BLANK[LABEL_ID["row"]] = (np.arange(GRID) * 3 // GRID)[:, None]
BLANK[LABEL_ID["col"]] = (np.arange(GRID) * 3 // GRID)[None, :]


class Picture(NamedTuple):
    """Pixels[96, 96, 3] u8, what is in them in reading order, and labels[label, 12, 12]."""

    pixels: np.ndarray
    things: list
    labels: np.ndarray


@cache
def glyphs(split: str) -> list[np.ndarray]:
    """Ten arrays[n, 12, 12], one per digit class: the handwritten samples of one split, padded by two."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, target = (bunch.images / 16).astype(np.float32)[SPLITS[split]], bunch.target[SPLITS[split]]
    return [np.pad(images[target == d], ((0, 0), (2, 2), (2, 2))) for d in range(10)]


@cache
def textures() -> tuple[np.ndarray, np.ndarray]:
    """Banks of smooth[256, 128, 128, 3] and fine[16, 128, 128, 3] noise, the same in every process."""
    rng = np.random.default_rng(7)
    smooth = []
    for _ in range(256):
        n = int(rng.integers(3, 9))
        z = rng.normal(size=(n + 1, n + 1, 3)).astype(np.float32)
        if rng.random() < 0.4:                          # stripes
            z = z[:, :1].repeat(n + 1, 1) if rng.random() < 0.5 else z[:1].repeat(n + 1, 0)
        t = np.linspace(0, n - 1e-3, 128)
        i, f = t.astype(int), (t % 1).astype(np.float32)
        z = z[i] * (1 - f)[:, None, None] + z[i + 1] * f[:, None, None]
        smooth.append(z[:, i] * (1 - f)[None, :, None] + z[:, i + 1] * f[None, :, None])
    return np.stack(smooth), rng.normal(size=(16, 128, 128, 3)).astype(np.float32)


def background(rng: Generator) -> np.ndarray:
    smooth, fine = textures()
    y, x = (int(v) for v in rng.integers(0, 33, 2))
    flip = -1 if rng.random() < 0.5 else 1
    base = rng.uniform(25, 80, 3).astype(np.float32) * 0.6 + rng.uniform(15, 60) * 0.4
    field = smooth[rng.integers(256), y:y + SIZE, x:x + SIZE][:, ::flip] * np.float32(rng.uniform(4, 16))
    return base.astype(np.float32) + field + fine[rng.integers(16), x:x + SIZE, y:y + SIZE] * np.float32(rng.uniform(2, 9))


def sample(glyph: np.ndarray, ys: np.ndarray, xs: np.ndarray) -> np.ndarray:
    """Bilinear glyph[h, w] at fractional (ys, xs), clamped to its border."""
    h, w = glyph.shape
    ys, xs = ys.clip(0, h - 1.001), xs.clip(0, w - 1.001)
    y, x = ys.astype(np.int32), xs.astype(np.int32)
    fy, fx, flat, i = ys - y, xs - x, glyph.ravel(), y * w + x
    return (flat[i] * (1 - fx) + flat[i + 1] * fx) * (1 - fy) + (flat[i + w] * (1 - fx) + flat[i + w + 1] * fx) * fy


def draw_digit(rng: Generator, glyph: np.ndarray, side: int) -> np.ndarray:
    """A handwritten sample as ink[side, side] in [0, 1], slightly turned, sheared and stretched."""
    turn, shear = rng.uniform(-0.2, 0.2), rng.uniform(-0.12, 0.12)
    zoom, stretch = 8.6 / side / rng.uniform(0.92, 1.1), rng.uniform(0.9, 1.1)
    line = np.arange(side, dtype=np.float32) - (side - 1) / 2
    x, y = line[None, :] * zoom * stretch, line[:, None] * zoom / stretch
    c, s = np.cos(turn), np.sin(turn)
    return (sample(glyph, s * x + c * y + 5.5, c * x - s * y + shear * y + 5.5) * rng.uniform(1.1, 1.45)).clip(0, 1)


def draw_shape(shape: int, side: int) -> np.ndarray:
    line = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    x, y = line[None, :], line[:, None]
    inside = (
        lambda: 0.95 - np.sqrt(x * x + y * y),
        lambda: 0.85 - np.maximum(abs(x), abs(y)),
        lambda: np.minimum(0.9 - y, (y + 0.95) * 0.45 - abs(x) + 0.02),
        lambda: np.maximum(np.minimum(0.34 - abs(x), 0.95 - abs(y)), np.minimum(0.34 - abs(y), 0.95 - abs(x))),
    )[shape]()
    return (inside * side * 0.5 + 0.5).clip(0, 1)


@cache
def font(char: str) -> np.ndarray:
    """ink[9, 7]: one font glyph with a border of one."""
    return np.pad(np.array([[row >> (4 - x) & 1 for x in range(5)] for row in FONT[char]], np.float32), 1)


def draw_char(char: str, width: int, height: int) -> np.ndarray:
    ys = (np.arange(height, dtype=np.float32) + 0.5) / height * 7 + 0.5
    xs = (np.arange(width, dtype=np.float32) + 0.5) / width * 5 + 0.5
    return (sample(font(char), ys[:, None], xs[None, :]) * 1.4).clip(0, 1)


def paint(pixels: np.ndarray, ink: np.ndarray, y: int, x: int, color: np.ndarray) -> None:
    h, w = ink.shape
    spot = pixels[y:y + h, x:x + w]
    spot += (color - spot) * ink[..., None]


def tint(rng: Generator, color: int) -> np.ndarray:
    return (RGB[color] * rng.uniform(0.85, 1.05) + rng.normal(size=3) * 8).astype(np.float32)


def covered(start: int, length: int) -> slice:
    """The patches of one axis that a stretch of pixels covers by about half or more."""
    return slice((start + 3) // PATCH, (start + length + 4) // PATCH)


def neighbours(thing: Thing, things: list[Thing]) -> dict[str, Thing | None]:
    at = {(t.row, t.col): t for t in things}
    return {step: at.get((thing.row + dy, thing.col + dx)) for step, (dy, dx) in STEPS.items()}


# Sides in pixels, upper end excluded. Held-out things are from the small end: fewer patches each, so that a lost patch tells.
SIDES = {"train": ((19, 27), (15, 25)), "val": ((19, 22), (15, 18)), "test": ((19, 22), (15, 18))}


def scene(rng: Generator, split: str) -> Picture:
    """Three to five shapes and digits in the cells of a loose 3x3 grid."""
    digit_sides, shape_sides = SIDES[split]
    cells = sorted(int(c) for c in rng.permutation(9)[: rng.integers(3, 6)])
    palette = rng.permutation(len(COLORS))[: rng.integers(2, 5)]
    digit_rate = (0.35, 0.6, 0.85)[rng.integers(3)]
    pixels, labels, things, boxes = background(rng), BLANK.copy(), [], []
    for cell in cells:
        row, col, color = *divmod(cell, 3), int(palette[rng.integers(len(palette))])
        if rng.random() < digit_rate:
            kind, side = int(rng.integers(10)), int(rng.integers(*digit_sides))
            pool = glyphs(split)[kind]
            ink = draw_digit(rng, pool[rng.integers(len(pool))], side)
        else:
            kind, side = 10 + int(rng.integers(len(SHAPES))), int(rng.integers(*shape_sides))
            ink = draw_shape(kind - 10, side)
        y, x = row * CELL + int(rng.integers(CELL - side + 1)), col * CELL + int(rng.integers(CELL - side + 1))
        paint(pixels, ink, y, x, tint(rng, color))
        things.append(Thing(row, col, kind, color))
        boxes.append((y, x, side))
    for thing, (y, x, side) in zip(things, boxes, strict=True):
        spot = labels[:, covered(y, side), covered(x, side)]
        near = neighbours(thing, things)
        values = dict(kind=1 + thing.kind, color=1 + thing.color, same_color=sum(t.color == thing.color for t in things),
                      same_kind=sum(t.kind == thing.kind for t in things), **{step: 1 + t.kind if t else 0 for step, t in near.items()})
        for name, value in values.items():
            spot[LABEL_ID[name]] = value
        labels[LABEL_ID["center"], (y + side // 2) // PATCH, (x + side // 2) // PATCH] = 1
    return Picture(pixels.clip(0, 255).astype(np.uint8), things, labels)


def page(rng: Generator) -> Picture:
    """Four to six needles (a letter and a two-digit number) in a small pixel font, jittered in a 3x2 grid."""
    cells = sorted(int(c) for c in rng.permutation(6)[: rng.integers(4, 7)])
    keys, values = rng.permutation(len(LETTERS)), rng.permutation(90) + 10
    palette = rng.permutation(len(COLORS))[: rng.integers(2, 4)]
    pixels, labels, needles = background(rng), BLANK.copy(), []
    for cell, key, value in zip(cells, keys, values, strict=False):
        row, col, color = *divmod(cell, 2), int(palette[rng.integers(len(palette))])
        needle = Needle(row, col, int(key), int(value) // 10, int(value) % 10, color)
        width, height, gap = int(rng.integers(9, 11)), int(rng.integers(12, 15)), int(rng.integers(2, 5))
        y = row * CELL + int(rng.integers(CELL - height + 1))
        x = col * SIZE // 2 + int(rng.integers(SIZE // 2 - (3 * width + gap + 2) + 1))
        shade = tint(rng, color)
        for i, char in enumerate((LETTERS[needle.key], DIGITS[needle.tens], DIGITS[needle.ones])):
            left = x + i * (width + 1) + (gap if i else 0)
            paint(pixels, draw_char(char, width, height), y, left, shade)
            spot = labels[:, covered(y, height), covered(left, width)]
            for name, what in dict(kind=1 + KINDS.index(char), color=1 + color, key=needle.key, tens=needle.tens, ones=needle.ones).items():
                spot[LABEL_ID[name]] = what
        needles.append(needle)
    return Picture(pixels.clip(0, 255).astype(np.uint8), needles, labels)
