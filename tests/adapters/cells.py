"""Every reducer with settings for tiny decoders, and whether it works on a family.

`python tests/adapters/cells.py` writes the table, docs/compatibility.md; `test_compatibility.py`
holds it to the truth.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import seams
import tiny
import tiny_cross
import tiny_joint
import tiny_llm
import tiny_resamplers  # noqa: F401  # registers its families
import torch

import pumer
from pumer.reducers import Reducer

DOCUMENT = Path(__file__).parents[2] / "docs" / "compatibility.md"
PRUNING: dict[str, Reducer] = {
    "PuMer, pruning alone": pumer.PuMer(prune=0.4, merge=0, merge_text=0, layers=(0, 1)),
    "FastV": pumer.FastV(keep=0.5, layer=1),
    "PyramidDrop": pumer.PyramidDrop(keep=(0.6, 0.3), layers=(0, 1)),
    "V2Drop": pumer.V2Drop(keep=(0.6, 0.5), layers=(0, 1)),
    "DART": pumer.DART(keep=0.5, pivots=(1, 1), layer=1),
    "FoPru": pumer.FoPru(keep=0.5),
    "FoPru, rows": pumer.FoPru(keep=0.5, strategy="row"),
    "SVD-Prune": pumer.SVDPrune(keep=0.5),
    "E-AdaPrune (budget) with DivPrune": pumer.Energy(tau=0.9, least=0.2, most=0.8),
    "FasterVLM": pumer.FasterVLM(keep=0.5),
    "VisPruner": pumer.VisPruner(keep=0.5),
    "DivPrune": pumer.DivPrune(keep=0.5),
    "CDPruner": pumer.CDPruner(keep=0.5),
    "MMTok": pumer.MMTok(keep=0.5),
    "HiPrune": pumer.HiPrune(keep=0.5, alpha=0.5),
    "HoloV": pumer.HoloV(keep=0.5, chunks=2),
    "SCOPE": pumer.SCOPE(keep=0.5),
    "random": pumer.Random(prune=0.4, layers=(-1, 1)),
    "uniform": pumer.Uniform(prune=0.4, layers=(0, 2)),
    "no vision": pumer.NoVision(),
    "VTW": pumer.VTW(layer=1),
}
"""Those that only drop tokens."""
REDUCERS: dict[str, Reducer] = {
    "PuMer": pumer.PuMer(prune=0.2, merge=0.3, merge_text=0.2, layers=(0, 1)),
    "ToMe": pumer.ToMe(r=2, depth=2, proportional=False),
    "ToMe, proportional": pumer.ToMe(r=2, depth=2, proportional=True),
    "DyMU (merging thresholds)": pumer.DyMU(thresholds=(0.5, 0.5)),
    "ToMe in the vision tower": pumer.Compose(pumer.ToMe(r=2, depth=1), pumer.Unreduced()),
    "DyMU in the vision tower": pumer.Compose(pumer.DyMU(thresholds=(0.5,)), pumer.Unreduced()),
    "DynamicViT": pumer.DynamicViT(keep=0.6, layers=(0, 1)),
    "SmartTrim": pumer.SmartTrim(layers=(0, 1)),
    **PRUNING,
    "SparseVLM": pumer.SparseVLM(keep=(0.6, 0.3), layers=(0, 1)),
    "VisionZip": pumer.VisionZip(keep=0.5),
    "PruMerge+": pumer.PruMerge(keep=0.5),
    "pooling": pumer.Pool(window=2),
}
CROSSING = {
    "mllama": tiny_cross.FAMILIES,
    "blip2": tiny_cross.FAMILIES,
    "florence2": tiny_joint.FAMILIES,
}
"""Of those that read images by cross-attention one for each way of doing so."""
FAMILIES = (*tiny.FAMILIES, *tiny_llm.BUILDERS, *CROSSING)
WORKS, RECEIVED, REFUSED = "yes", "received", "–"


def made(family: str) -> torch.nn.Module:
    """The tiny model of a family."""
    if family in CROSSING:
        return tiny_cross.model(family, CROSSING[family])
    return tiny.model(tiny.FAMILIES[family]) if family in tiny.FAMILIES else tiny_llm.model(family)


def batch(family: str) -> dict:
    """Two samples with texts and pictures of different sizes where the family has them."""
    if family in tiny.FAMILIES:
        return tiny.batch(tiny.FAMILIES[family])
    if family in CROSSING:
        return tiny_cross.batch(family, (0, 1), CROSSING[family])
    return tiny_llm.batch(family, ((4, "i", 6), (2, "i", 3, "i", 2)))


def fitting(
    model: torch.nn.Module, reducer: Reducer, inputs: dict
) -> tuple[Reducer | None, str, str]:
    """(reducer as the model takes it, what to say of it, why not)."""
    tries = [(reducer, WORKS)]
    selector = getattr(reducer, "selector", reducer)
    if getattr(selector, "saliency", None) == "class":
        tries.append((dataclasses.replace(reducer, saliency="received"), RECEIVED))
    reason = ""
    for one, word in tries:
        try:
            with pumer.reduced(model, one), torch.no_grad():
                model(**inputs)
        except ValueError as error:
            reason = reason or str(error)
        else:
            return one, word, ""
    return None, REFUSED, reason


def table() -> str:
    """The document."""
    families = FAMILIES
    models = {family: made(family) for family in families}
    kinds = [type(model).__name__ for model in models.values()]
    heads = [
        kind.removesuffix("ForConditionalGeneration").removesuffix("ForQuestionAnswering")
        for kind in kinds
    ]
    lines = [
        "# Which reducer works on which model",
        "",
        "Written by `PYTHONPATH=tests/models:tests/adapters python tests/adapters/cells.py`, and",
        "compared with what the code does by `tests/adapters/test_compatibility.py` and "
        "`tests/adapters/test_seams.py`.",
        "",
        "## By the seam where it acts",
        "",
        "A reducer knows tensors, and no model: what it needs decides where it can act, in every "
        "family that has the seam.",
        "Methods with `layers` act where these say; -1 is before the language model.",
        "",
        "* joint encoder: inside the layers of ViLT and METER;",
        "* vision tower: inside a CLIP tower (LLaVA 1.5, Video-LLaVA, METER), put there by "
        "`Compose`;",
        "* before the language model: image by image; the cell says what is read of the vision "
        "tower: what [CLS] attends to,",
        '  or with `saliency="received"` what patches receive; what goes into the projector '
        "(features); keys. [models.md](models.md) says",
        "  which families have these;",
        "* inside it: after a layer; the cell says what is read of that. Queries and keys are "
        "captured on their way to any kernel,",
        "  and the layer keeps its own. Sliding windows under flash attention are refused.",
        "",
        *seams.table(REDUCERS),
        "",
        "## By family",
        "",
        "Families that go through every test; what the others do with a reducer follows from the "
        "seams.",
        "",
        f"`{WORKS}`: it runs, and the tests of its kind hold: of those that only drop tokens, "
        "that dropping equals",
        "masking in the stock model, token for token in what is generated.",
        f'`{RECEIVED}`: the vision tower has no [CLS]; give `saliency="received"`.',
        f"`{REFUSED}`: refused with an error that says why, by `pumer.apply` or, where only the "
        "picture tells, by the",
        "call (rows of a picture that is put together of crops).",
        "Mllama stands for models whose text reads patches by cross-attention, Blip2 for "
        "Q-formers and resamplers, Florence2 for",
        "encoder-decoders; random and uniform pruning act there with `layers=(-1,)`.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---" * (len(families) + 1) + "|",
    ]
    for name, reducer in REDUCERS.items():
        words = [fitting(models[family], reducer, batch(family))[1] for family in families]
        lines.append(f"| {name} | " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table()) if sys.argv[1:] == ["--show"] else DOCUMENT.write_text(
        table(), encoding="utf-8"
    )
