"""Tiny random-weight decoders of every family, and padded batches of prompts with images for
them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
import transformers
from torch import Tensor, nn

from pumer.adapters.decoder import kv_cache

CACHE = next(
    name
    for name in kv_cache.NAMES
    if name in inspect.signature(transformers.LlamaModel.forward).parameters
)
"""What models call their cache."""
LAYERS = 4
"""Layers of every language model."""
VOCABULARY = 60
IMAGE = 57
"""Id of the placeholders; ids from 50 on mean something in one family or another."""
PAD = 0
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
CLIP = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 32,
    "patch_size": 8,
    "projection_dim": 24,
}
SIGLIP = {name: value for name, value in CLIP.items() if name != "projection_dim"} | {
    "vision_use_head": False
}
PINPOINTS = [[32, 64], [64, 32], [64, 64]]
SIDES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "image_size",
    "patch_size",
)
GEMMA3_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": list(range(50, VOCABULARY))}
"""No placeholders in answers."""
BUILDERS: dict[str, Callable[[], nn.Module]] = {}
Inputs = dict[str, Tensor]


def builder(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Function decorator: a family's builder, by its name."""
    BUILDERS[make.__name__] = make
    return make


@builder
def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    return transformers.LlavaForConditionalGeneration(config)


@builder
def llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP),
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_id=IMAGE,
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaNextForConditionalGeneration(config)


@builder
def llava_onevision() -> nn.Module:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**SIGLIP),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        video_token_id=58,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio="anyres_max_2",
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


@builder
def internvl() -> nn.Module:
    vision = {name: value for name, value in CLIP.items() if name != "projection_dim"}
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            **(vision | {"image_size": [48, 48], "patch_size": [8, 8]})
        ),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        image_seq_length=9,
    )
    return transformers.InternVLForConditionalGeneration(config)


@builder
def smolvlm() -> nn.Module:
    config = transformers.SmolVLMConfig(
        vision_config=transformers.models.smolvlm.SmolVLMVisionConfig(
            **{k: SIGLIP[k] for k in SIDES}
        ),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


@builder
def idefics3() -> nn.Module:
    config = transformers.Idefics3Config(
        vision_config=transformers.models.idefics3.Idefics3VisionConfig(
            **{k: SIGLIP[k] for k in SIDES}
        ),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return transformers.Idefics3ForConditionalGeneration(config)


@builder
def paligemma() -> nn.Module:
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**SIGLIP, projection_dim=32),
        text_config=transformers.GemmaConfig(**TEXT, head_dim=8),
        image_token_id=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


@builder
def gemma3() -> nn.Module:
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**SIGLIP),
        text_config=transformers.Gemma3TextConfig(
            **TEXT,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=16,
            layer_types=GEMMA3_LAYERS,
        ),
        image_token_id=IMAGE,
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


QWEN_TEXT = TEXT | {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
}
QWEN_VISION = {
    "depth": 3,
    "num_heads": 3,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": 58,
    "vision_start_token_id": 51,
    "vision_end_token_id": 52,
}


@builder
def qwen2_vl() -> nn.Module:
    vision = QWEN_VISION | {"embed_dim": 24, "hidden_size": 32}
    config = transformers.Qwen2VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_IDS)
    return transformers.Qwen2VLForConditionalGeneration(config)


@builder
def qwen2_5_vl() -> nn.Module:
    vision = QWEN_VISION | {
        "hidden_size": 24,
        "out_hidden_size": 32,
        "intermediate_size": 40,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=QWEN_TEXT, vision_config=vision, **QWEN_IDS)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@builder
def qwen3_vl() -> nn.Module:
    vision = QWEN_VISION | {
        "hidden_size": 24,
        "out_hidden_size": 32,
        "intermediate_size": 40,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0, 1],
    }
    config = transformers.Qwen3VLConfig(
        text_config=QWEN_TEXT | {"head_dim": 8}, vision_config=vision, **QWEN_IDS
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def model(family: str = "llava", attention: str = "sdpa") -> nn.Module:
    """A model in eval mode whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    made = BUILDERS[family]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                wide = "embed" in name or "lm_head" in name
                parameter.normal_(std=1.0 if wide else 0.25, generator=generator)
    made.generation_config.eos_token_id = None
    made.set_attn_implementation(attention)
    return made.eval()


def logits(model: nn.Module, inputs: Inputs, **more) -> Tensor:
    """Logits of a forward without gradients."""
    with torch.no_grad():
        return model(**inputs, **more).logits


def answer(model: nn.Module, inputs: Inputs, **more) -> list[list[int]]:
    """What it writes after the prompts, `GREEDY` unless more is said."""
    return model.generate(**inputs, **(GREEDY | more))[:, inputs["input_ids"].shape[1] :].tolist()


def near(a: Tensor, b: Tensor) -> None:
    """Equal up to rounding."""
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def images(family: str, number: int, seed: int = 3) -> list[tuple[Inputs, list[int]]]:
    """Images as the processor of a family gives them, one by one, and what each puts into the
    prompt."""
    generator = torch.Generator().manual_seed(seed)

    def pixels(count: int, side: int = 32) -> Tensor:
        return torch.randn(count, 3, side, side, generator=generator)

    made: list[tuple[Inputs, list[int]]] = []
    for index in range(number):
        if family in ("llava_next", "llava_onevision"):
            # One that is higher than wide, one that fills both ways and one that is cut at the
            # sides.
            size, crops, rows = (
                ((60, 30), 2, (8, 4)),
                ((64, 64), 4, (8, 8)),
                ((64, 40), 4, (8, 6)),
            )[index % 3]
            if family == "llava_onevision" and crops == 4:
                ratio = (rows[0] * rows[1] / (2 * 16)) ** 0.5
                rows = tuple(int(side // ratio) for side in rows) if ratio > 1.1 else rows
            stacked = torch.cat([pixels(1 + crops), torch.zeros(4 - crops, 3, 32, 32)])
            tokens = 16 + rows[0] * (rows[1] + 1)
            made.append(
                (
                    {"pixel_values": stacked[None], "image_sizes": torch.tensor([size])},
                    [IMAGE] * tokens,
                )
            )
        elif family == "internvl":
            crops = (1, 3)[index % 2]
            made.append(({"pixel_values": pixels(crops, 48)}, [51, *[IMAGE] * 9 * crops, 52]))
        elif family in ("smolvlm", "idefics3"):
            crops = (1, 3)[index % 2]
            ids = [token for crop in range(crops - 1) for token in (50, 51 + crop, *[IMAGE] * 4)]
            made.append(({"pixel_values": pixels(crops)}, [*ids, 50, 55, *[IMAGE] * 4, 50]))
        elif family.startswith("qwen"):
            rows, columns = ((4, 6), (8, 4), (6, 10))[index % 3]
            patches = torch.randn(rows * columns, 3 * 16, generator=generator)
            grid = torch.tensor([[1, rows, columns]])
            ids = [51, *[IMAGE] * (rows * columns // 4), 52]
            made.append(({"pixel_values": patches, "image_grid_thw": grid}, ids))
        elif family == "gemma3":
            made.append(({"pixel_values": pixels(1)}, [51, *[IMAGE] * 4, 52]))
        else:
            made.append(({"pixel_values": pixels(1)}, [IMAGE] * 16))
    return made


def batch(
    family: str = "llava",
    layout: Sequence[Sequence[int | str]] = ((4, "i", 6),),
    side: str = "left",
    seed: int = 3,
) -> Inputs:
    """A padded batch.

    Args:
        family: name of a builder.
        layout: of every sample, lengths of texts and "i" for images, in order.
        side: where the padding goes.
        seed: of the images.
    """
    generator = torch.Generator().manual_seed(2)
    ready = iter(images(family, sum(part == "i" for sample in layout for part in sample), seed))
    pixels, owner, rows = [], [], []
    for sample in layout:
        ids = [1]
        for part in sample:
            if part == "i":
                pixel, inserted = next(ready)
                pixels.append(pixel)
                owner.append(len(rows))
                ids += inserted
            else:
                ids += torch.randint(2, 50, (part,), generator=generator).tolist()
        rows.append(ids)
    longest = max(map(len, rows))

    def padded(row: list[int]) -> list[int]:
        padding = [PAD] * (longest - len(row))
        return padding + row if side == "left" else row + padding

    inputs = {
        "input_ids": torch.tensor([padded(row) for row in rows]),
        "attention_mask": torch.tensor([padded([1] * len(row)) for row in rows]),
    }
    for name in pixels[0] if pixels else ():
        inputs[name] = torch.cat([pixel[name] for pixel in pixels])
    if family in ("smolvlm", "idefics3") and pixels:
        inputs["pixel_values"] = by_sample(
            [pixel["pixel_values"] for pixel in pixels], owner, len(rows)
        )
    if family == "paligemma":
        inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    if family.startswith("qwen"):
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int()
    if family == "gemma3":
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    return inputs


def by_sample(images: Sequence[Tensor], owner: Sequence[int], samples: int) -> Tensor:
    """The crops of every sample [B,crops,3,H,W], made up with black ones."""
    none = torch.zeros(0, *images[0].shape[1:])
    joined = [
        torch.cat(
            [
                none,
                *(image for image, sample in zip(images, owner, strict=True) if sample == number),
            ]
        )
        for number in range(samples)
    ]
    return nn.utils.rnn.pad_sequence(joined, batch_first=True)


def alone(family: str, layout: Sequence[Sequence[int | str]], row: int, seed: int = 3) -> Inputs:
    """One sample of `batch(family, layout)` without padding."""
    inputs = batch(family, layout, seed=seed)
    real = inputs["attention_mask"][row].bool()
    shape = inputs["input_ids"].shape
    own = {name: x[row : row + 1, real] for name, x in inputs.items() if x.shape == shape}
    first = sum(part == "i" for sample in layout[:row] for part in sample)
    count = sum(part == "i" for part in layout[row])
    chosen = images(family, first + count, seed)[first:]
    for name in chosen[0][0] if chosen else ():
        own[name] = torch.cat([pixel[name] for pixel, _ in chosen])
    if chosen and family in ("smolvlm", "idefics3"):
        own["pixel_values"] = own["pixel_values"][None]
    return own


def candidates(family: str, inputs: Inputs) -> Tensor:
    """Which tokens are patches, bool [B,S]; of batches without crops."""
    image = inputs["input_ids"] == IMAGE
    if family in ("llava_next", "llava_onevision"):
        # The first image: 4 x 4 patches of the whole, then rows with a newline at the end.
        number = image.long().cumsum(1) - 1
        _, rows = images(family, 1)[0][0], 4
        image = image & ((number < 16) | ((number - 16) % (rows + 1) != rows))
    return image


def patches(family: str, number: int) -> list[int]:
    """How many patches every image has: not all placeholders are any."""
    newlines = {"llava_next": (8, 8, 8), "llava_onevision": (8, 5, 6)}.get(family, (0, 0, 0))
    return [
        tokens.count(IMAGE) - newlines[index % 3]
        for index, (_, tokens) in enumerate(images(family, number))
    ]
