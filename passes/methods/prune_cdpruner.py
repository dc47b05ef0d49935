"""CDPruner: tokens that are relevant to the question and unlike each other, by a determinantal point process."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..select import Keep
from ..vision_select import Mode, VisionSelect
from ..vision_signals import cosine


@dataclass(frozen=True)
class PruneCDPruner(VisionSelect):
    """
    rewrite:
        r = minmax(sign cos(tokens, text));  K[a, b] = r[a] cos(token a, token b) r[b]
        i = sort(dpp_tokens(K, keep));  keep_tokens(projected tokens, i)

    Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (NeurIPS 2025). The published code
    takes the relevance from CLIP's text tower (sign -1: CLIP's patches are less like the text where they matter). A VLM has no such tower: with
    relevance "text" the vision stage gets the input `text`[images, D], the mean of the unit text vectors in the space of the projected tokens (sign
    +1 for the language model's own embeddings); with "none" all tokens are equally relevant.
    fixed: relevance is scaled per image, gains stay positive. parity: it is scaled over the whole batch, and a kernel of too low rank gives NaN.
    """

    name: ClassVar[str] = "prune-cdpruner"
    paper: ClassVar[str] = "arXiv:2506.10967"
    after_projector: ClassVar[bool] = True

    keep: Keep = 0.25
    relevance: Literal["none", "text"] = "none"
    sign: Literal[1, -1] = 1
    mode: Mode = "fixed"

    def reads(self) -> list[str]:
        return ["features", "text"] if self.relevance == "text" else ["features"]

    def choose(self, count: int, features: Tensor, text: Tensor | None = None) -> Tensor:
        unit = features.float() / features.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
        kernel = cosine(features)
        if self.mode == "fixed":  # exactly one, so that equal relevance is a tie on every backend
            place = torch.arange(kernel.shape[1], device=kernel.device)
            kernel = torch.where(place[:, None] == place, 1.0, kernel)
        if text is not None:
            weight = self.scaled(self.sign * (unit @ text.float()[..., None]).squeeze(-1))
            kernel = weight[:, :, None] * kernel * weight[:, None]
        return torch.ops.foveate.dpp_tokens(kernel, count, 1e-6 if self.mode == "fixed" else 0.0).sort(1).values

    def scaled(self, relevance: Tensor) -> Tensor:
        over = (0, 1) if self.mode == "parity" else (1,)
        low, high = relevance.amin(over, keepdim=True), relevance.amax(over, keepdim=True)
        return (relevance - low + 1e-6) / (high - low).clamp(min=1e-6 if self.mode == "fixed" else 0.0)
