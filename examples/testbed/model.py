"""The model (a Hugging Face LLaVA), and forward passes of the same weights that are lean enough to train on a CPU."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from examples.testbed import words
from examples.testbed.scenes import LABELS, SIZE

HEAD = 32
LABEL_WEIGHT = {"kind": 1.0, "color": 0.5, "row": 0.1, "col": 0.1, "center": 0.3}


@dataclass(frozen=True)
class Size:
    patch: int
    vision_width: int
    vision_layers: int
    width: int
    mlp: int
    layers: int

    @property
    def tokens(self) -> int:
        return (SIZE // self.patch) ** 2


SIZES = {
    "small": Size(patch=8, vision_width=128, vision_layers=5, width=128, mlp=384, layers=8),        # 144 visual tokens, 2.7 M parameters
    "large": Size(patch=4, vision_width=256, vision_layers=7, width=320, mlp=896, layers=12),       # 576 visual tokens, 20 M parameters
}


class Testbed(nn.Module):
    """What is trained together: the VLM, the text tower that made its vision tower a CLIP, and throw-away label heads."""

    def __init__(self, size: str = "small", seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.size = s = SIZES[size]
        vision = CLIPVisionConfig(
            hidden_size=s.vision_width, intermediate_size=4 * s.vision_width, num_hidden_layers=s.vision_layers, hidden_act="gelu",
            num_attention_heads=s.vision_width // HEAD, image_size=SIZE, patch_size=s.patch, projection_dim=128)
        text = LlamaConfig(
            vocab_size=len(words.VOCAB), hidden_size=s.width, intermediate_size=s.mlp, num_hidden_layers=s.layers, head_dim=HEAD,
            num_attention_heads=s.width // HEAD, num_key_value_heads=s.width // HEAD // 2, max_position_embeddings=2048, rms_norm_eps=1e-5,
            tie_word_embeddings=False, pad_token_id=words.PAD, bos_token_id=words.BOS, eos_token_id=words.EOS)
        self.vlm = LlavaForConditionalGeneration(LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=words.IMAGE, projector_hidden_act="gelu",
            vision_feature_select_strategy="default", vision_feature_layer=-2, image_seq_length=s.tokens)).float()
        self.text_tower = CLIPTextModelWithProjection(CLIPTextConfig(
            vocab_size=len(words.VOCAB), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            hidden_act="gelu", max_position_embeddings=64, projection_dim=128, pad_token_id=words.PAD,
            bos_token_id=words.BOS, eos_token_id=words.EOS)).float()
        self.visual_projection = nn.Linear(s.vision_width, 128, bias=False)
        self.scales = nn.Parameter(torch.tensor([2.0, 2.0, -3.0]))     # log scale of CLS-caption, of patch-phrase, bias of patch-phrase
        self.labels = nn.Sequential(nn.LayerNorm(s.vision_width), nn.Linear(s.vision_width, sum(LABELS.values())))
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                small = "embed" in name or "lm_head" in name
                nn.init.normal_(p, std=0.02 if small else 0.7 * p[0].numel() ** -0.5)
                if name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight", "fc2.weight")):
                    p.data.mul_((2 * (s.layers if "language" in name else s.vision_layers)) ** -0.5)
        self.vlm.model.language_model.embed_tokens.weight.data.mul_(5)

    @property
    def vision(self):
        return self.vlm.model.vision_tower

    @property
    def llm(self):
        return self.vlm.model.language_model


def attend(h: Tensor, attn: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(p(h).unflatten(-1, (-1, HEAD)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))


def look(bed: Testbed, pixels: Tensor, last: bool = False) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """pixels[B, 96, 96, 3] u8 -> the penultimate layer[B, 1+T, D], the last one if asked, and CLS attention[B, T] of those computed."""
    tower, patch = bed.vision, bed.size.patch
    n = SIZE // patch
    x = pixels.float().div(127.5).sub(1.0).unflatten(1, (n, patch)).unflatten(3, (n, patch))           # [B, n, p, n, p, 3]
    x = x.permute(0, 1, 3, 5, 2, 4).reshape(len(pixels), n * n, -1)
    e = tower.embeddings
    x = F.linear(x, e.patch_embedding.weight.flatten(1))
    x = torch.cat([e.class_embedding.expand(len(x), 1, -1), x], 1) + e.position_embedding.weight
    x, seen, penultimate = tower.pre_layrnorm(x), [], x
    layers = tower.encoder.layers
    for i, layer in enumerate(layers if last else layers[:-1]):
        q, k, v = attend(layer.layer_norm1(x), layer.self_attn)
        if i >= len(layers) - 2:
            seen.append((q[:, :, :1] @ k.transpose(-1, -2) * HEAD ** -0.5).softmax(-1)[:, :, 0, 1:].mean(1))
        x = x + layer.self_attn.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + layer.mlp.fc2(F.gelu(layer.mlp.fc1(layer.layer_norm2(x))))
        if i == len(layers) - 2:
            penultimate = x
    return penultimate, x if last else None, seen


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def additive(see: Tensor) -> Tensor:
    """see[B, Q, K] -> mask[B, 1, Q, K]"""
    return torch.zeros(see.shape, device=see.device).masked_fill_(~see, float("-inf"))[:, None]


def talk(
    bed: Testbed, features: Tensor, images: int, ids: Tensor, segment: Tensor, offset: Tensor, aside: Tensor | None = None
) -> Tensor:
    """
    The language model over packed conversations, each seeing the pictures and itself: features[B*images, N, D], the rest [B, T].
    `aside`[B*images, N]: patches that nothing but themselves looks at. -> final states of the text[B, T, D]
    """
    llm, embed = bed.llm, bed.llm.embed_tokens.weight
    visual = bed.vlm.model.multi_modal_projector(features)
    B, T = ids.shape
    visual = visual.unflatten(0, (B, images))
    parts = [embed[words.BOS].expand(B, 1, -1), visual[:, 0]]
    for i in range(1, images):
        parts += [embed[words.ID["and"]].expand(B, 1, -1), visual[:, i]]
    x = torch.cat([*parts, F.embedding(ids, embed)], 1)
    S = x.shape[1]
    P = S - T
    own = (segment[:, :, None] == segment[:, None, :]) & torch.ones(T, T, dtype=torch.bool, device=ids.device).tril()
    shown, among = torch.ones(B, P, dtype=torch.bool, device=ids.device), None
    if aside is not None:
        shown = ~F.pad(aside.unflatten(0, (B, images)), (1, 0)).flatten(1)              # <s> and `and` stay
        before = torch.ones(P, P, dtype=torch.bool, device=ids.device).tril()
        self_ = torch.eye(P, dtype=torch.bool, device=ids.device)
        among = additive(before & (shown[:, None] | self_))
    mask = additive(torch.cat([shown[:, None].expand(B, T, P), own], 2))
    at = torch.cat([torch.arange(P, device=ids.device).expand(B, -1), P + offset], 1)
    angle = at[:, None, :, None].float() / 10000.0 ** (torch.arange(0, HEAD, 2, device=ids.device) / HEAD)
    cos, sin = angle.cos(), angle.sin()
    for i, layer in enumerate(llm.layers):
        attn, final = layer.self_attn, i == len(llm.layers) - 1
        q, k, v = attend(rms(x, layer.input_layernorm.weight), attn)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        a = F.scaled_dot_product_attention(q[:, :, P:], k, v, attn_mask=mask)
        if final:                                       # nothing reads the last layer's visual rows
            x = x[:, P:]
        else:
            above = F.scaled_dot_product_attention(q[:, :, :P], k[:, :, :P], v[:, :, :P], attn_mask=among, is_causal=among is None)
            a = torch.cat([above, a], 2)
        x = x + attn.o_proj(a.transpose(1, 2).flatten(2))
        h = rms(x, layer.post_attention_layernorm.weight)
        x = x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(h)) * layer.mlp.up_proj(h))
    return rms(x, llm.norm.weight)


def label_loss(bed: Testbed, features: Tensor, labels: Tensor) -> Tensor:
    """Every label of every patch read linearly from the penultimate layer: features[B, T, D], labels[B, label, T]."""
    z, total = bed.labels(features), 0.0
    weight = torch.where(labels[:, 0] > 0, 1.0, 0.15)
    for i, (part, name) in enumerate(zip(z.split(list(LABELS.values()), -1), LABELS, strict=True)):
        y = labels[:, i].flatten()
        w = weight.flatten() * (y >= 0)
        loss = F.cross_entropy(part.flatten(0, 1), y.clamp(min=0), reduction="none")
        total = total + LABEL_WEIGHT.get(name, 0.2) * (loss * w).sum() / w.sum().clamp(min=1)
    return total


def clip_loss(bed: Testbed, last: Tensor, caption: Tensor, phrase: Tensor, match: Tensor) -> tuple[Tensor, Tensor]:
    """Contrast CLS with captions over the batch, and every patch with one phrase: last[B, 1+T, D], match[B, T] -> two losses."""
    image = F.normalize(bed.visual_projection(bed.vision.post_layernorm(last)), dim=-1)
    text = F.normalize(bed.text_tower(input_ids=caption).text_embeds, dim=-1)
    say = F.normalize(bed.text_tower(input_ids=phrase).text_embeds, dim=-1)
    logits = bed.scales[0].exp() * image[:, 0] @ text.T
    truth = torch.arange(len(logits), device=logits.device)
    contrast = (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2
    patch = bed.scales[1].exp() * (image[:, 1:] @ say[:, :, None])[..., 0] + bed.scales[2]
    return contrast, F.binary_cross_entropy_with_logits(patch, match.float(), pos_weight=torch.tensor(4.0, device=patch.device))
