"""Every family by discovery: its tiny random model, captured, equals Hugging Face's own code; a family from outside joins by one file."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate import FoveateError, load_plugin
from foveate.graph.check import TOLERANCE, compare
from foveate.graph.families import REGISTRY

ASKED = {"llava", "llava_next", "llava_onevision", "vipllava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm", "idefics3", "paligemma",
         "gemma3", "gemma4", "mistral3", "pixtral", "lfm2_vl", "molmo2", "glm4v", "ovis2"}
TOY = """
import transformers as T
from foveate.graph.families.base import Tiny, register
from foveate.graph.families.llava import Llava
from foveate.graph.families._tiny import clip_config, llama_config

class ToyConfig(T.LlavaConfig):
    model_type = "toy_llava"

@register
class Toy(Llava):
    model_types = ("toy_llava",)
    def tiny(self, layers):
        config = ToyConfig(vision_config=T.CLIPVisionConfig(**clip_config(image_size=16)), text_config=T.LlamaConfig(**llama_config(layers)),
                           image_token_index=500, vision_feature_layer=-2)
        return Tiny(T.LlavaForConditionalGeneration(config), image_tokens=16)
"""


def test_the_families_of_the_promise_are_here():
    assert ASKED <= set(REGISTRY)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_stages_equal_hugging_face(name: str):
    """Vision, prefill with left and with right padding, 8 decode steps; batch of three, two pictures in the middle sample."""
    result = compare(name, layers=2)
    assert result.passed, f"{result} (tolerance {TOLERANCE}: float32, other order of summation)"


def test_a_family_from_outside_is_one_file(tmp_path: Path):
    file = tmp_path / "toy_llava.py"
    file.write_text(TOY)
    try:
        assert load_plugin(file)["families"] == ["toy_llava"]
        assert compare("toy_llava", layers=1, steps=2).passed
    finally:
        REGISTRY.pop("toy_llava", None)


def test_a_plugin_that_adds_nothing_is_refused(tmp_path: Path):
    file = tmp_path / "nothing.py"
    file.write_text("x = 1\n")
    with pytest.raises(FoveateError, match=r"nothing\.py added nothing; it needs .* a Family with @register"):
        load_plugin(file)
    with pytest.raises(FoveateError, match="no file"):
        load_plugin(tmp_path / "missing.py")


def test_a_model_type_belongs_to_one_adapter(tmp_path: Path):
    file = tmp_path / "thief.py"
    file.write_text("from foveate.graph.families.base import Family, register\n@register\nclass Thief(Family):\n    model_types = ('llava',)\n")
    with pytest.raises(FoveateError, match="'llava' belongs to Llava already"):
        load_plugin(file)
