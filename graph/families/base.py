"""The protocol of a family: how one kind of Hugging Face VLM takes ids and image features, and what the runtime must know about it.

Most families are data: `model_types`, `geometry`, and a tiny random model. A method is overridden only where the modelling code differs
from the common form "embed, put the features where image tokens are, run the language model on embeddings and a padding mask".
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import GraphError

ONE_PICTURE = "vision: one picture per call, in the size it was captured with (its geometry is a constant of the graph)"
REGISTRY: dict[str, Family] = {}  # model_type -> adapter


@dataclass(frozen=True)
class Tiny:
    """A tiny random model of a family and what its prompts look like: every adapter brings one, so that tests find it by discovery."""

    model: Any
    image_tokens: int  # placeholders per image
    before: tuple[int, ...] = ()  # ids right before an image's placeholders
    after: tuple[int, ...] = ()
    low: int = 10  # text ids are drawn from [low, high)
    high: int = 400
    prefix_only: bool = False  # the image stands at the very front of the prompt
    one_image: bool = False  # a prompt holds at most one image

    def placeholders(self, token: int) -> list[int]:
        return [token] * self.image_tokens


@dataclass(frozen=True)
class VisionInputs:
    """tensors: inputs of the vision stage; dynamic: those whose first dimension counts images (or patches); baked: kept as constants."""

    tensors: dict[str, Tensor]
    dynamic: tuple[str, ...] = ()
    baked: dict[str, Any] = field(default_factory=dict)
    note: str = ""


class Family:
    """One adapter. `register` makes it known; model_types are values of `config.model_type`."""

    model_types: ClassVar[tuple[str, ...]] = ()
    features: ClassVar[tuple[str, ...]] = ("image_features",)
    bidirectional_prompt: ClassVar[bool] = False  # every prompt token sees every other one (prefix-LM)
    one_picture: ClassVar[bool] = False  # the vision stage takes one picture per call, in the geometry it was captured with

    def variant(self, model: Any) -> Family:
        """The adapter for this configuration, where one model type covers several architectures."""
        return self

    # ---- parts of the model

    def core(self, model: Any) -> Any:
        """The module that has `get_image_features`."""
        return getattr(model, "model", model)

    def language_model(self, model: Any) -> Any:
        """The decoder stack: embeddings in, last hidden states out."""
        return model.get_decoder()

    def text_config(self, model: Any) -> Any:
        return model.config.get_text_config()

    def image_token_id(self, model: Any) -> int:
        config = model.config
        found = getattr(config, "image_token_id", None)
        return int(found if found is not None else config.image_token_index)

    def embedding_dtype(self, model: Any) -> torch.dtype:
        return model.get_input_embeddings().weight.dtype

    # ---- prefill and decode

    def embed(self, model: Any, input_ids: Tensor, visual: Tensor | None) -> Tensor:
        """input_ids[B, S], visual[B, S] bool -> [B, S, D]. What stands at visual places is overwritten: ids outside the vocabulary become 0."""
        table = model.get_input_embeddings()
        if visual is not None and self.image_token_id(model) >= self.text_config(model).vocab_size:
            input_ids = input_ids.masked_fill(visual, 0)
        return table(input_ids)

    def splice(self, model: Any, embeds: Tensor, features: Tensor, visual: Tensor) -> Tensor:
        return torch.ops.foveate.splice_image_features(embeds, features, visual)

    def language_inputs(self, model: Any, input_ids: Tensor, features: dict[str, Tensor], valid: Tensor, visual: Tensor,
                        position_ids: Tensor, cache: Any) -> dict[str, Any]:
        """What prefill calls the language model with, but for the cache."""
        embeds = self.embed(model, input_ids, visual)
        embeds = self.splice(model, embeds, features["image_features"], visual)
        return {"inputs_embeds": embeds, "attention_mask": valid, "position_ids": position_ids}

    def decode_inputs(self, model: Any, input_ids: Tensor, position_ids: Tensor) -> dict[str, Any]:
        """The same for one new token per sample; masks come from the cache."""
        return {"inputs_embeds": self.embed(model, input_ids, None), "attention_mask": None, "position_ids": position_ids}

    def head(self, model: Any, hidden: Tensor) -> Tensor:
        """hidden[B, D] -> logits[B, V]"""
        logits = model.get_output_embeddings()(hidden)
        cap = getattr(self.text_config(model), "final_logit_softcapping", None)
        return torch.tanh(logits / cap) * cap if cap else logits

    # ---- vision

    def vision_example(self, model: Any, images: int) -> dict[str, Tensor]:
        """What the processor makes of `images` pictures in the size that the configuration names."""
        vision = model.config.vision_config
        height, width = pair(vision.image_size)
        return {"pixel_values": noise((images, getattr(vision, "num_channels", 3), height, width), model)}

    def picture(self, example: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        """The part of an example that belongs to its i-th picture."""
        return {name: tensor[i: i + 1] for name, tensor in example.items()}

    def vision_inputs(self, model: Any, example: dict[str, Tensor]) -> VisionInputs:
        """Split what the processor makes into inputs of the stage and constants."""
        return VisionInputs({"pixel_values": example["pixel_values"]}, dynamic=() if self.one_picture else ("pixel_values",),
                            note=ONE_PICTURE if self.one_picture else "")

    def vision(self, model: Any, inputs: dict[str, Tensor], baked: dict[str, Any]) -> tuple[Tensor, ...]:
        """-> one [rows of all images, D] per name in `features`"""
        return (flat_rows(self.core(model).get_image_features(**inputs, **baked, return_dict=True).pooler_output),)

    # ---- facts

    def positions(self, model: Any) -> dict[str, Any]:
        return {"kind": "linear"}

    def tokens_per_image(self, model: Any) -> int | None:
        return None

    def vision_facts(self, model: Any) -> dict[str, Any]:
        """vision_grid and has_cls, where they are fixed."""
        return {}

    def features_of(self, model: Any) -> tuple[str, ...]:
        return self.features

    def experts(self, model: Any) -> bool:
        return any(hasattr(c, n) for c in (self.text_config(model),) for n in ("num_experts", "n_routed_experts", "num_local_experts"))

    def patches(self, model: Any) -> Sequence[tuple[Any, str, Any]]:
        """Attributes of modelling code to replace while tracing: (owner, name, value)."""
        return ()

    def check(self, model: Any) -> None:
        """Raise GraphError for a configuration that would be captured wrongly."""

    # ---- tests

    def tiny(self, layers: int) -> Tiny:
        """A tiny random model."""
        raise GraphError(f"family {type(self).__name__}: no tiny model")

    def hf_vision(self, model: Any, example: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """What HF's own code gives for the same example: the reference of the vision stage."""
        core = self.core(model)
        taken = inspect.signature(core.get_image_features).parameters
        return (flat_rows(core.get_image_features(**{n: t for n, t in example.items() if n in taken}, return_dict=True).pooler_output),)

    def hf_inputs(self, model: Any, input_ids: Tensor) -> dict[str, Tensor]:
        """What HF's forward wants besides ids, mask and pixels."""
        return {}

    def hf_positions(self, model: Any, input_ids: Tensor, mask: Tensor, example: dict[str, Tensor]) -> Tensor:
        """Positions of a padded prompt as HF's own code counts them: [B, S] or [3, B, S]."""
        return (mask.cumsum(1) - 1).clamp(min=0)


def register(adapter: type[Family]) -> type[Family]:
    """Class decorator: make an adapter known under each of its model types."""
    if not adapter.model_types:
        raise GraphError(f"family {adapter.__name__}: model_types is empty")
    for name in adapter.model_types:
        known = REGISTRY.get(name)
        if known is not None and type(known).__qualname__ != adapter.__qualname__:
            raise GraphError(f"family {adapter.__name__}: model type {name!r} belongs to {type(known).__name__} already")
        REGISTRY[name] = adapter()
    return adapter


def flat_rows(features: Any) -> Tensor:
    """Features as HF returns them, one tensor or one per image -> [rows of all images, D]"""
    if isinstance(features, (list, tuple)):
        features = torch.cat([x.reshape(-1, x.shape[-1]) for x in features], 0)
    return features.reshape(-1, features.shape[-1])


def pair(size: Any) -> tuple[int, int]:
    """An image or patch size of a configuration as (height, width)."""
    return (int(size[0]), int(size[1])) if isinstance(size, (list, tuple)) else (int(size), int(size))


def noise(shape: tuple[int, ...], model: Any) -> Tensor:
    """Reproducible pixels on the model's device and in its type."""
    parameter = next(model.parameters())
    if parameter.device.type == "meta":
        return torch.empty(shape, dtype=parameter.dtype, device="meta")
    return torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(parameter.device, parameter.dtype)
