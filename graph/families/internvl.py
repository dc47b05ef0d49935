"""InternVL: a ViT, pixel shuffle, a projector. (https://arxiv.org/abs/2412.05271)"""

from __future__ import annotations

from typing import Any

from ._tiny import llama_config
from .base import Family, Tiny, register
from .llava import clip_grid


@register
class InternVL(Family):
    model_types = ("internvl",)

    def tokens_per_image(self, model: Any) -> int | None:
        return int(model.config.image_seq_length)

    def vision_facts(self, model: Any) -> dict[str, Any]:
        return {"vision_grid": clip_grid(model), "has_cls": True}

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        config = T.InternVLConfig(vision_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
                                                 "image_size": [32, 32], "patch_size": [4, 4]},
                                  text_config=T.Qwen2Config(**llama_config(layers)), image_token_id=500, image_seq_length=16)
        return Tiny(T.InternVLForConditionalGeneration(config), image_tokens=16)
