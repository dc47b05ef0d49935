"""LLaVA: a CLIP-like tower, one hidden layer of it selected, a projector. (https://arxiv.org/abs/2304.08485)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiny import clip_config, llama_config
from .base import REGISTRY, Family, Tiny, pair, register


@register
class Llava(Family):
    model_types = ("llava",)

    def variant(self, model: Any) -> Family:
        return REGISTRY["pixtral"] if model.config.vision_config.model_type == "pixtral" else self

    def vision(self, model: Any, inputs: dict[str, Tensor], baked: dict[str, Any]) -> tuple[Tensor, ...]:
        """Tower, select, project: `get_image_features` would turn the image dimension into a Python list and fix its size."""
        config, core = model.config, self.core(model)
        hidden = core.vision_tower(inputs["pixel_values"], output_hidden_states=True, return_dict=True).hidden_states
        layers = config.vision_feature_layer
        chosen = [hidden[i] for i in ([layers] if isinstance(layers, int) else layers)]
        if config.vision_feature_select_strategy == "default":
            chosen = [h[:, 1:] for h in chosen]
        out = core.multi_modal_projector(torch.cat(chosen, -1) if len(chosen) > 1 else chosen[0])
        return (out.reshape(-1, out.shape[-1]),)

    def tokens_per_image(self, model: Any) -> int | None:
        rows, columns = clip_grid(model)
        return rows * columns + (model.config.vision_feature_select_strategy == "full" and has_cls(model))

    def vision_facts(self, model: Any) -> dict[str, Any]:
        return {"vision_grid": clip_grid(model), "has_cls": has_cls(model)}

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        config = T.LlavaConfig(vision_config=T.CLIPVisionConfig(**clip_config(projection_dim=64)), text_config=T.LlamaConfig(**llama_config(layers)),
                               image_token_index=500, vision_feature_layer=-2, image_seq_length=64)
        return Tiny(T.LlavaForConditionalGeneration(config), image_tokens=64)


def clip_grid(model: Any) -> tuple[int, int]:
    """Patches (rows, columns) of a tower with square inputs."""
    vision = model.config.vision_config
    (height, width), (ph, pw) = pair(vision.image_size), pair(vision.patch_size)
    return height // ph, width // pw


def has_cls(model: Any) -> bool:
    return "clip" in model.config.vision_config.model_type
