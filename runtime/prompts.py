"""Pictures and prompts -> what the artifact's own processor makes of them, one sample at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import RunError

CONVERTED_MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "YCbCr", "HSV", "PA", "La", "RGBa", "RGBX")
IMAGE_ITEMS = ("image", "image_url")
PLACEHOLDERS = ("image_token", "boi_token", "start_of_image_token")  # attributes under which processors name their placeholder

Picture = Any  # a PIL image, a path, or an array [H, W, 3] / [H, W] of uint8


@dataclass(frozen=True)
class Sample:
    """One prompt with its pictures, after the processor."""

    text: str
    tokens: np.ndarray  # int64[T]
    vision: dict[str, np.ndarray] = field(default_factory=dict)  # the processor's other outputs: pixel_values, image_grid_thw, ...
    pictures: tuple[Image.Image, ...] = ()


def load_picture(source: Picture) -> Image.Image:
    """A path, array or PIL image as an upright RGB picture. 8-bit modes are converted, others refused: clipping them would be nonsense."""
    picture = _open(source)
    if picture.mode not in CONVERTED_MODES:
        raise RunError(
            f"image: mode {picture.mode!r} cannot be taken; possible: 8-bit modes {list(CONVERTED_MODES[:7])} (convert it first)"
        )
    if min(picture.size) < 1:
        raise RunError(f"image: its size is {picture.size}; both sides must be at least 1 pixel")
    return picture.convert("RGB")


def _open(source: Picture) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3) or (source.ndim == 3 and source.shape[2] not in (3, 4)):
            raise RunError(
                f"image: an array {source.dtype}{list(source.shape)} cannot be taken; possible: uint8 [H, W], [H, W, 3] or [H, W, 4]"
            )
        if 0 in source.shape:
            raise RunError(f"image: an array {list(source.shape)} has no pixels; both sides must be at least 1")
        return Image.fromarray(source)
    if isinstance(source, (str, Path)):
        return _read(str(source))
    raise RunError(f"image: cannot take a {type(source).__name__}; possible: a PIL image, a path, a uint8 array [H, W, 3]")


def _read(path: str) -> Image.Image:
    if path.startswith(("http://", "https://")):
        raise RunError(f"image: {path} is a URL; download it first, nothing is fetched at run time")
    if not Path(path).is_file():
        raise RunError(f"image: no file {path}")
    try:
        picture = Image.open(path)
        picture.load()
        return ImageOps.exif_transpose(picture)
    except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise RunError(
            f"image: {path} cannot be read as a picture ({error}); possible: PNG, JPEG, WebP and what else Pillow reads"
        ) from None


# -- what the caller may pass -> [(text, pictures)]


def requests(
    processor: Any, images: Any, prompt: str | Sequence[str] | None, messages: Sequence[Any] | None
) -> list[tuple[str, list[Image.Image]]]:
    """One (text, pictures) per sample. Exactly one of `prompt` (text as the model sees it) and `messages` (chat template) must be given."""
    if (prompt is None) == (messages is None):
        raise RunError(f"generate: {'both' if prompt is not None else 'neither'} prompt and messages given; pass exactly one of them")
    if prompt is not None:
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(p, str) for p in prompts):
            raise RunError("generate: prompt must be a string or a non-empty list of strings")
        return list(zip(prompts, _per_sample(images, len(prompts), isinstance(prompt, str)), strict=True))
    single = bool(messages) and isinstance(messages[0], Mapping)
    conversations = [messages] if single else list(messages)
    if not conversations:
        raise RunError("generate: messages is empty")
    pictures = _per_sample(images, len(conversations), single)
    return [_chat(processor, c, p) for c, p in zip(conversations, pictures, strict=True)]


def _per_sample(images: Any, samples: int, single: bool) -> list[list[Image.Image]]:
    """-> per sample a list of pictures. One sample: a picture or a list. Several: a list with one entry (picture, list or None) each."""
    if images is None:
        return [[] for _ in range(samples)]
    if single:
        return [[load_picture(i) for i in images] if isinstance(images, (list, tuple)) else [load_picture(images)]]
    if not isinstance(images, (list, tuple)) or len(images) != samples:
        found = len(images) if isinstance(images, (list, tuple)) else "a single image"
        raise RunError(
            f"generate: {samples} prompts but {found} for images; pass one entry per prompt (an image, a list of images or None)"
        )
    return [
        [load_picture(i) for i in entry] if isinstance(entry, (list, tuple)) else [] if entry is None else [load_picture(entry)]
        for entry in images
    ]


def _chat(processor: Any, messages: Sequence[Mapping[str, Any]], pictures: list[Image.Image]) -> tuple[str, list[Image.Image]]:
    """A conversation -> (text, pictures). Given pictures fill the empty image items, or open the first user turn where there is none."""
    if not getattr(processor, "chat_template", None):
        raise RunError("generate: this model has no chat template; pass prompt= with the image placeholder in it instead of messages=")
    waiting = list(pictures)
    found: list[Image.Image] = []
    turns = []
    slots = sum(item.get("type") in IMAGE_ITEMS for m in messages if not isinstance(m["content"], str) for item in m["content"])
    for message in messages:
        content = [{"type": "text", "text": message["content"]}] if isinstance(message["content"], str) else list(message["content"])
        if slots == 0 and waiting and message["role"] == "user":
            content = [{"type": "image"}] * len(waiting) + content
            found, waiting = waiting, []
        elif slots:
            for item in content:
                if item.get("type") in IMAGE_ITEMS:
                    found.append(_picture_of(item, waiting))
        turns.append({"role": message["role"], "content": [{"type": "image"} if i.get("type") in IMAGE_ITEMS else i for i in content]})
    if waiting:
        raise RunError(
            f"generate: {len(waiting)} image(s) left over: the messages have {slots} image items and there are {len(pictures)} images"
        )
    return processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True), found


def _picture_of(item: Mapping[str, Any], waiting: list[Image.Image]) -> Image.Image:
    for key in ("image", "path", "url", "image_url"):
        if item.get(key) is not None:
            return load_picture(item[key])
    if not waiting:
        raise RunError("generate: an image item of the messages has no picture; put it in the item or pass images=")
    return waiting.pop(0)


# -- the processor


def process(processor: Any, text: str, pictures: Sequence[Image.Image]) -> Sample:
    """One sample through the artifact's processor; its complaints become one sentence."""
    if pictures and not _names_placeholder(processor, text):
        raise RunError(
            f"prompt: it has no image placeholder, but {len(pictures)} image(s) were given; write {placeholders(processor)[0]!r} where the image "
            "belongs, or pass messages=[...] and let the chat template do it"
        )
    try:
        out = processor(text=[text], return_tensors=_tensors(processor), **({"images": [list(pictures)]} if pictures else {}))
    except (ValueError, TypeError, IndexError, KeyError, RuntimeError) as error:
        sizes = [p.size for p in pictures]
        raise RunError(
            f"{type(processor).__name__}: it cannot take this prompt with {len(pictures)} image(s) of size {sizes}: {_first_line(error)}"
        ) from error
    arrays = {k: _numpy(v) for k, v in out.items()}
    tokens = arrays.pop("input_ids").astype(np.int64).reshape(-1)
    for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
        arrays.pop(name, None)
    return Sample(text, tokens, {k: v for k, v in arrays.items() if isinstance(v, np.ndarray)}, tuple(pictures))


def placeholders(processor: Any) -> list[str]:
    """The strings with which a prompt may name an image; empty when the processor does not say."""
    return [t for name in PLACEHOLDERS if isinstance(t := getattr(processor, name, None), str)]


def _names_placeholder(processor: Any, text: str) -> bool:
    known = placeholders(processor)
    return not known or inserts_itself(processor) or any(t in text for t in known)


def inserts_itself(processor: Any) -> bool:
    """PaliGemma's processor puts the image tokens in front of any prompt."""
    return type(processor).__name__ == "PaliGemmaProcessor"


def _tensors(processor: Any) -> str:
    """torchvision-backed image processors only return torch tensors."""
    backed = any("Torchvision" in c.__name__ for c in type(getattr(processor, "image_processor", None)).__mro__)
    return "pt" if backed else "np"


def _numpy(value: Any) -> Any:
    return value.numpy() if hasattr(value, "numpy") else np.asarray(value) if isinstance(value, list) else value


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
