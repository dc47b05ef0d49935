"""The vocabulary, and the tokenizer and processor built on it."""

from pathlib import Path

from examples.testbed.scenes import COLORS, COLS, KINDS, ROWS, SIZE

PAD, BOS, IMAGE, EOS, UNK = range(5)                    # </s> is not 2: CLIP text models treat an end token of 2 as a legacy case
SPECIAL = ["<pad>", "<s>", "<image>", "</s>", "<unk>"]
PLAIN = (
    "what digit shape color is are the at of in object objects digits how many there a an and where which below above left "
    "right largest smallest read image page describe list letter letters number has first second yes no ? . , circles squares "
    "triangles crosses with"
).split()
VOCAB = list(dict.fromkeys([*SPECIAL, *KINDS, *COLORS, *ROWS, *COLS, *PLAIN]))
ID = {word: i for i, word in enumerate(VOCAB)}

# Images come first, joined by "and"; a user turn is its bare text, an assistant turn ends with </s>.
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %} {{ m.content if m.content is string else m.content[0].text }} </s>"
    "{% elif m.content is string %} {{ m.content }}"
    "{% else %}{% set seen = namespace(n=0) %}{% for c in m.content %}"
    "{% if c.type == 'image' %}{{ ' and <image>' if seen.n else '<image>' }}{% set seen.n = seen.n + 1 %}"
    "{% else %} {{ c.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def encode(text: str) -> list[int]:
    return [ID[word] for word in text.split()]


def build_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(vocab=ID, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="left",
        model_max_length=2048, extra_special_tokens={"image_token": "<image>"}, clean_up_tokenization_spaces=False)


def build_processor(size: int = SIZE, patch: int = 8):
    from transformers import CLIPImageProcessorPil, LlavaProcessor

    images = CLIPImageProcessorPil(
        do_resize=True, size={"height": size, "width": size}, do_center_crop=False, do_rescale=True, rescale_factor=1 / 255,
        do_normalize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True, resample=2)
    return LlavaProcessor(
        image_processor=images, tokenizer=build_tokenizer(), patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, image_token="<image>", chat_template=CHAT_TEMPLATE)


def save_processor(folder: Path, size: int = SIZE, patch: int = 8) -> None:
    build_processor(size, patch).save_pretrained(folder)
