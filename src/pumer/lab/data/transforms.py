"""A model's image transform, saved beside its weights.

It is stored in `preprocessor_config.json` under a separate key, beside the settings of
transformers' processor.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from PIL.Image import Resampling

from pumer._settings import check_settings
from pumer._suggest import did_you_mean
from pumer.hub.files import read_json
from pumer.lab.data.images import CLIP_MEAN, CLIP_STD, Crop, KeepAspect, Square
from pumer.lab.data.stock_images import Stock, read_processor

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "Crop",
    "Stock",
    "Transform",
    "build_transform",
    "clip_square",
    "has_transform",
    "load_transform",
    "save_transform",
]

_KEY = "pumer_transform"
_FILE = "preprocessor_config.json"
_HINT = (
    "save its processor there too, or pumer.lab.data.transforms.save_transform(transform, folder)"
)
_REQUIRED = ("size", "shorter")

Transform = Square | Crop | KeepAspect | Stock
_KINDS: dict[str, Any] = {"square": Square, "crop": Crop, "keep_aspect": KeepAspect}


def clip_square(size: int) -> Square:
    """The transform of PuMer's METER models."""
    return Square(size, Resampling.BICUBIC, CLIP_MEAN, CLIP_STD)


def build_transform(settings: dict[str, Any]) -> Transform:
    """Build a transform from `kind` (square, crop or keep_aspect) and its fields.

    Raises ValueError for unknown kinds and fields, and for values of a wrong type.

    >>> build_transform({"kind": "square", "size": 96}).size
    96
    """
    values = dict(settings)
    transform_name = values.pop("kind", None)
    if transform_name not in _KINDS:
        hint = did_you_mean(str(transform_name), _KINDS)
        raise ValueError(
            f"an image transform is of kind {' or '.join(_KINDS)}, not {transform_name!r}.{hint}"
        )
    field_names = [field.name for field in dataclasses.fields(_KINDS[transform_name])]
    unknown = sorted(set(values) - set(field_names))
    if unknown:
        hint = did_you_mean(unknown[0], field_names)
        raise ValueError(
            f"{transform_name} has no setting {', '.join(unknown)}.{hint} It has "
            f"{', '.join(field_names)}"
        )
    missing = [name for name in _REQUIRED if name in field_names and name not in values]
    if missing:
        raise ValueError(f"{transform_name} needs {missing[0]}, in pixels, for example 384")
    transform: Transform = _KINDS[transform_name](
        **check_settings(_KINDS[transform_name], values, f"image transform {transform_name}")
    )
    return transform


def save_transform(transform: Transform, directory: str | Path) -> None:
    """Write the transform beside a model, so that AutoImageProcessor reproduces its pixels.

    Where no processor of transformers can, loading fails instead of giving other pixels: for
    `KeepAspect` with `longer` set, for images so thin that ViLT's processor drops a side, and for
    `Crop` unless pumer.models.meter is imported.
    """
    if isinstance(transform, Stock):
        config = transform.settings
    else:
        transform_name = next(name for name, cls in _KINDS.items() if isinstance(transform, cls))
        config = {
            **_stock_settings(transform),
            "resample": int(transform.resample),
            "image_mean": list(transform.mean),
            "image_std": list(transform.std),
            _KEY: {"kind": transform_name, **dataclasses.asdict(transform)},
        }
    Path(directory, _FILE).write_text(json.dumps(config, indent=2) + "\n")


def _stock_settings(transform: Square | Crop | KeepAspect) -> dict[str, Any]:
    if isinstance(transform, KeepAspect):
        usual = transform.limit == dataclasses.replace(transform, longer=None).limit
        return {
            "image_processor_type": "ViltImageProcessor",
            "do_resize": True,
            # ViLT's processor derives the longer side itself, and fails without "shortest_edge".
            "size": {"shortest_edge": transform.shorter}
            if usual
            else {"longest_edge": transform.limit},
            "size_divisor": transform.multiple,
            "do_pad": True,
        }
    return {
        "image_processor_type": "MeterImageProcessor"
        if isinstance(transform, Crop)
        else "CLIPImageProcessor",
        "do_resize": True,
        "size": {"height": transform.size, "width": transform.size},
        "do_center_crop": False,
    }


def load_transform(directory: str | Path) -> Transform:
    """The transform beside a model: ours, or that of transformers' image processor.

    Raises ValueError if there is none, and see `read_processor`.
    """
    config = _image_settings(Path(directory))
    return build_transform(config[_KEY]) if _KEY in config else read_processor(directory, config)


def has_transform(directory: str | Path) -> bool:
    """Whether a transform of ours was saved there."""
    path = Path(directory) / _FILE
    return path.is_file() and _KEY in read_json(path, _HINT)


def _image_settings(directory: Path) -> dict[str, Any]:
    """What the image processor's file holds; if ours is not there, first that of a whole processor,
    as transformers has it."""
    saved = read_json(directory / _FILE, _HINT) if (directory / _FILE).is_file() else {}
    if _KEY in saved:
        return saved
    if (path := directory / "processor_config.json").is_file():
        nested = read_json(path, _HINT).get("image_processor")
        if isinstance(nested, dict):
            return nested
    if not saved:
        raise ValueError(
            f"{directory} has no {_FILE}, which says how the model takes its images: {_HINT}"
        )
    return saved
