"""Molmo 2: crops, attention pooling over patches, features added to the placeholders' embeddings; all visual tokens see each other.

Which patches a token pools follows from the picture's size, so the stage is captured for one size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._tiny import llama_config
from .base import ONE_PICTURE, Family, Tiny, VisionInputs, flat_rows, noise, pair, register


@register
class Molmo2(Family):
    model_types = ("molmo2",)
    one_picture = True

    def language_inputs(self, model: Any, input_ids: Tensor, features: dict[str, Tensor], valid: Tensor, visual: Tensor,
                        position_ids: Tensor, cache: Any) -> dict[str, Any]:
        embeds = model.get_input_embeddings()(input_ids)
        added = self.splice(model, torch.zeros_like(embeds), features["image_features"], visual)
        at = torch.arange(valid.shape[1], device=valid.device)
        seen = (at[:, None] >= at[None])[None] | (visual[:, :, None] & visual[:, None])
        return {"inputs_embeds": embeds + added, "attention_mask": (seen & valid[:, None])[:, None], "position_ids": position_ids}

    def vision_example(self, model: Any, images: int) -> dict[str, Tensor]:
        """One crop per picture, every token pools 2 x 2 patches."""
        vision = model.config.vision_config
        rows, columns = (side // vision.patch_size for side in pair(vision.image_size))
        pooling = torch.arange(rows * columns).reshape(rows // 2, 2, columns // 2, 2).permute(0, 2, 1, 3).reshape(-1, 4)
        return {"pixel_values": noise((images, rows * columns, 3 * vision.patch_size ** 2), model),
                "image_token_pooling": torch.cat([pooling + i * rows * columns for i in range(images)]),
                "image_grids": torch.tensor([[0, 0, rows // 2, columns // 2]] * images), "image_num_crops": torch.ones(images, dtype=torch.int64)}

    def picture(self, example: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        crops, grids = example["image_num_crops"], example["image_grids"]
        tokens = grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]
        first_crop, first_token = int(crops[:i].sum()), int(tokens[:i].sum())
        pixels = example["pixel_values"]
        pooling = example["image_token_pooling"][first_token: first_token + int(tokens[i])]
        pooling = torch.where(pooling >= 0, pooling - first_crop * pixels.shape[1], -1)
        return {"pixel_values": pixels[first_crop: first_crop + int(crops[i])], "image_token_pooling": pooling,
                "image_grids": grids[i: i + 1], "image_num_crops": crops[i: i + 1]}

    def vision_inputs(self, model: Any, example: dict[str, Tensor]) -> VisionInputs:
        pooling = example["image_token_pooling"]
        used = pooling[(pooling >= 0).any(-1)].to(example["pixel_values"].device)
        return VisionInputs({"pixel_values": example["pixel_values"]}, baked={"pooling": used, "full": bool((used >= 0).all())}, note=ONE_PICTURE)

    def vision(self, model: Any, inputs: dict[str, Tensor], baked: dict[str, Any]) -> tuple[Tensor, ...]:
        core = self.core(model)
        hidden = core.vision_tower(inputs["pixel_values"], output_hidden_states=True, return_dict=True).hidden_states
        chosen = [hidden[l + 1 if l >= 0 else l] for l in model.config.adapter_config.vision_feature_layer]
        adapter, pooling = core.multi_modal_projector, baked["pooling"]
        patches = torch.cat(chosen, -1).flatten(0, 1)[pooling.clamp(min=0)]  # [tokens, pooled, D]
        inside = pooling >= 0
        patches = patches * inside.to(patches.dtype)[..., None]
        query = patches.sum(1, keepdim=True) / inside.sum(1)[:, None, None].to(patches.dtype)
        pooled, _ = adapter.image_pooling_2d(query, patches, attention_mask=None if baked["full"] else inside)
        return (flat_rows(adapter.image_projector(pooled.squeeze(1))),)

    def hf_inputs(self, model: Any, input_ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (input_ids == self.image_token_id(model)).long()}

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
        config = T.Molmo2Config(
            vision_config=heads | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "image_size": [32, 32], "patch_size": 4,
                                   "num_position_embeddings": 64},
            adapter_config=heads | {"vision_feature_layer": [-1, -2], "hidden_size": 64, "intermediate_size": 64, "text_hidden_size": 64},
            text_config=llama_config(layers, additional_vocab_size=16), image_start_token_id=515, low_res_image_start_token_id=516,
            image_end_token_id=517, image_patch_id=518, frame_start_token_id=519, frame_end_token_id=520)
        return Tiny(T.Molmo2ForConditionalGeneration(config), image_tokens=16, before=(515,), after=(517,))
