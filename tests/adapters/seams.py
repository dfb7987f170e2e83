"""At which seams of a model a reducer acts, and what it reads there, by its traits: the first table
of docs/compatibility.md, which `test_seams.py` holds to what models do."""

from __future__ import annotations

from pumer.reducers import EMBEDDINGS, Reducer
from pumer.reducers.base import ModelShape

DEPTH = 4
ENCODER = ModelShape(DEPTH, last=DEPTH - 1)
DECODER = ModelShape(DEPTH, last=DEPTH - 2, proportional=False, encoder=True)
READS = {
    "class_attention_BN": "[CLS] or received",
    "last_class_attention_BN": "[CLS] or received",
    "received_BN": "received",
    "middle_received_BN": "received",
    "last_keys_BNC": "keys",
    "keys_BNC": "keys",
    "features_BND": "features",
}
YES, NO = "yes", "–"


def joint_encoder(reducer: Reducer) -> str:
    """Inside the layers of ViLT and METER."""
    traits = reducer.resolve(ENCODER).traits
    return NO if traits.needs_encoder or traits.needs_input or traits.vision_reducer else YES


def vision_tower(reducer: Reducer) -> str:
    """Inside a CLIP tower, where `Compose` puts it."""
    return YES if reducer.traits.vision_reducer else NO


def before(reducer: Reducer) -> str:
    """Before the first layer of a language model: what it reads of the vision tower."""
    reducer = reducer.resolve(DECODER)
    if not reducer.reduces_at(EMBEDDINGS):
        return NO
    read = dict.fromkeys(READS[name] for name in READS if name in reducer.traits.needs_encoder)
    return ", ".join(read) or YES


def inside(reducer: Reducer) -> str:
    """After layers of a language model: what it reads of the layer."""
    reducer = reducer.resolve(DECODER)
    traits = reducer.traits
    if traits.learned is not None or traits.proportional_attention or traits.needs_attention:
        return NO
    if not any(reducer.reduces_at(layer) for layer in range(DEPTH)):
        return NO
    return "queries, keys" if traits.needs_qk else "states"


def inside_flash(reducer: Reducer) -> str:
    """The same under flash attention: queries and keys are captured on their way to any kernel."""
    return inside(reducer)


SEAMS = {
    "joint encoder": joint_encoder,
    "vision tower": vision_tower,
    "before the language model": before,
    "inside it, eager or SDPA": inside,
    "inside it, flash": inside_flash,
}


def table(reducers: dict[str, Reducer]) -> list[str]:
    """The lines of the table."""
    lines = ["| | " + " | ".join(SEAMS) + " |", "|---" * (len(SEAMS) + 1) + "|"]
    for name, reducer in reducers.items():
        lines.append(f"| {name} | " + " | ".join(of(reducer) for of in SEAMS.values()) + " |")
    return lines
