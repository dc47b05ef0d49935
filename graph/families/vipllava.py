"""ViP-LLaVA: LLaVA with several hidden layers of the tower side by side. (https://arxiv.org/abs/2312.00784)"""

from __future__ import annotations

from typing import Any

from ._tiny import clip_config, llama_config
from .base import Family, Tiny, register
from .llava import clip_grid


@register
class VipLlava(Family):
    model_types = ("vipllava",)

    def tokens_per_image(self, model: Any) -> int | None:
        rows, columns = clip_grid(model)
        return rows * columns

    def vision_facts(self, model: Any) -> dict[str, Any]:
        return {"vision_grid": clip_grid(model), "has_cls": True}

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        config = T.VipLlavaConfig(vision_config=T.CLIPVisionConfig(**clip_config(projection_dim=64)), text_config=T.LlamaConfig(**llama_config(layers)),
                                  image_token_index=500, vision_feature_layers=[-1, -2, -3], image_seq_length=64)
        return Tiny(T.VipLlavaForConditionalGeneration(config), image_tokens=64)
