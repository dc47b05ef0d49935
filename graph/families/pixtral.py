"""Pixtral and Mistral 3: pictures of any size in one packed sequence with 2D RoPE. (https://arxiv.org/abs/2410.07073)

Patch positions follow from the picture's size, so the vision stage is captured for one size. Pixtral's model type is `llava`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiny import llama_config
from .base import ONE_PICTURE, Family, Tiny, VisionInputs, noise, pair, register


class _PixtralTower(Family):
    one_picture = True

    def vision_example(self, model: Any, images: int) -> dict[str, Tensor]:
        height, width = pair(model.config.vision_config.image_size)
        return {"pixel_values": noise((images, 3, height, width), model), "image_sizes": torch.tensor([[height, width]] * images)}

    def vision_inputs(self, model: Any, example: dict[str, Tensor]) -> VisionInputs:
        sizes = [tuple(int(x) for x in row) for row in example["image_sizes"].tolist()]
        return VisionInputs({"pixel_values": example["pixel_values"]}, baked={"image_sizes": sizes}, note=ONE_PICTURE)


def _tower(side: int) -> Any:
    import transformers as T
    return T.PixtralVisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, image_size=side, patch_size=4)


@register
class Pixtral(_PixtralTower):
    """Reached from model type `llava` through `Llava.variant`; its own key is for tables and tests."""

    model_types = ("pixtral",)

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        config = T.LlavaConfig(vision_config=_tower(32), text_config=T.MistralConfig(**llama_config(layers, sliding_window=None)), image_token_index=500,
                               vision_feature_layer=-1, vision_feature_select_strategy="full")
        return Tiny(T.LlavaForConditionalGeneration(config), image_tokens=64)


@register
class Mistral3(_PixtralTower):
    model_types = ("mistral3",)

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        config = T.Mistral3Config(vision_config=_tower(32), text_config=T.MistralConfig(**llama_config(layers, sliding_window=None)), image_token_index=500,
                                  spatial_merge_size=2)
        return Tiny(T.Mistral3ForConditionalGeneration(config), image_tokens=16)
