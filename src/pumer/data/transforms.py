"""A model's image transform, kept beside its weights.

It goes into `preprocessor_config.json` under a key of its own, next to what transformers' processors of ViLT and METER
read there, so that either finds what it needs.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from PIL.Image import Image, Resampling
from torch import Tensor

from pumer.data.images import KeepAspect, Square

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_KEY = "pumer_transform"


@dataclasses.dataclass(frozen=True)
class Crop:
    """Resize the shorter side to `size` keeping the aspect ratio, and cut out the middle square: METER's own transform.

    It is CLIP's. An RGB image gives float32 [3, size, size]: values scaled to 0..1, minus `mean`, divided by `std`.
    Raises ValueError for a size below 1.
    """

    size: int
    resample: Resampling = Resampling.BICUBIC
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD

    def __post_init__(self) -> None:
        self._square()

    def __call__(self, image: Image) -> Tensor:
        shorter = min(image.size)
        width, height = (self.size * side // shorter for side in image.size)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        resized = image.resize((width, height), self.resample)
        return self._square()(resized.crop((left, top, left + self.size, top + self.size)))

    def _square(self) -> Square:
        return Square(self.size, self.resample, self.mean, self.std)


Transform = Square | Crop | KeepAspect
_KINDS: dict[str, Any] = {"square": Square, "crop": Crop, "keep_aspect": KeepAspect}


def clip_square(size: int) -> Square:
    """The transform of PuMer's METER models."""
    return Square(size, Resampling.BICUBIC, CLIP_MEAN, CLIP_STD)


def build_transform(settings: dict[str, Any]) -> Transform:
    """The transform that settings describe: `kind` (square, crop or keep_aspect) and its fields.

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
    transform: Transform = _KINDS[kind](
        **{name: tuple(value) if isinstance(value, list) else value for name, value in rest.items()}
    )
    return transform


def save_transform(transform: Transform, directory: str | Path) -> None:
    """Write the transform beside a model."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(transform, cls))
    settings = {"kind": kind, **dataclasses.asdict(transform)}
    config = {
        **(_clip_settings(transform) if transform.mean == CLIP_MEAN else _vilt_settings(transform)),
        "image_mean": list(transform.mean),
        "image_std": list(transform.std),
        _KEY: settings,
    }
    Path(directory, "preprocessor_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _vilt_settings(transform: Transform) -> dict[str, Any]:
    if isinstance(transform, KeepAspect):
        shorter, multiple = transform.shorter, transform.multiple
    else:
        shorter, multiple = transform.size, 32
    return {
        "image_processor_type": "ViltImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": shorter},
        "size_divisor": multiple,
        "do_pad": True,
    }


def _clip_settings(transform: Transform) -> dict[str, Any]:
    if isinstance(transform, KeepAspect):
        raise ValueError("no processor of transformers keeps the aspect ratio and has CLIP's mean: take square or crop")
    square = {"height": transform.size, "width": transform.size}
    crops = isinstance(transform, Crop)
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": transform.size} if crops else square,
        "do_center_crop": crops,
        "crop_size": square,
        "resample": int(transform.resample),
    }


def load_transform(directory: str | Path) -> Transform:
    """The transform beside a model: ours, or the one that transformers' processor of ViLT or CLIP would do.

    Raises ValueError where there is none, or one that CLIP's processor does and we do not.
    """
    config = _image_settings(Path(directory))
    if _KEY in config:
        return build_transform(config[_KEY])
    kind = config.get("image_processor_type") or config.get("feature_extractor_type") or ""
    if kind.startswith("CLIP"):
        return _of_clip(config, directory)
    return KeepAspect(shorter=config["size"]["shortest_edge"], multiple=config.get("size_divisor", 32))


def has_transform(directory: str | Path) -> bool:
    """Whether `save_transform` wrote a transform there."""
    path = Path(directory) / "preprocessor_config.json"
    return path.is_file() and _KEY in json.loads(path.read_text())


def _image_settings(directory: Path) -> dict[str, Any]:
    """What `preprocessor_config.json` holds, or a processor's own file, into which newer transformers write it."""
    if (path := directory / "preprocessor_config.json").is_file():
        settings: dict[str, Any] = json.loads(path.read_text())
        return settings
    if (path := directory / "processor_config.json").is_file():
        settings = json.loads(path.read_text())
        if "image_processor" in settings:
            return dict(settings["image_processor"])
    raise ValueError(
        f"{directory} has no preprocessor_config.json, which says how the model takes its images: save its processor "
        "there too, or pumer.data.transforms.save_transform(transform, folder)"
    )


def _of_clip(config: dict[str, Any], directory: str | Path) -> Square | Crop:
    size = config.get("size", 224)
    size = {"shortest_edge": size} if isinstance(size, int) else size
    side: Any = size.get("shortest_edge", size.get("height"))
    crop = config.get("crop_size", side)
    crops = config.get("do_center_crop", True)
    cut = crop if isinstance(crop, dict) else {"height": crop, "width": crop}
    odd = size.get("width", side) != side or (crops and cut != {"height": side, "width": side})
    if odd or not config.get("do_resize", True):
        raise ValueError(
            f"{directory} resizes pictures to {size} and cuts {crop} out; only equal squares are supported"
        )
    resample = Resampling(config.get("resample", Resampling.BICUBIC))
    mean, std = tuple(config.get("image_mean", CLIP_MEAN)), tuple(config.get("image_std", CLIP_STD))
    kind = Crop if "shortest_edge" in size else Square
    if kind is Crop and not crops:
        raise ValueError(f"{directory} keeps the pictures' aspect ratio, which the model cannot take: cut a square out")
    return kind(side, resample, mean, std)
