"""Gemma 4: per-layer token inputs, alternating layers, pooled patches of any size.

The stage is captured for one picture size: patch positions and the pooling matrix are constants.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import GraphError
from ._masks import image_block_masks
from ._tiny import llama_config
from .base import ONE_PICTURE, Family, Tiny, VisionInputs, flat_rows, noise, register
from .gemma3 import alternating


@register
class Gemma4(Family):
    model_types = ("gemma4",)
    one_picture = True

    def check(self, model: Any) -> None:
        shared = getattr(self.text_config(model), "num_kv_shared_layers", 0)
        if shared:
            raise GraphError(
                f"capture: {shared} layers of this gemma4 read the cache of earlier layers; only models whose layers all have their own are supported"
            )

    def language_inputs(
        self, model: Any, input_ids: Tensor, features: dict[str, Tensor], valid: Tensor, visual: Tensor, position_ids: Tensor, cache: Any
    ) -> dict[str, Any]:
        """Visual tokens take the padding token's per-layer inputs."""
        config = self.text_config(model)
        ids = input_ids.masked_fill(visual, config.pad_token_id)
        embeds = self.splice(model, model.get_input_embeddings()(ids), features["image_features"], visual)
        mask: Any = valid
        if config.use_bidirectional_attention == "vision":
            mask = image_block_masks(valid, visual, config.sliding_window)
        return {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": position_ids} | self._per_layer(model, ids)

    def decode_inputs(self, model: Any, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
        return super().decode_inputs(model, input_ids, position_ids) | self._per_layer(model, input_ids)

    def _per_layer(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        if not self.text_config(model).hidden_size_per_layer_input:
            return {}
        return {"per_layer_inputs": self.language_model(model).get_per_layer_inputs(ids, None)}

    def vision_example(self, model: Any, images: int) -> dict[str, Tensor]:
        vision = model.config.vision_config
        k = vision.pooling_kernel_size
        rows, columns = 4 * k, 6 * k
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        positions = torch.stack([x, y], -1).reshape(1, -1, 2).repeat(images, 1, 1)
        return {"pixel_values": noise((images, rows * columns, 3 * vision.patch_size**2), model), "image_position_ids": positions}

    def vision_inputs(self, model: Any, example: dict[str, Tensor]) -> VisionInputs:
        """Padding patches stand at the end and are cut off."""
        k = model.config.vision_config.pooling_kernel_size
        positions = example["image_position_ids"].cpu()
        used = int((positions[0] >= 0).all(-1).sum())
        x, y = positions[0, :used].unbind(-1)
        group = x // k + (int(x.max()) + 1) // k * (y // k)
        pooling = torch.nn.functional.one_hot(group, used // k**2).T.float() / k**2  # [tokens, patches]
        pixels = example["pixel_values"]
        baked = {"positions": positions[:, :used].to(pixels.device), "pooling": pooling.to(pixels.device), "used": used}
        return VisionInputs({"pixel_values": pixels}, baked=baked, note=f"{ONE_PICTURE}; {used} patches")

    def vision(self, model: Any, inputs: dict[str, Tensor], baked: dict[str, Any]) -> tuple[Tensor, ...]:
        core = self.core(model)
        tower, positions = core.vision_tower, baked["positions"]
        pixels = inputs["pixel_values"][:, : baked["used"]]
        hidden = tower.patch_embedder(pixels, positions, torch.zeros_like(positions[..., 0], dtype=torch.bool))
        dtype = hidden.dtype
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None, pixel_position_ids=positions).last_hidden_state
        pooled = (baked["pooling"] @ hidden.float()).to(dtype).float() * tower.pooler.root_hidden_size
        if tower.config.standardize:
            pooled = (pooled - tower.std_bias.float()) * tower.std_scale.float()
        return (flat_rows(core.embed_vision(inputs_embeds=pooled.to(dtype))),)

    def hf_inputs(self, model: Any, input_ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (input_ids == self.image_token_id(model)).long()}

    def tiny(self, layers: int) -> Tiny:
        import transformers as T

        vision = {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "patch_size": 4,
            "pooling_kernel_size": 2,
            "position_embedding_size": 64,
        }
        text = llama_config(layers, layer_types=alternating(layers), sliding_window=12, vocab_size_per_layer_input=512, hidden_size_per_layer_input=16)
        config = T.Gemma4Config(
            vision_config=vision,
            text_config=text,
            audio_config=None,
            image_token_id=500,
            boi_token_id=501,
            eoi_token_id=502,
            video_token_id=503,
            audio_token_id=504,
            boa_token_id=505,
            eoa_token_index=506,
        )
        return Tiny(T.Gemma4ForConditionalGeneration(config), image_tokens=24, before=(501,), after=(502,))
