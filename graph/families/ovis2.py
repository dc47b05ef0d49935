"""Ovis2: the tower gives a distribution over a visual vocabulary whose embeddings are mixed. (https://arxiv.org/abs/2405.20797)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiny import llama_config
from .base import Family, Tiny, register
from .llava import clip_grid


@register
class Ovis2(Family):
    model_types = ("ovis2",)

    def language_inputs(self, model: Any, input_ids: Tensor, features: dict[str, Tensor], valid: Tensor, visual: Tensor,
                        position_ids: Tensor, cache: Any) -> dict[str, Any]:
        """The tokens around pictures are the last rows of the visual embedding table."""
        kwargs = super().language_inputs(model, input_ids, features, valid, visual, position_ids, cache)
        core, embeds = self.core(model), kwargs["inputs_embeds"]
        marks = core.visual_embeddings_table.weight[-core.vision_tower.num_visual_indicator_tokens:]
        for token, row in zip(core.visual_indicator_token_ids, marks, strict=True):
            embeds = torch.where((input_ids == token)[..., None], row.to(embeds.dtype), embeds)
        return kwargs | {"inputs_embeds": embeds}

    def tokens_per_image(self, model: Any) -> int | None:
        rows, columns = clip_grid(model)
        return rows * columns // model.config.vision_config.hidden_stride ** 2

    def vision_facts(self, model: Any) -> dict[str, Any]:
        return {"vision_grid": clip_grid(model)}

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 4,
                  "vocab_size": 128, "hidden_stride": 2}
        config = T.Ovis2Config(vision_config=vision, text_config=T.Qwen2Config(**llama_config(layers)), image_token_id=500,
                               visual_indicator_token_ids=[501, 502, 503, 504, 505], vocab_size=512, hidden_size=64)
        return Tiny(T.Ovis2ForConditionalGeneration(config), image_tokens=16, before=(501,), after=(502,))
