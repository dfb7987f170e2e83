"""Models of transformers that answer about images and cannot be reduced, and why: what an error
says, and docs/models.md."""

from __future__ import annotations

from typing import Any

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
