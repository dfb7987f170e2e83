"""Which image-text-to-text models of transformers are reduced, and where: docs/models.md.

`python tests/adapters/models_document.py` writes it; `decoder/test_models_document.py` holds it
to the truth.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import tiny_cross
import tiny_joint
import tiny_llm
import tiny_pi0
import tiny_resamplers  # noqa: F401  # each registers its families
import tiny_retrieval
import tiny_streams
import tiny_writers  # noqa: F401
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from pumer.adapters import find
from pumer.adapters.base import adapters
from pumer.adapters.decoder.refused import REFUSED
from pumer.adapters.decoder.shorten import SELECTS, STATES
from pumer.adapters.encoder import refused as joint

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"
CLASSES = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()), key=str.lower)
RETRIEVERS = sorted(name for name in dir(transformers) if name.endswith("ForRetrieval"))
"""Classes that make several vectors of a page, for late interaction."""
NOTES = {
    "Llama4ForConditionalGeneration": "transformers 5.24.0 fails on it, reduced or not "
    "(`image_outputs`)",
}
YES, NO = "yes", "–"
JOINT = {
    "ViLT": "its layers",
    "METER": "its fusion layers, and its vision tower",
    "BridgeTower": "its cross-modal layers, and its image tower's layers below them",
}
"""Where joint encoders are reduced."""
BRIDGES = (
    "BridgeTower's bridges add both towers' states to those of the cross-modal layers, token by "
    "token. A token that was dropped there gets nothing more; one that was merged gets the average "
    "of its members' states, weighted as they were. The towers keep all tokens above the first "
    "bridge, so that merging inside the image tower happens below it: in layers 0 to 6 of the 12 "
    "of BridgeTower-base. A reduced model returns no attention maps, and hidden states in the "
    "original length, from classes with a pooled output only if asked for."
)
OTHERS = (tiny_streams.diffusion_gemma, tiny_pi0.model)
"""Builders of models that do not go through the matrix, but tests of their own."""
STRUCTURE = (
    (
        "[CLS]",
        "placeholders, where all features of the tower are handed on",
        "LLaVA 1.5 with `full` features",
    ),
    (
        "ends of rows",
        "placeholders",
        "LLaVA-NeXT, LLaVA-OneVision, Granite 4 Vision, Hunyuan-VL, Emu3",
    ),
    ("ends of rows", "tokens of the prompt", "Pixtral, Mistral 3, Fuyu, Apertus 1.5, Molmo 2"),
    ("separator behind the views", "a placeholder", "DeepSeek-OCR 2"),
    (
        "labels, borders and line breaks between crops",
        "tokens of the prompt",
        "SmolVLM, Idefics3, Granite Docling, Aya Vision, Llama 4, Ovis 2, Step 3.7",
    ),
    ("begin and end of an image", "tokens of the prompt", "most"),
)
"""What marks an image, as what it comes in the prompt, and where."""


REASONS = {STATES: "states", SELECTS: "index"}


def reduced_classes() -> dict[str, list[tuple[str, str, str, str]]]:
    """Of every class that has a tiny model: its families, where it is reduced, whether tokens
    are merged inside the vision tower, and what can be read of the tower's attention."""
    result: dict[str, list[tuple[str, str, str, str]]] = {}
    builders = [*(partial(tiny_llm.model, name) for name in tiny_llm.FAMILIES), *OTHERS]
    builders += [partial(tiny_retrieval.model, name) for name in tiny_retrieval.RETRIEVERS]
    for build in builders:
        model = build()
        adapter = find(model)
        tower = YES if adapter.tower_depth(model) else NO
        reason = adapter.before_only(model)
        where = "before, inside" if reason is None else f"before ({REASONS[reason]})"
        rows = result.setdefault(type(model).__name__, [])
        row = adapter.family, where, tower, _attention(adapter, model)
        rows += [] if row in rows else [row]
    return result


def joint_encoders() -> list[str]:
    """What becomes of encoders of text and image."""
    served = [adapter for adapter in adapters() if adapter.family in JOINT]
    lines = ["", "## Joint encoders", "", "| family | classes | reduced in |", "|---|---|---|"]
    for adapter in sorted(served, key=lambda adapter: list(JOINT).index(adapter.family)):
        classes = ", ".join(sorted(adapter.classes))
        lines.append(f"| {adapter.family} | {classes} | {JOINT[adapter.family]} |")
    lines += ["", BRIDGES, ""]
    reasons = {reason: [] for reason in joint.REFUSED.values()}
    for name, reason in joint.REFUSED.items():
        reasons[reason].append(name)
    return lines + [f"Refused: {', '.join(names)}. {reason}" for reason, names in reasons.items()]


def crossing_classes() -> dict[str, tuple[str, str, str]]:
    """Of every class that reads images by cross-attention: its family, where it is reduced, and
    what can be read of the tower's attention."""
    result = {}
    for families, where in (
        (tiny_cross.FAMILIES, "vision side"),
        (tiny_joint.FAMILIES, "encoder: before, inside"),
    ):
        for name in families:
            model = tiny_cross.model(name, families)
            adapter = find(model)
            result[type(model).__name__] = adapter.family, where, _attention(adapter, model)
    return result


def _attention(adapter, model) -> str:
    if not adapter.reads_tower:
        return NO
    return "received, [CLS]" if adapter.has_class_token(model) else "received"


def table() -> str:
    """The document."""
    reduced, crossing = reduced_classes(), crossing_classes()
    count = sum(name in reduced or name in crossing for name in CLASSES)
    lines = [
        "# Models",
        "",
        "Written by `PYTHONPATH=tests/models:tests/adapters python "
        "tests/adapters/models_document.py` and held true by a test.",
        "",
        f"Of the {len(CLASSES)} image-text-to-text classes of transformers, "
        f"{count} are reduced. The first table has those "
        "with image tokens among the words: they are reduced before the language model "
        "(before layer 0) and, nearly all, inside it",
        "(after any layer but the last). `tower`: tokens are also merged inside the vision tower. "
        "`attention`: what reducers",
        'can read of the tower: what patches receive (`saliency="received"`), and what [CLS] '
        "attends to. Which reducer works",
        "on which family: [compatibility.md](compatibility.md). Videos and audio are left as they "
        "are.",
        "",
        "| class | family | reduced | tower | attention |",
        "|---|---|---|---|---|",
    ]
    for name in CLASSES:
        lines += [f"| {name} | " + " | ".join(row) + " |" for row in reduced.get(name, ())]
    lines += ["", *(f"{name}: {note}." for name, note in NOTES.items())]
    lines += [
        "",
        "`before` alone: the prompt gets shorter before the language model, which then runs as it "
        "is. Kept tokens keep",
        "their positions; sliding windows, indices of keys and Inkling's distances count the "
        "tokens that are left. The cache",
        "holds these, and reports the length of the whole prompt. Reducers inside are refused with "
        "the reason:",
        "",
        *(f"* {word}: {reason}" for reason, word in REASONS.items()),
        "",
        "FLOPs: of experts those that a token goes through; states (linear attention, Mamba) step "
        "by step, so that what",
        "kernels spend on chunks of tokens is not in them, nor hyper-connections; short "
        "convolutions as they are; attention",
        "over all pairs of tokens, also where an index chooses among them. The cache is that of "
        "keys and values: states have",
        "one size, whatever the prompt.",
        "",
        "## Cross-attention",
        "",
        "These read images by cross-attention. `vision side`: tokens are chosen once, behind the "
        "vision tower and before a Q-former,",
        "a resampler or the text reads them; methods that are guided by words, or act inside a "
        "language model, are refused.",
        "`encoder`: words and image tokens go through an encoder, which is reduced as a language "
        "model is; its decoder reads what is left.",
        "",
        "| class | family | where | attention |",
        "|---|---|---|---|",
    ]
    for name in sorted(crossing, key=str.lower):
        lines.append(f"| {name} | " + " | ".join(crossing[name]) + " |")
    lines += [
        "",
        "## Structure tokens",
        "",
        "What marks an image, its rows, views and crops is never a candidate: it is not pruned, "
        "not merged and no text of the",
        "question, and the text goes on attending to it.",
        "",
        "| structure | in the prompt | families |",
        "|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in STRUCTURE),
        "",
        "Whatever stands between two placeholders of one image is structure in every family. "
        "Thumbnails and crops are patches,",
        "and candidates: an image has one budget for all of them, unless the method is published "
        "with a budget for each crop. A",
        "size that the prompt gives in words (Emu3, Apertus 1.5) is text.",
        "",
        "## Not reduced",
        "",
        "The others are refused by `pumer.apply`, with the reason:",
        "",
        "| class | why |",
        "|---|---|",
    ]
    lines += [f"| {name} | {REFUSED[name]} |" for name in CLASSES if name in REFUSED]
    lines += joint_encoders()
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
            f"| {name} | " + " | ".join(row) + " |"
            for name in RETRIEVERS
            for row in reduced.get(name, ())
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
