"""Joint encoders of transformers that cannot be reduced, and why: what an error says, and
docs/models.md."""

from __future__ import annotations

from typing import Any

REGIONS = (
    "Its image tokens are a few dozen regions of a detector, without the [CLS] that every plan of "
    "a joint encoder keeps first."
)
REFUSED = dict.fromkeys(
    (
        "LxmertForPreTraining",
        "LxmertForQuestionAnswering",
        "LxmertModel",
        "VisualBertForMultipleChoice",
        "VisualBertForPreTraining",
        "VisualBertForQuestionAnswering",
        "VisualBertForRegionToPhraseAlignment",
        "VisualBertForVisualReasoning",
        "VisualBertModel",
    ),
    REGIONS,
)


def reason(model: Any) -> str | None:
    """Why a joint encoder cannot be reduced, in one sentence; None if nothing is known of it."""
    names = (parent.__name__ for parent in type(model).__mro__)
    return next((REFUSED[name] for name in names if name in REFUSED), None)
