"""Settings by name: the paper's, per model and task (Cao et al., 2023, released configurations)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pumer._yaml import read_yaml
from pumer.reducers import Compose, PuMer, Reducer, ToMe, from_dict

SHIPPED = Path(__file__).parent / "assets"
"""Folder of what comes with the package: small trained models, sample photographs."""

_FILES = (".yaml", ".yml", ".json")

PRESETS: dict[str, Reducer] = {
    "vilt-vqav2": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 5, 8)),
    "vilt-nlvr2": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 5, 8)),
    "vilt-snli-ve": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 4, 6, 8)),
    "vilt-retrieval": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 4, 6, 8)),
    # The published METER settings count two to a fusion layer: 0,2,4,6 are fusion layers 0 to 3.
    "meter-vqav2": PuMer(prune=0.2, merge=0.2, merge_text=0.2, layers=(0, 1, 2, 3)),
    "meter-nlvr2": PuMer(prune=0.3, merge=0.5, merge_text=0.2, layers=(1, 2, 3)),
    "meter-snli-ve": PuMer(prune=0.3, merge=0.5, merge_text=0.2, layers=(0, 1, 2, 3)),
    # No retrieval checkpoint of METER was released: the settings of its other two hard tasks.
    "meter-retrieval": PuMer(prune=0.3, merge=0.5, merge_text=0.2, layers=(0, 1, 2, 3)),
}
# Beyond the paper: the CLIP tower, more than half of METER's cost, is reduced too. 2.2 times fewer MACs at 384 pixels.
PRESETS["meter-vqav2-tower"] = Compose(tower=ToMe(r=36, depth=11), inside=PRESETS["meter-vqav2"])


def preset(name: str) -> Reducer:
    """The reducer of that name, or in a YAML or JSON file; raises ValueError listing the known names."""
    if name.endswith(_FILES):
        return _read_file(Path(name))
    if name not in PRESETS:
        raise ValueError(
            f"no preset is named {name!r}; there are {', '.join(PRESETS)}, and files ending in {', '.join(_FILES)}"
        )
    return PRESETS[name]


def read_reducer(settings: str | dict[str, Any] | Reducer) -> Reducer:
    """A reducer from a preset's or a reducer's name, a file, or from `{"reducer": name, setting: value, ...}`."""
    if isinstance(settings, Reducer):
        return settings
    if isinstance(settings, dict):
        return from_dict(settings)
    if settings in PRESETS or settings.endswith(_FILES):
        return preset(settings)
    return from_dict({"reducer": settings})


def _read_file(file: Path) -> Reducer:
    try:
        settings = read_yaml(file.read_text(encoding="utf-8"))  # JSON is YAML too
        return from_dict(settings)
    except OSError:
        raise ValueError(f"there is no preset file {file}") from None
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no reducer, which has `reducer: NAME` and its settings: {error}") from error


def model_folder(model: str | Path) -> Path:
    """The folder of a model: a path, or the name of a shipped one; raises ValueError if there is neither."""
    for folder in (Path(model), SHIPPED / model):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"{model} is no model folder; shipped models are {', '.join(shipped_models())}")


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
