"""Which image-text-to-text models of transformers are reduced, and where: docs/models.md.

`python tests/adapters/models_document.py` writes it; `decoder/test_models_document.py` holds it
to the truth.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import tiny_llm
import tiny_pi0
import tiny_retrieval
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from pumer.adapters import find
from pumer.adapters.decoder.refused import REFUSED

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
CLASSES = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()), key=str.lower)
RETRIEVERS = sorted(name for name in dir(transformers) if name.endswith("ForRetrieval"))
"""Classes that make several vectors of a page, for late interaction."""
NOTES = {
    "Llama4ForConditionalGeneration": "transformers 5.24.0 fails on it, reduced or not "
    "(`image_outputs`)",
}
YES, NO = "yes", "–"


def reduced_classes() -> dict[str, tuple[str, str, str]]:
    """Of every class that has a tiny model: its family, whether tokens are merged inside the vision
    tower, and what can be read of the tower's attention."""
    result = {}
    builders = [partial(tiny_llm.model, name) for name in tiny_llm.FAMILIES]
    builders += [partial(tiny_retrieval.model, name) for name in tiny_retrieval.RETRIEVERS]
    for build in (*builders, tiny_pi0.model):
        model = build()
        adapter = find(model)
        tower = YES if adapter.tower_depth(model) else NO
        attention = "received"
        if not adapter.reads_tower:
            attention = NO
        elif adapter.has_class_token(model):
            attention = "received, [CLS]"
        result[type(model).__name__] = adapter.family, tower, attention
    return result


def table() -> str:
    """The document."""
    reduced = reduced_classes()
    lines = [
        "# Models",
        "",
        "Written by `PYTHONPATH=tests/models:tests/adapters python "
        "tests/adapters/models_document.py` and held true by a test.",
        "",
        f"Of the {len(CLASSES)} image-text-to-text classes of transformers, "
        f"{sum(name in reduced for name in CLASSES)} are reduced: before the language model "
        "(before layer 0) and inside it",
        "(after any layer but the last). `tower`: tokens are also merged inside the vision tower. "
        "`attention`: what reducers",
        'can read of the tower: what patches receive (`saliency="received"`), and what [CLS] '
        "attends to. Which reducer works",
        "on which family: [compatibility.md](compatibility.md). Videos and audio are left as they "
        "are.",
        "",
        "| class | family | tower | attention |",
        "|---|---|---|---|",
    ]
    for name in CLASSES:
        if name in reduced:
            lines.append(f"| {name} | " + " | ".join(reduced[name]) + " |")
    lines += ["", *(f"{name}: {note}." for name, note in NOTES.items())]
    lines += [
        "",
        "The others are refused by `pumer.apply`, with the reason:",
        "",
        "| class | why |",
        "|---|---|",
    ]
    lines += [f"| {name} | {REFUSED[name]} |" for name in CLASSES if name in REFUSED]
    lines += [
        "",
        "## Retrieval of pages",
        "",
        f"Of the {len(RETRIEVERS)} classes that make several vectors of a page, "
        f"{sum(name in reduced for name in RETRIEVERS)} are reduced, in the same places; the "
        "output has a vector for every",
        "token left, and a mask ([retrieval.md](retrieval.md)).",
        "",
        "| class | family | tower | attention |",
        "|---|---|---|---|",
        *(
            f"| {name} | " + " | ".join(reduced[name]) + " |"
            for name in RETRIEVERS
            if name in reduced
        ),
        "",
        *(f"Refused: {name}. {REFUSED[name]}" for name in RETRIEVERS if name in REFUSED),
        "",
        "## Control",
        "",
        "PI0 is among the classes at the top: the cameras' images are reduced before and inside "
        "PaliGemma, and the layers of its",
        "expert attend to the tokens that are left in theirs.",
    ]
    lines += [
        "",
        "Of a model that is not here, [add-a-model.md](add-a-model.md) says what a family needs.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    DOCUMENT.write_text(table(), encoding="utf-8")
