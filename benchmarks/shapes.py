"""The two model shapes that speed is judged on: the testbed's, and a LLaVA-like one of 12 layers. Random weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shape:
    """layers x (width, heads on groups, inner width), a tower of `vision_layers` x `vision_width` over `side`^2 patches of `patch`
    pixels."""

    name: str
    layers: int
    width: int
    heads: int
    groups: int
    inner: int
    vocabulary: int
    vision_layers: int
    vision_width: int
    side: int
    patch: int
    text: int  # text tokens in the prompt

    @property
    def visual(self) -> int:
        return self.side**2

    def model(self, layers: int | None = None) -> Any:
        """A LLaVA of this shape, float32, attention by sdpa."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

        torch.manual_seed(0)
        text = LlamaConfig(
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.groups,
            head_dim=self.width // self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        vision = CLIPVisionConfig(
            hidden_size=self.vision_width,
            intermediate_size=4 * self.vision_width,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=max(4, self.vision_width // 64),
            image_size=self.side * self.patch,
            patch_size=self.patch,
        )
        config = LlavaConfig(
            vision_config=vision,
            text_config=text,
            image_token_index=self.vocabulary - 1,
            image_seq_length=self.visual,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
        )
        config._attn_implementation = "sdpa"
        model = LlavaForConditionalGeneration(config).eval()
        model.generation_config.eos_token_id = None
        return model

    def prompt(self, batch: int = 1) -> dict[str, torch.Tensor]:
        """input_ids and pixel_values: a BOS, the image, the text."""
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, self.vocabulary - 1, (batch, self.text + self.visual), generator=generator)
        ids[:, 0], ids[:, 1 : 1 + self.visual] = 1, self.vocabulary - 1
        pixels = torch.randn(batch, 3, self.side * self.patch, self.side * self.patch, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


SHAPES = {
    "testbed": Shape(
        "testbed",
        layers=8,
        width=128,
        heads=4,
        groups=4,
        inner=384,
        vocabulary=72,
        vision_layers=4,
        vision_width=128,
        side=12,
        patch=8,
        text=20,
    ),
    "llava-like": Shape(
        "llava-like",
        layers=12,
        width=512,
        heads=8,
        groups=8,
        inner=1376,
        vocabulary=2048,
        vision_layers=6,
        vision_width=256,
        side=24,
        patch=14,
        text=32,
    ),
    "llava-like-gqa": Shape(
        "llava-like-gqa",
        layers=12,
        width=512,
        heads=8,
        groups=4,
        inner=1376,
        vocabulary=2048,
        vision_layers=6,
        vision_width=256,
        side=24,
        patch=14,
        text=32,
    ),
}
