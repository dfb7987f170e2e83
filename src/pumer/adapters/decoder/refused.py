"""Models of transformers that answer about images and cannot be reduced, and why: what an error
says, and docs/models.md."""

from __future__ import annotations

from typing import Any

RESAMPLES = "A Q-former or resampler leaves the language model a few dozen tokens of an image."
CROSS = "Its text looks at images by cross-attention; they are not among the words."
ENCODES = "An encoder reads the image, and another model writes: no prompt has image tokens."
PREFIX = (
    "Its image tokens have no placeholders in the prompt, and its attention goes through no "
    "interface at which queries and keys could be read."
)
ACTS = "It gives actions, not words."
NO_IMAGES = "It takes no images."

_CLASSES = {
    RESAMPLES: (
        "Blip2ForConditionalGeneration",
        "Idefics2ForConditionalGeneration",
        "InstructBlipForConditionalGeneration",
        "InstructBlipVideoForConditionalGeneration",
        "Kosmos2ForConditionalGeneration",
        "Kosmos2_5ForConditionalGeneration",
    ),
    CROSS: (
        "BlipForConditionalGeneration",
        "EvollaForProteinText2Text",
        "IdeficsForVisionText2Text",
        "MllamaForConditionalGeneration",
    ),
    ENCODES: (
        "Florence2ForConditionalGeneration",
        "PPFormulaNetForConditionalGeneration",
        "Pix2StructForConditionalGeneration",
        "T5Gemma2ForConditionalGeneration",
        "UdopForConditionalGeneration",
        "VisionEncoderDecoderModel",
    ),
    PREFIX: ("GitForCausalLM",),
    ACTS: ("PI0ForConditionalGeneration",),
    NO_IMAGES: ("Mistral4ForCausalLM",),
}
REFUSED = {name: reason for reason, names in _CLASSES.items() for name in names}
"""The reason for every class."""


def reason(model: Any) -> str | None:
    """Why a model cannot be reduced, in one sentence; None if nothing is known of it."""
    names = (parent.__name__ for parent in type(model).__mro__)
    return next((REFUSED[name] for name in names if name in REFUSED), None)
