"""Presets: the paper's settings per model and task (Cao et al., 2023, released configurations)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pumer._shipped import model_folder, shipped_models
from pumer._suggest import did_you_mean
from pumer._yaml import load_yaml
from pumer.reducers import (
    Compose,
    PuMer,
    Reducer,
    ToMe,
    from_dict,
    get,
    is_reducer,
    list_reducers,
    to_dict,
)

ReducerSpec = str | os.PathLike[str] | Mapping[str, Any] | type[Reducer] | Reducer
"""What `read_reducer` accepts."""

_FILES = (".yaml", ".yml", ".json")

PRESETS: dict[str, Reducer] = {
    "vilt-vqav2": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 5, 8)),
    "vilt-nlvr2": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 5, 8)),
    "vilt-snli-ve": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 4, 6, 8)),
    "vilt-retrieval": PuMer(prune=0.1, merge=0.3, merge_text=0.2, layers=(2, 4, 6, 8)),
    # Published METER settings count every fusion layer twice: 0,2,4,6 are fusion layers 0 to 3.
    "meter-vqav2": PuMer(prune=0.2, merge=0.2, merge_text=0.2, layers=(0, 1, 2, 3)),
    "meter-nlvr2": PuMer(prune=0.3, merge=0.5, merge_text=0.2, layers=(1, 2, 3)),
    "meter-snli-ve": PuMer(prune=0.3, merge=0.5, merge_text=0.2, layers=(0, 1, 2, 3)),
    # No retrieval checkpoint of METER was released: the settings of its other two hard tasks.
    "meter-retrieval": PuMer(prune=0.3, merge=0.5, merge_text=0.2, layers=(0, 1, 2, 3)),
}
"""The presets by name. Beyond the paper: `meter-vqav2-tower`, which adds ToMe in the vision
tower, and `vilt-vqav2-even` and `meter-vqav2-even`, which reduce a little in every layer."""
# Beyond the paper: the CLIP tower, more than half of METER's cost, is reduced too. 2.2 times fewer
# MACs at 384 pixels.
PRESETS["meter-vqav2-tower"] = Compose(tower=ToMe(r=36, depth=11), inside=PRESETS["meter-vqav2"])
# Beyond the paper: text whole, a tenth pruned and nine tenths merged, attention proportional to
# sizes. It was chosen on scenes-VQA (benchmarks/studies/better-pumer.yaml). 2.1 and 2.7 times fewer
# MACs at 384 pixels.
_EVEN = PuMer(merge_text=0.0, proportional=True)
PRESETS["vilt-vqav2-even"] = replace(_EVEN, prune=0.016, merge=0.144, layers=tuple(range(11)))
PRESETS["meter-vqav2-even"] = Compose(
    tower=ToMe(r=36, depth=11),
    inside=replace(_EVEN, prune=0.025, merge=0.225, layers=tuple(range(5))),
)


def read_reducer(spec: ReducerSpec) -> Reducer:
    """The reducer of a specification, as in `pumer.apply`, commands, recipes and studies.

    Args:
        spec: a reducer; its class; its name (`pumer list`); a preset's name; a YAML or JSON file of
            settings; a folder of `pumer.save`, or a shipped model's name, for its reducer; or
            `{"reducer": any of these, setting: value, ...}` to change settings.

    Raises:
        ValueError: if there is no such reducer, or it has no such setting.

    Example:
        >>> from pumer.presets import read_reducer
        >>> read_reducer({"reducer": "tome", "r": 16})
        ToMe(r=16, depth=None, proportional=None)
    """
    if isinstance(spec, Reducer):
        return spec
    if isinstance(spec, type) and issubclass(spec, Reducer):
        return from_dict({"reducer": spec.name}) if get(spec.name) is spec else spec()
    if isinstance(spec, Mapping):
        return _from_settings(spec)
    if isinstance(spec, str | os.PathLike):
        return _named(os.fspath(spec))
    raise ValueError(
        f"expected a reducer such as pumer.PuMer(), its name, or {{'reducer': name, setting: "
        f"value}}, not {spec!r}"
    )


def _from_settings(settings: Mapping[str, Any]) -> Reducer:
    if "format" in settings:  # a pumer.json
        settings = settings.get("reducer") or {}
    named = settings.get("reducer")
    if named is None:
        raise ValueError(
            f"no reducer is named for the settings {', '.join(settings)}: name it, as in "
            '{"reducer": "tome", "depth": 6} or --reducer tome --reducer.depth 6'
        )
    if isinstance(named, str) and not is_reducer(named):
        base = _named(named)
        return from_dict({**to_dict(base), **settings, "reducer": base.name})
    return from_dict(dict(settings))


def _named(name: str) -> Reducer:
    if name in PRESETS:
        return PRESETS[name]
    if is_reducer(name):
        return from_dict({"reducer": name})
    if name.endswith(_FILES):
        return _read_file(Path(name))
    try:
        folder = model_folder(name)
    except ValueError:
        names = (*PRESETS, *list_reducers(), *shipped_models())
        raise ValueError(
            f"no reducer is named {name!r}, no preset, no file and no saved "
            f"model.{did_you_mean(name, names)}\n"
            f"Reducers: {', '.join(list_reducers())}\nPresets: {', '.join(PRESETS)}\n"
            f"Files end in {', '.join(_FILES)}; saved models have a pumer.json"
        ) from None
    from pumer.hub.reduction import saved_reducer  # imported here, as it imports this module

    reducer = saved_reducer(folder)
    if reducer is None:
        raise ValueError(f"nothing reduces the model in {folder}: name a reducer (pumer list)")
    return reducer


def _read_file(file: Path) -> Reducer:
    try:
        settings = load_yaml(file.read_text(encoding="utf-8"))  # JSON is YAML too
    except OSError:
        raise ValueError(
            f"there is no file {file}, which would hold a reducer's settings"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{file} holds no reducer, which has `reducer: NAME` and its settings: {error}"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file} holds no reducer, which has `reducer: NAME` and its settings")
    try:
        return _from_settings(settings)
    except ValueError as error:
        raise ValueError(f"{file} holds no reducer: {error}") from error
