"""LFM2-VL: SigLIP 2 on patches of any size; the language model mixes attention with short convolutions. (https://arxiv.org/abs/2511.23404)

The stage is captured for one patch grid: the resized position table is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiny import llama_config
from .base import ONE_PICTURE, Family, Tiny, VisionInputs, flat_rows, noise, register


@register
class Lfm2VL(Family):
    model_types = ("lfm2_vl",)
    one_picture = True

    def vision_example(self, model: Any, images: int) -> dict[str, Tensor]:
        vision = model.config.vision_config
        side = int(vision.num_patches ** 0.5)
        width = vision.num_channels * vision.patch_size ** 2
        return {"pixel_values": noise((images, side * side, width), model), "spatial_shapes": torch.tensor([[side, side]] * images),
                "pixel_attention_mask": torch.ones(images, side * side, dtype=torch.int64)}

    def vision_inputs(self, model: Any, example: dict[str, Tensor]) -> VisionInputs:
        """Padding patches stand at the end and are cut off."""
        rows, columns = (int(x) for x in example["spatial_shapes"][0])
        embeddings = self.core(model).vision_tower.embeddings
        side = embeddings.position_embedding_size
        table = embeddings.position_embedding.weight.detach().reshape(side, side, -1)
        table = embeddings.resize_positional_embeddings(table, torch.tensor([[rows, columns]]), max_length=rows * columns)
        return VisionInputs({"pixel_values": example["pixel_values"]}, baked={"positions": table, "grid": (rows, columns)},
                            note=f"{ONE_PICTURE}; {rows} x {columns} patches")

    def vision(self, model: Any, inputs: dict[str, Tensor], baked: dict[str, Any]) -> tuple[Tensor, ...]:
        core = self.core(model)
        tower, (rows, columns) = core.vision_tower, baked["grid"]
        hidden = tower.embeddings.patch_embedding(inputs["pixel_values"][:, : rows * columns]) + baked["positions"]
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        return (flat_rows(core.multi_modal_projector(tower.post_layernorm(hidden).reshape(1, rows, columns, -1))),)

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        text = llama_config(layers, layer_types=["conv" if i % 2 else "full_attention" for i in range(layers)], conv_L_cache=3)
        del text["head_dim"]
        vision = T.Siglip2VisionConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, patch_size=4, num_patches=64)
        config = T.Lfm2VlConfig(vision_config=vision, text_config=T.Lfm2Config(**text), image_token_id=500, downsample_factor=2, projector_hidden_size=64)
        return Tiny(T.Lfm2VlForConditionalGeneration(config), image_tokens=16)
