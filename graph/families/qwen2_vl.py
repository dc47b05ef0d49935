"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL (and its mixture of experts), GLM-4V: packed patches, three-axis RoPE, DeepStack in Qwen3-VL.

The stage is captured for one grid (frames, rows, columns): segment bounds, window order and patch positions are constants.
(https://arxiv.org/abs/2409.12191, https://arxiv.org/abs/2502.13923)
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.exporters.utils import precompute_export_inputs

from ._hooks import NAME
from ._tiny import llama_config
from .base import ONE_PICTURE, Family, Tiny, VisionInputs, flat_rows, noise, register

MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
TOWER = {"depth": 3, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
MARKS = {"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}


class PackedPatches(Family):
    """Vision over a packed sequence of patches, positions with three axes."""

    one_picture = True
    module: ClassVar[str] = ""  # of transformers.models
    grid: ClassVar[tuple[int, int, int]] = (1, 8, 12)  # of the tiny model's pictures; rows unlike columns on purpose

    def check(self, model: Any) -> None:
        self.module_of()

    def module_of(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.module}.modeling_{self.module}")

    def patches(self, model: Any) -> Sequence[tuple[Any, str, Any]]:
        """q, k and v arrive packed with their segment bounds, as for flash attention: one node instead of a loop over segments."""
        module = self.module_of()
        if not hasattr(module, "is_flash_attention_requested"):
            return ()
        return [(module, "is_flash_attention_requested", lambda config=None, *a, **k: getattr(config, "_attn_implementation", None) == NAME)]

    def vision_example(self, model: Any, images: int) -> dict[str, Tensor]:
        vision = model.config.vision_config
        frames, rows, columns = self.grid
        width = getattr(vision, "in_channels", 3) * vision.patch_size ** 2 * vision.temporal_patch_size
        return {"pixel_values": noise((images * frames * rows * columns, width), model), "image_grid_thw": torch.tensor([self.grid] * images)}

    def picture(self, example: dict[str, Tensor], i: int) -> dict[str, Tensor]:
        grids = example["image_grid_thw"]
        first = int(grids[:i].prod(-1).sum())
        return {"pixel_values": example["pixel_values"][first: first + int(grids[i].prod())], "image_grid_thw": grids[i: i + 1]}

    def vision_inputs(self, model: Any, example: dict[str, Tensor]) -> VisionInputs:
        grid = example["image_grid_thw"]
        made: dict[str, Any] = {"grid_thw": grid}
        precompute_export_inputs(model.get_encoder(modality="image"), made)
        del made["grid_thw"]
        if made.get("max_seqlen") is None:
            made["max_seqlen"] = int(grid.prod(-1).max())
        device = example["pixel_values"].device
        baked = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in made.items() if t is not None}
        frames, rows, columns = grid[0].tolist()
        return VisionInputs({"pixel_values": example["pixel_values"]}, baked=baked | {"image_grid_thw": grid},
                            note=f"{ONE_PICTURE}; grid {frames} x {rows} x {columns} patches")

    def vision(self, model: Any, inputs: dict[str, Tensor], baked: dict[str, Any]) -> tuple[Tensor, ...]:
        return self._rows(self.core(model).get_image_features(**inputs, **baked, return_dict=True))

    def hf_vision(self, model: Any, example: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return self._rows(self.core(model).get_image_features(**example, return_dict=True))

    def _rows(self, out: Any) -> tuple[Tensor, ...]:
        return (flat_rows(out.pooler_output), *[flat_rows(d) for d in getattr(out, "deepstack_features", None) or ()])

    def positions(self, model: Any) -> dict[str, Any]:
        """Text counts on all three axes; a picture starts where the text stopped and counts (frame, row, column) after merging patches;
        the text after it goes on at start + max(rows, columns)."""
        return {"kind": "mrope", "merge": int(model.config.vision_config.spatial_merge_size), "axes": ["frame", "row", "column"]}

    def hf_inputs(self, model: Any, input_ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (input_ids == self.image_token_id(model)).long()}

    def hf_positions(self, model: Any, input_ids: Tensor, mask: Tensor, example: dict[str, Tensor]) -> Tensor:
        core = self.core(model)
        given = {"input_ids": input_ids, "attention_mask": mask, "image_grid_thw": example["image_grid_thw"]} | self.hf_inputs(model, input_ids)
        taken = inspect.signature(core.get_rope_index).parameters
        return core.get_rope_index(**{n: t for n, t in given.items() if n in taken})[0]

    def _tiny(self, model: Any) -> Tiny:
        frames, rows, columns = self.grid
        return Tiny(model, image_tokens=frames * rows * columns // 4, before=(502,), after=(503,))


@register
class Qwen2VL(PackedPatches):
    model_types = ("qwen2_vl",)
    module = "qwen2_vl"

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        vision = TOWER | {"embed_dim": 32, "hidden_size": 64}
        return self._tiny(T.Qwen2VLForConditionalGeneration(T.Qwen2VLConfig(
            vision_config=vision, text_config=llama_config(layers, rope_parameters=MROPE), **MARKS)))


@register
class Qwen2_5VL(PackedPatches):
    model_types = ("qwen2_5_vl",)
    module = "qwen2_5_vl"

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        vision = TOWER | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 32, "fullatt_block_indexes": [1]}
        return self._tiny(T.Qwen2_5_VLForConditionalGeneration(T.Qwen2_5_VLConfig(
            vision_config=vision, text_config=llama_config(layers, rope_parameters=MROPE), **MARKS)))


class DeepStack(PackedPatches):
    """Features of early tower blocks are added to the visual tokens after the first language layers."""

    text_model: ClassVar[str] = ""

    def features_of(self, model: Any) -> tuple[str, ...]:
        return ("image_features", *[f"deepstack.{i}" for i in range(len(model.config.vision_config.deepstack_visual_indexes))])

    def patches(self, model: Any) -> Sequence[tuple[Any, str, Any]]:
        """Dense addends [B, S, D], zero outside pictures, instead of boolean indexing: they drop with the tokens like any other tensor."""
        return [*super().patches(model), (getattr(self.module_of(), self.text_model), "_deepstack_process", lambda self, hidden, mask, dense: hidden + dense)]

    def language_inputs(self, model: Any, input_ids: Tensor, features: dict[str, Tensor], valid: Tensor, visual: Tensor,
                        position_ids: Tensor, cache: Any) -> dict[str, Any]:
        kwargs = super().language_inputs(model, input_ids, features, valid, visual, position_ids, cache)
        zeros = torch.zeros_like(kwargs["inputs_embeds"])
        kwargs["deepstack_visual_embeds"] = [torch.ops.foveate.splice_image_features(zeros, f, visual) for n, f in features.items() if n != "image_features"]
        return kwargs


@register
class Qwen3VL(DeepStack):
    model_types = ("qwen3_vl",)
    module, text_model = "qwen3_vl", "Qwen3VLTextModel"

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        return self._tiny(T.Qwen3VLForConditionalGeneration(T.Qwen3VLConfig(
            vision_config=_qwen3_tower(), text_config=llama_config(layers, rope_parameters=MROPE | {"mrope_interleaved": True}), **MARKS)))


@register
class Qwen3VLMoe(DeepStack):
    model_types = ("qwen3_vl_moe",)
    module, text_model = "qwen3_vl_moe", "Qwen3VLMoeTextModel"

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        text = llama_config(layers, rope_parameters=MROPE | {"mrope_interleaved": True}, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        return self._tiny(T.Qwen3VLMoeForConditionalGeneration(T.Qwen3VLMoeConfig(vision_config=_qwen3_tower(), text_config=text, **MARKS)))


def _qwen3_tower() -> dict[str, Any]:
    return TOWER | {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}


@register
class Glm4V(PackedPatches):
    model_types = ("glm4v",)
    module = "glm4v"

    def tiny(self, layers: int) -> Tiny:
        import transformers as T
        vision = TOWER | {"hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64, "image_size": 64}
        return self._tiny(T.Glm4vForConditionalGeneration(T.Glm4vConfig(
            vision_config=vision, text_config=llama_config(layers, rope_parameters=MROPE | {"partial_rotary_factor": 1.0}), image_token_id=500,
            video_token_id=501, image_start_token_id=502, image_end_token_id=503, video_start_token_id=504, video_end_token_id=505)))
