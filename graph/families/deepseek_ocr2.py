"""DeepSeek-OCR 2: a SAM tower, a causal query encoder, a mixture-of-experts decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._tiny import llama_config
from .base import Family, Tiny, noise, register


@register
class DeepseekOcr2(Family):
    model_types = ("deepseek_ocr2",)
    one_picture = True

    def vision_example(self, model: Any, images: int) -> dict[str, Tensor]:
        side = model.config.vision_config.sam_config.image_size
        return {"pixel_values": noise((images, 3, side, side), model)}

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        sam = {"hidden_size": 32, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 256, "patch_size": 16,
               "window_size": 7, "global_attn_indexes": [1], "mlp_dim": 64, "downsample_channels": [32, 64]}
        encoder = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        text = llama_config(layers, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=32,
                            mlp_layer_types=["dense", *["sparse"] * (layers - 1)])
        config = T.DeepseekOcr2Config(vision_config={"sam_config": sam, "encoder_config": encoder}, text_config=text, image_token_id=500)
        return Tiny(T.DeepseekOcr2ForConditionalGeneration(config), image_tokens=145, one_image=True)
