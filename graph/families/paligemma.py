"""PaliGemma: SigLIP in front of Gemma, the whole prompt is a prefix in which every token sees every other. (https://arxiv.org/abs/2407.07726)"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiny import clip_config, llama_config
from .base import Family, Tiny, register
from .llava import clip_grid


@register
class PaliGemma(Family):
    model_types = ("paligemma",)
    bidirectional_prompt = True

    def positions(self, model: Any) -> dict[str, Any]:
        return {"kind": "linear", "start": 1}

    def tokens_per_image(self, model: Any) -> int | None:
        rows, columns = clip_grid(model)
        return rows * columns

    def vision_facts(self, model: Any) -> dict[str, Any]:
        return {"vision_grid": clip_grid(model)}

    def hf_inputs(self, model: Any, input_ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": torch.zeros_like(input_ids)}  # all of a prompt is prefix

    def hf_positions(self, model: Any, input_ids: Tensor, mask: Tensor, example: dict[str, Tensor]) -> Tensor:
        return super().hf_positions(model, input_ids, mask, example) + 1

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        config = T.PaliGemmaConfig(vision_config=T.SiglipVisionConfig(**clip_config(projection_dim=64, image_size=16)),
                                   text_config=T.GemmaConfig(**llama_config(layers)), image_token_index=500, projection_dim=64, hidden_size=64, vocab_size=512)
        return Tiny(T.PaliGemmaForConditionalGeneration(config), image_tokens=16)
