"""Models of transformers that answer about images and cannot be reduced, and why: what an error
says, and docs/models.md."""

from __future__ import annotations

from typing import Any

STATES = (
    "Some layers of its language model keep a state in place of keys (linear attention, state "
    "spaces or short convolutions), from which no token can be taken out."
)
SELECTS = (
    "Its attention chooses keys by an index of its own, which counts every token of the prompt."
)
LAYS_OUT = (
    "Its encoder adds the patches of a page to the words that lie on them, and biases attention by "
    "the places of all tokens: not covered yet."
)
PROTEINS = "Its text looks at proteins, not at images."
PREFIX = (
    "Its image tokens have no placeholders in the prompt, and its attention goes through no "
    "interface at which queries and keys could be read."
)
ACTS = "It gives actions, not words."
NO_IMAGES = "It takes no images."

_CLASSES = {
    STATES: (
        "Glm5NextForConditionalGeneration",
        "Inkling2ForConditionalGeneration",
        "Inkling2LoopForConditionalGeneration",
        "InklingForConditionalGeneration",
        "Lfm2VlForConditionalGeneration",
        "Lfm3VlForConditionalGeneration",
        "MiniCPMOcrForConditionalGeneration",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "NemotronH_Omni_Reasoning_V3",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen4ExpForConditionalGeneration",
    ),
    SELECTS: (
        "Dots3NoteForConditionalGeneration",
        "HYV4VLForConditionalGeneration",
        "MiniMaxM3SparseForConditionalGeneration",
        "MistralLarge4ForConditionalGeneration",
    ),
    LAYS_OUT: ("UdopForConditionalGeneration",),
    PROTEINS: ("EvollaForProteinText2Text",),
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
