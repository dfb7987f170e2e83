"""Tiny random-weight decoders of every family, and padded batches of prompts with images for
them."""

from __future__ import annotations

from collections.abc import Sequence

import tiny_any_size  # noqa: F401  # each registers its families
import tiny_decoders
import tiny_families  # noqa: F401
import tiny_hybrids  # noqa: F401
import tiny_more  # noqa: F401
import tiny_selecting  # noqa: F401
import tiny_streams  # noqa: F401
import tiny_views  # noqa: F401
import torch
from tiny_parts import (  # noqa: F401  # what other tests take from here
    CACHE,
    CLIP,
    FAMILIES,
    GREEDY,
    IMAGE,
    LAYERS,
    PAD,
    PINPOINTS,
    QWEN_IDS,
    QWEN_TEXT,
    QWEN_VISION,
    SIDES,
    SIGLIP,
    TEXT,
    VOCABULARY,
    Image,
    Inputs,
)
from torch import Tensor, nn

BUILDERS = tuple(
    name for name, family in FAMILIES.items() if family.build.__module__ == tiny_decoders.__name__
)
"""Families that go through every test of decoders; the others go through `test_families.py`."""


def model(family: str = "llava", attention: str = "sdpa") -> nn.Module:
    """A model in eval mode whose weights are large enough for every token to matter."""
    torch.manual_seed(0)
    made = with_large_weights(FAMILIES[family].build())
    made.generation_config.eos_token_id = None
    if attention != "sdpa":  # which is what parts that know it have anyway
        made.set_attn_implementation(attention)
    return made


def with_large_weights(made: nn.Module) -> nn.Module:
    """The model in eval mode, its weights drawn anew."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim > 1:
                wide = "embed" in name or "lm_head" in name
                parameter.normal_(std=1.0 if wide else 0.25, generator=generator)
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


def images(family: str, number: int, seed: int = 3) -> list[Image]:
    """Images as the processor of a family gives them, one by one, and what each puts into the
    prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [FAMILIES[family].image(index, generator) for index in range(number)]


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
    described = FAMILIES[family]
    return inputs | described.join(pixels, owner, len(rows)) | described.extras(inputs)


def alone(family: str, layout: Sequence[Sequence[int | str]], row: int, seed: int = 3) -> Inputs:
    """One sample of `batch(family, layout)` without padding."""
    inputs = batch(family, layout, seed=seed)
    real = inputs["attention_mask"][row].bool()
    shape = inputs["input_ids"].shape
    own = {
        name: x[row : row + 1, real]
        for name, x in inputs.items()
        if getattr(x, "shape", None) == shape
    }
    first = sum(part == "i" for sample in layout[:row] for part in sample)
    count = sum(part == "i" for part in layout[row])
    chosen = images(family, first + count, seed)[first:]
    pixels = [pixel for pixel, _ in chosen]
    return own | FAMILIES[family].join(pixels, [0] * len(pixels), 1)


def likeliest(logits: Tensor) -> Tensor:
    """The words that `GREEDY` chooses."""
    return logits[..., : GREEDY["suppress_tokens"][0]].argmax(-1)


def continued(family: str, inputs: Inputs, words: Tensor) -> Inputs:
    """The inputs of one sample with words behind them, int64 [1,N]."""
    longer = {
        "input_ids": torch.cat([inputs["input_ids"], words], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones_like(words)], 1),
    }
    return inputs | longer | FAMILIES[family].extras(longer)


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
    newlines = FAMILIES[family].newlines
    return [
        tokens.count(IMAGE) - newlines[index % 3]
        for index, (_, tokens) in enumerate(images(family, number))
    ]
