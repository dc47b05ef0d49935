"""LLaVA-NeXT and LLaVA-OneVision: a picture is cut into tiles of its best grid, features are laid out as one picture with newlines.

Tiles and rows follow from the size of the picture, so the vision stage is captured for one size. (https://arxiv.org/abs/2408.03326)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiny import clip_config, llama_config
from .base import ONE_PICTURE, Family, Tiny, VisionInputs, noise, pair, register


@register
class LlavaNext(Family):
    model_types = ("llava_next",)
    one_picture = True

    def vision_example(self, model: Any, images: int) -> dict[str, Tensor]:
        """The first grid of the configuration, filled."""
        size = model.config.image_grid_pinpoints[0]
        side, _ = pair(model.config.vision_config.image_size)
        tiles = (size[0] // side) * (size[1] // side) + 1
        return {"pixel_values": noise((images, tiles, 3, side, side), model), "image_sizes": torch.tensor([size] * images)}

    def vision_inputs(self, model: Any, example: dict[str, Tensor]) -> VisionInputs:
        sizes = [tuple(int(x) for x in row) for row in example["image_sizes"].tolist()]
        return VisionInputs({"pixel_values": example["pixel_values"]}, baked={"image_sizes": sizes}, note=ONE_PICTURE)

    def vision_facts(self, model: Any) -> dict[str, Any]:
        return {"has_cls": "clip" in model.config.vision_config.model_type}

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        config = T.LlavaNextConfig(vision_config=T.CLIPVisionConfig(**clip_config(projection_dim=64, image_size=16)),
                                   text_config=T.LlamaConfig(**llama_config(layers)), image_token_index=500, vision_feature_layer=-2,
                                   image_grid_pinpoints=[[32, 32], [16, 32]])
        return Tiny(T.LlavaNextForConditionalGeneration(config), image_tokens=16 + 8 * 8 + 8)  # overview, grid, a newline per row


@register
class LlavaOnevision(LlavaNext):
    model_types = ("llava_onevision",)

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        config = T.LlavaOnevisionConfig(vision_config=T.SiglipVisionConfig(**clip_config(image_size=16)), text_config=T.Qwen2Config(**llama_config(layers)),
                                        image_token_index=500, video_token_index=501, vision_feature_layer=-1, vision_feature_select_strategy="full",
                                        image_grid_pinpoints=[[32, 32], [16, 32]])
        return Tiny(T.LlavaOnevisionForConditionalGeneration(config), image_tokens=16 + 8 * 8 + 8)
