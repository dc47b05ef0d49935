"""A tiny random LLaVA with a real processor, saved as a Hugging Face folder: what command-line and session tests start from."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", *"what is this colour of the and in red green blue thing ? . a b c d e f g h i j k l m n o p".split()]
SIDE, PATCH = 32, 8  # 16 visual tokens per picture
_KEEP = []  # temporary folders live as long as the test process


@functools.cache
def tiny_llava(layers: int = 3) -> Path:
    """The folder of the checkpoint; made once per process."""
    import transformers as T

    _KEEP.append(tempfile.TemporaryDirectory(prefix="tiny-llava-"))
    folder = Path(_KEEP[-1].name) / "checkpoint"
    torch.manual_seed(0)
    text = T.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = T.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=SIDE, patch_size=PATCH, projection_dim=32
    )
    config = T.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4, vision_feature_layer=-1, image_seq_length=(SIDE // PATCH) ** 2)
    model = T.LlavaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():  # wide enough that attention, positions and the picture decide the next token
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.5 if "embed" in name or "lm_head" in name else 0.25)
    model.generation_config = T.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_new_tokens=12, do_sample=False)
    model.save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def processor():
    """Word-level tokenizer, CLIP picture processing, and a chat template, in the way of LLaVA-1.5."""
    import transformers as T
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    table = {w: i for i, w in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = T.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=512,
    )
    pictures = T.CLIPImageProcessor(size={"height": SIDE, "width": SIDE}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        "{% if c.type == 'image' %}<image> {% else %}{{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    )
    return T.LlavaProcessor(
        pictures, fast, patch_size=PATCH, vision_feature_select_strategy="default", chat_template=template, image_token="<image>", num_additional_image_tokens=1
    )
