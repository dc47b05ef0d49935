"""Gemma 3: alternating windowed and full layers; tokens of one picture see each other in both directions. (https://arxiv.org/abs/2503.19786)"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._masks import image_block_masks
from ._tiny import clip_config, llama_config
from .base import Family, Tiny, register
from .llava import clip_grid


@register
class Gemma3(Family):
    model_types = ("gemma3",)

    def language_inputs(self, model: Any, input_ids: Tensor, features: dict[str, Tensor], valid: Tensor, visual: Tensor,
                        position_ids: Tensor, cache: Any) -> dict[str, Any]:
        kwargs = super().language_inputs(model, input_ids, features, valid, visual, position_ids, cache)
        return kwargs | {"attention_mask": image_block_masks(valid, visual, self.text_config(model).sliding_window)}

    def tokens_per_image(self, model: Any) -> int | None:
        return int(model.config.mm_tokens_per_image)

    def vision_facts(self, model: Any) -> dict[str, Any]:
        return {"vision_grid": clip_grid(model)}

    def hf_inputs(self, model: Any, input_ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (input_ids == self.image_token_id(model)).long()}

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        text = llama_config(layers, layer_types=alternating(layers), sliding_window=12, query_pre_attn_scalar=16)
        config = T.Gemma3Config(vision_config=T.SiglipVisionConfig(**clip_config(image_size=32)), text_config=T.Gemma3TextConfig(**text),
                                image_token_index=500, boi_token_index=501, eoi_token_index=502, mm_tokens_per_image=16)
        return Tiny(T.Gemma3ForConditionalGeneration(config), image_tokens=16, before=(501,), after=(502,))


def alternating(layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
