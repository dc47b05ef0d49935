"""Idefics3 and SmolVLM: SigLIP tiles, pixel shuffle, a projector. (https://arxiv.org/abs/2408.12637, https://arxiv.org/abs/2504.05299)

The stage takes tiles [tiles, 3, H, W]: the processor's [batch, tiles, 3, H, W] without its padding tiles (they are all zero).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiny import llama_config
from .base import Family, Tiny, VisionInputs, flat_rows, noise, pair, register


@register
class Idefics3(Family):
    model_types = ("idefics3",)
    names = "Idefics3"

    def vision_example(self, model: Any, images: int) -> dict[str, Tensor]:
        return {"pixel_values": noise((1, images, 3, *pair(model.config.vision_config.image_size)), model)}

    def vision_inputs(self, model: Any, example: dict[str, Tensor]) -> VisionInputs:
        tiles = example["pixel_values"].flatten(0, 1)
        if tiles.device.type != "meta":
            tiles = tiles[(tiles != 0).flatten(1).any(1)]
        vision = model.config.vision_config
        rows, columns = tiles.shape[2] // vision.patch_size, tiles.shape[3] // vision.patch_size
        positions = tile_positions(rows, columns, pair(vision.image_size)[0] // vision.patch_size).to(tiles.device)
        return VisionInputs({"pixel_values": tiles}, dynamic=("pixel_values",), baked={"positions": positions},
                            note="vision: pixel_values are tiles, flattened over the batch, without padding tiles; every tile is filled")

    def vision(self, model: Any, inputs: dict[str, Tensor], baked: dict[str, Any]) -> tuple[Tensor, ...]:
        """Embedding, encoder and connector: `get_image_features` would first look for padding tiles and padded patches."""
        core = self.core(model)
        tower = core.vision_model
        patches = tower.embeddings.patch_embedding(inputs["pixel_values"]).flatten(2).transpose(1, 2)
        hidden = patches + tower.embeddings.position_embedding(baked["positions"])
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        return (flat_rows(core.connector(tower.post_layernorm(hidden))),)

    def vision_facts(self, model: Any) -> dict[str, Any]:
        vision = model.config.vision_config
        height, width = pair(vision.image_size)
        return {"vision_grid": (height // vision.patch_size, width // vision.patch_size)}

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        config = getattr(T, self.names + "Config")(
            vision_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 4},
            text_config=T.LlamaConfig(**llama_config(layers)), image_token_id=500, scale_factor=2)
        return Tiny(getattr(T, self.names + "ForConditionalGeneration")(config), image_tokens=16)


@register
class SmolVLM(Idefics3):
    model_types = ("smolvlm",)
    names = "SmolVLM"


def tile_positions(rows: int, columns: int, side: int) -> Tensor:
    """Index of every patch in the tower's side x side table, [1, rows columns]: a tile of another size is spread over the whole table."""
    bounds = torch.arange(1 / side, 1.0, 1 / side)

    def spread(count: int) -> Tensor:
        place = (torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))).clamp(max=1.0 - 1e-6)
        return torch.bucketize(place, bounds, right=True)

    return (spread(rows)[:, None] * side + spread(columns)[None]).reshape(1, -1)
