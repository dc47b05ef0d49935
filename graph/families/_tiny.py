"""Parts of the tiny random models: sizes that keep a capture in seconds and make masks and positions matter."""

from __future__ import annotations

from typing import Any

import torch

from .base import Family, Tiny

VOCABULARY, WIDTH = 512, 64


def llama_config(layers: int, **changes: Any) -> dict[str, Any]:
    """A text configuration with grouped queries (4 heads on 2)."""
    base = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": VOCABULARY, "head_dim": 16, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return base | changes


def clip_config(**changes: Any) -> dict[str, Any]:
    """A CLIP or SigLIP tower: 8 x 8 patches."""
    return {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32, "patch_size": 4} | changes


def build(family: Family, layers: int = 3, seed: int = 0) -> Tiny:
    """The family's tiny model with weights of unit gain, so that a wrong mask or position moves the logits visibly (by 1e-2 .. 1)."""
    torch.manual_seed(seed)
    tiny = family.tiny(layers)
    model = tiny.model.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                deviation = 1.0 if "embed" in name else parameter[0].numel() ** -0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * deviation)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return tiny
