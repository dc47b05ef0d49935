"""A processor and an engine small enough to follow by hand: a session is tested without torch, weights or files."""

from __future__ import annotations

from typing import Any

import numpy as np

IMAGE, PAD, EOS, PER_IMAGE = 4, 0, 2, 6
VOCAB = {"<pad>": PAD, "<s>": 1, "</s>": EOS, "<unk>": 3, "<image>": IMAGE, "what": 5, "is": 6, "this": 7, "and": 8, "?": 9}
WORDS = {i: w for w, i in VOCAB.items()}
WIDTH = 4


class Tokenizer:
    padding_side = "left"

    def decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        return " ".join(WORDS.get(int(t), f"w{int(t)}") for t in tokens if not (skip_special_tokens and int(t) < 5))


class Processor:
    """`<image>` becomes PER_IMAGE placeholders; a picture becomes the mean of its red channel, repeated."""

    image_token = "<image>"
    chat_template = "yes"

    def __init__(self) -> None:
        self.tokenizer = Tokenizer()
        self.image_processor = object()

    def __call__(self, text: list[str], images: list[list[Any]] | None = None, return_tensors: str = "np") -> dict[str, np.ndarray]:
        words, pictures = text[0].split(), images[0] if images else []
        if words.count("<image>") != len(pictures):
            raise ValueError(f"{words.count('<image>')} placeholders, {len(pictures)} pictures")
        ids = [1]
        for word in words:
            ids += [IMAGE] * PER_IMAGE if word == "<image>" else [VOCAB.get(word, 3)]
        out = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), int)}
        if pictures:
            reds = [np.asarray(p)[..., 0].mean() for p in pictures]
            out["pixel_values"] = np.stack([np.full((PER_IMAGE, 3), r, np.float32) for r in reds])
        return out

    def apply_chat_template(self, turns: list[dict[str, Any]], tokenize: bool, add_generation_prompt: bool) -> str:
        return " ".join("<image>" if c["type"] == "image" else c["text"] for t in turns for c in t["content"])


class Cache:
    def __init__(self, lengths: np.ndarray, capacity: int):
        self.lengths, self.capacity, self.nbytes = lengths, capacity, 8 * capacity


class Engine:
    """Prefill answers with the sum of the sample's features, mod 5, + 5; decode counts on from the last token; token 10 is followed by the end."""

    def __init__(self, keep: int | None = None, kept: bool = False):
        self.keep, self.kept, self.calls, self.closed = keep, kept, [], False

    def vision(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls.append(("vision", {k: v.shape for k, v in feeds.items()}))
        pixels = feeds["pixel_values"]
        rows = pixels[:, : self.keep] if self.keep else pixels
        out = {"image_features": np.repeat(rows.reshape(-1, 3)[:, :1], WIDTH, 1)}
        if self.keep:
            out["kept.vision"] = np.tile(np.arange(PER_IMAGE)[-self.keep :], (len(pixels), 1))
        return out

    def prefill(self, feeds: dict[str, np.ndarray], capacity: int) -> tuple[dict[str, np.ndarray], Cache]:
        self.calls.append(("prefill", feeds))
        B = len(feeds["input_ids"])
        rows = feeds["attention_mask"].sum(1)
        features = (feeds["image_features"][..., 0] / 10).sum(1).round().astype(int)
        logits = np.eye(16, dtype=np.float32)[features % 5 + 5]
        out = {"logits": logits, "kv_lengths": np.tile(rows, (2, 1))}
        if self.kept:
            out["kept.layer2"] = np.array([[0, 7, 11, -1]] * B)
        return out, Cache(np.tile(rows, (2, 1)), capacity)

    def decode(self, cache: Cache, input_ids: np.ndarray, position_ids: np.ndarray) -> np.ndarray:
        self.calls.append(("decode", input_ids[:, 0].tolist(), position_ids[..., 0].tolist()))
        cache.lengths += 1
        assert cache.lengths.max() <= cache.capacity
        following = np.where(input_ids[:, 0] >= 10, EOS, input_ids[:, 0] + 1)
        return np.eye(16, dtype=np.float32)[following]

    def close(self) -> None:
        self.closed = True


def manifest(**facts: Any) -> dict[str, Any]:
    """A manifest as the session reads it."""
    known = {"image_token_id": IMAGE, "eos_token_ids": [EOS], "positions": {"kind": "linear"}, "features": ["image_features"], "min_visual": 1,
             "tokens_per_image": PER_IMAGE, "features_per_image": None, "vision_grid": [2, 3]}
    shape = {"name": "pixel_values", "dtype": "float32", "shape": ["images", PER_IMAGE, 3]}
    return {"target": "fake", "facts": {**known, **facts},
            "components": {"vision": {"inputs": [shape]},
                           "prefill": {"inputs": [{"name": "image_features", "dtype": "float32", "shape": ["B", "N", WIDTH]}]}}}
