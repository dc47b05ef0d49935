"""Score pictures and patches by text: the small CLIP that the vision tower was first trained as.

    tower = TextTower.load("examples/testbed/checkpoint")
    tower.patches(pixel_values, ["what color is the circle ?"])         # [B, 144], higher where the text is about the patch
    tower.pictures(pixel_values, ["top left red 3 , middle center blue circle"])        # [B, texts], cosine of CLS and text
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoTokenizer, CLIPTextModelWithProjection


@dataclass
class TextTower:
    """`checkpoint/text_tower/`: a CLIPTextModelWithProjection; `projection.safetensors` takes vision states into its space."""

    vision: nn.Module
    text: nn.Module
    tokenizer: object
    projection: Tensor                                  # [128, D]
    scales: Tensor                                      # log scale of CLS-caption, log scale and bias of patch-phrase

    @classmethod
    def load(cls, folder: str | Path) -> "TextTower":
        folder = Path(folder)
        extra = load_file(folder / "text_tower" / "projection.safetensors")
        return cls(
            AutoModelForImageTextToText.from_pretrained(folder).eval().model.vision_tower,
            CLIPTextModelWithProjection.from_pretrained(folder / "text_tower").eval(),
            AutoTokenizer.from_pretrained(folder), extra["visual_projection.weight"], extra["scales"])

    @torch.no_grad()
    def say(self, texts: list[str]) -> Tensor:
        """[texts, 128], unit length."""
        ids = self.tokenizer([f"{t} </s>" for t in texts], padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return F.normalize(self.text(input_ids=ids).text_embeds, dim=-1)

    @torch.no_grad()
    def see(self, pixel_values: Tensor) -> Tensor:
        """[B, 1 + 144, 128], unit length, CLS first: the LAST vision layer (the language model reads the one before)."""
        last = self.vision(pixel_values, output_hidden_states=True).hidden_states[-1]
        return F.normalize(self.vision.post_layernorm(last) @ self.projection.T, dim=-1)

    def pictures(self, pixel_values: Tensor, texts: list[str]) -> Tensor:
        return self.see(pixel_values)[:, 0] @ self.say(texts).T

    def patches(self, pixel_values: Tensor, texts: list[str]) -> Tensor:
        """One text per picture -> the log-odds[B, 144] that each patch shows what the text names."""
        cosine = torch.einsum("btd,bd->bt", self.see(pixel_values)[:, 1:], self.say(texts))
        return self.scales[1].exp() * cosine + self.scales[2]
