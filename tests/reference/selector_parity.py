"""Outputs of published token-reduction code: where they lie, and how one case is read.

Each of the modules `parity_*.py` has `RUNNERS`: a function of one `Case` for every method, which
computes what ours does and raises AssertionError where that is not what the published code did.
`test_parity_selectors.py` runs all of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

COMMITTED = Path(__file__).parents[1] / "data" / "parity-selectors"
WHOLE = Path(__file__).parents[3] / "shared" / "parity-selectors"


@dataclass(frozen=True)
class Case:
    """Inputs, settings and outputs of one run of published code.

    Args:
        method: name of the files.
        name: of the case.
        settings: as the published code was given them.
        raises: name of the exception that the published code raises on these inputs; None for none.
        inputs, outputs: tensors by their names in the file, less `CASE.in.` and `CASE.out.`.
    """

    method: str
    name: str
    settings: dict[str, Any]
    raises: str | None
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


def folder() -> Path:
    """Where the cases are: all of them where the shared folder is, else those that are
    committed."""
    return WHOLE if WHOLE.is_dir() else COMMITTED


def names(method: str) -> list[str]:
    """The cases of a method; none where its files are not there."""
    path = folder() / f"{method}.json"
    return list(json.loads(path.read_text())["cases"]) if path.is_file() else []


def load(method: str, name: str) -> Case:
    """One case."""
    about = json.loads((folder() / f"{method}.json").read_text())["cases"][name]
    tensors = load_file(folder() / f"{method}.safetensors")

    def of(side: str) -> dict[str, Tensor]:
        start = f"{name}.{side}."
        return {
            key.removeprefix(start): value
            for key, value in tensors.items()
            if key.startswith(start)
        }

    return Case(method, name, about["settings"], about.get("raises"), of("in"), of("out"))
