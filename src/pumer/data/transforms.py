"""A model's image transform, kept beside its weights.

It goes into `preprocessor_config.json` under a key of its own, next to what transformers' ViLT processor reads there,
so that either finds what it needs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from PIL.Image import Resampling

from pumer.data.images import KeepAspect, Square

_KEY = "pumer_transform"
_KINDS: dict[str, Any] = {"square": Square, "keep_aspect": KeepAspect}


def build_transform(settings: dict[str, Any]) -> Square | KeepAspect:
    """The transform that settings describe: `kind` (square or keep_aspect) and its fields.

    Raises ValueError for unknown kinds and fields.
    """
    rest = dict(settings)
    kind = rest.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"an image transform is of kind {' or '.join(_KINDS)}, not {kind!r}")
    known = [field.name for field in dataclasses.fields(_KINDS[kind])]
    unknown = sorted(set(rest) - set(known))
    if unknown:
        raise ValueError(f"{kind} has no setting {', '.join(unknown)}; it has {', '.join(known)}")
    if "resample" in rest:
        rest["resample"] = Resampling(rest["resample"])
    transform: Square | KeepAspect = _KINDS[kind](
        **{name: tuple(value) if isinstance(value, list) else value for name, value in rest.items()}
    )
    return transform


def save_transform(transform: Square | KeepAspect, directory: str | Path) -> None:
    """Write the transform beside a model."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(transform, cls))
    settings = {"kind": kind, **dataclasses.asdict(transform)}
    shorter = settings.get("shorter", settings.get("size"))
    config = {
        "image_processor_type": "ViltImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": shorter},
        "size_divisor": settings.get("multiple", 32),
        "image_mean": list(settings["mean"]),
        "image_std": list(settings["std"]),
        "do_pad": True,
        _KEY: settings,
    }
    Path(directory, "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_transform(directory: str | Path) -> Square | KeepAspect:
    """The transform beside a model: ours, or the one that transformers' ViLT processor would do.

    Raises ValueError where there is none.
    """
    path = Path(directory, "preprocessor_config.json")
    if not path.is_file():
        raise ValueError(f"{directory} has no preprocessor_config.json; say which image transform the model takes")
    config = json.loads(path.read_text())
    if _KEY in config:
        return build_transform(config[_KEY])
    return KeepAspect(shorter=config["size"]["shortest_edge"], multiple=config.get("size_divisor", 32))
