"""Processors of every family, as small as the models of tiny_llm."""

import pytest
import tiny_llm
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, ProcessorMixin

SQUARE = {"height": 32, "width": 32}
LLAVA = {
    "patch_size": 8,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,
}
ONEVISION = {
    "vision_feature_select_strategy": "full",
    "vision_aspect_ratio": "anyres_max_2",
    "num_image_tokens": 16,
}
QWEN = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": 1,
    "min_pixels": 64,
    "max_pixels": 640,
}
QWEN_MARKS = {
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
    "start": "<|vision_start|>",
    "end": "<|vision_end|>",
}
# Of each: processor with its settings, image processor with its settings, and special tokens
# besides "<image>".
PROCESSORS = {
    "llava": ("Llava", LLAVA, "CLIP", {"size": SQUARE, "crop_size": SQUARE}, {}),
    "llava_next": (
        *("LlavaNext", LLAVA, "LlavaNext"),
        {
            "size": {"shortest_edge": 32},
            "crop_size": SQUARE,
            "image_grid_pinpoints": tiny_llm.PINPOINTS,
        },
        {},
    ),
    "llava_onevision": (
        *("LlavaOnevision", ONEVISION, "LlavaOnevision"),
        {"size": SQUARE, "image_grid_pinpoints": tiny_llm.PINPOINTS},
        {},
    ),
    "internvl": (
        *("InternVL", {"image_seq_length": 9}, "GotOcr2", {"size": {"height": 48, "width": 48}}),
        {"image": "<IMG_CONTEXT>", "start": "<img>", "end": "</img>"},
    ),
    "idefics3": (
        *("Idefics3", {"image_seq_len": 4}, "Idefics3"),
        {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
        {"start": "<fake_token_around_image>", "end": "<global-img>"},
    ),
    "paligemma": ("PaliGemma", {}, "Siglip", {"size": SQUARE}, {}),
    "gemma3": (
        *("Gemma3", {"image_seq_length": 4}, "Gemma3", {"size": SQUARE}),
        {"image": "<image_soft_token>", "start": "<start_of_image>", "end": "<end_of_image>"},
    ),
    "qwen2_vl": ("Qwen2VL", {}, "Qwen2VL", QWEN, QWEN_MARKS),
    "qwen2_5_vl": ("Qwen2_5_VL", {}, "Qwen2VL", QWEN, QWEN_MARKS),
    "qwen3_vl": ("Qwen3VL", {}, "Qwen2VL", QWEN, QWEN_MARKS),
}
VIDEOS = ("llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ ' IMAGE ' if part.type == 'image' else ' ' + part.text + ' ' }}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} w3 {% endif %}"
)


def tokenizer_of(marks):
    """Words w2 to w49, and special tokens under the numbers that tiny_llm gives them."""
    marks = {"image": "<image>", "video": "<video>", "start": "<start>", "end": "<end>"} | marks
    special = {
        0: "<pad>",
        1: "<s>",
        51: marks["start"],
        52: marks["end"],
        tiny_llm.IMAGE: marks["image"],
    }
    special[58] = marks["video"]
    words = {special.get(number, f"w{number}"): number for number in range(tiny_llm.VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    named = {  # as InternVL's and Gemma's tokenizers name them
        "context_image_token": marks["image"],
        "start_image_token": marks["start"],
        "end_image_token": marks["end"],
        "video_token": marks["video"],
        "image_token": marks["image"],
        "boi_token": marks["start"],
        "eoi_token": marks["end"],
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="w2",
        extra_special_tokens=named,
    )


def processor_of(family):
    """The family's own processor; without its part for videos, which needs torchvision."""
    kind, settings, image_kind, image_settings, marks = PROCESSORS[family]
    pixels = getattr(transformers, f"{image_kind}ImageProcessorPil")(**image_settings)
    if family == "paligemma":
        pixels.image_seq_length = 16
    parts = {"image_processor": pixels, "tokenizer": tokenizer_of(marks)}
    with pytest.MonkeyPatch.context() as patch:
        if family in VIDEOS:
            parts["video_processor"] = None
            patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        made = getattr(transformers, f"{kind}Processor")(**parts, **settings)
    mark = "<start_of_image>" if family == "gemma3" else marks.get("image", "<image>")
    if family.startswith("qwen"):
        mark = f"<|vision_start|>{mark}<|vision_end|>"
    if family != "paligemma":  # which has no template
        made.chat_template = TEMPLATE.replace("IMAGE", mark)
    return made
