"""A study as read from its file, and the points it consists of."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from jsonargparse import ArgumentError, ArgumentParser

from pumer._files import check_name, digest, fingerprint
from pumer._shipped import model_folder
from pumer._suggest import did_you_mean
from pumer.lab.train.arguments import trainer_settings
from pumer.lab.train.recipe import read_recipe, read_settings
from pumer.lab.train.settings import TrainSettings
from pumer.presets import read_reducer
from pumer.reducers import ModelShape, Unreduced, from_dict, to_dict

BASELINE = "unreduced"
"""Name of the unreduced model, which every study includes and trains like the others."""
_HABITS = (
    "logging_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "report_to",
    "disable_tqdm",
)

_ONCE = ModelShape(depth=12, last=11, image=576, encoder=True, tower=ModelShape(depth=12, last=11))


@dataclass(frozen=True)
class Point:
    """One method at one setting with one seed: a training, if the study trains, and an evaluation.

    Args:
        method: the name of its method.
        label: distinguishes the setting from the method's others.
        reducer: name and all settings, as `reducers.to_dict` gives them.
        image_size: side of the images in pixels; the model's own if None.
        recipe: settings of `train` without its output; None where nothing is trained.
        seed: of the training.
        setting: digest of everything that determines the result except the seed.
        id: digest of everything that determines the result.
    """

    method: str
    label: str
    reducer: dict[str, Any]
    image_size: int | None
    recipe: dict[str, Any] | None
    seed: int
    setting: str
    id: str

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.method, self.label))) + f", seed {self.seed}"


class Method(TypedDict):
    """A method in a study's file; see `Study`."""

    name: str
    reducer: str | dict[str, Any]
    points: NotRequired[list[dict[str, Any]]]
    grid: NotRequired[dict[str, list[Any]]]
    train: NotRequired[dict[str, Any] | bool | None]


class Baseline(TypedDict, total=False):
    """The unreduced model in a study's file."""

    train: dict[str, Any] | bool


@dataclass(frozen=True)
class Study:
    """Which methods are compared, and on what.

    Args:
        name: of the study and of the files it writes.
        model: folder of the model that all points start from, or a shipped one's name; the teacher,
            too.
        task: `name` and settings of the task that is evaluated.
        methods: `name`; `reducer`, a preset's name or a reducer's and its settings; `points`, a
            list of settings to change, or `grid`, lists of values by setting, of which every
            combination is a point; `train`, changes of the training, or false for none at all. In a
            point `image_size` is the side of the images.
        split: of the task.
        examples: how many of the split are scored; all if not given.
        train: `recipe`, a shipped one's name or a file, and changes of its settings; nothing is
            trained if not given.
        baseline: `train`, changes of the training of the unreduced model.
        reference: the methods that the others are compared with.
        seeds: of the training; every point is trained with each.
        processes: that train together; batch sizes are per process.
        batch_size: examples at a time, where points are scored and timed.
        timed: examples of a timed run.
        runs: timed runs of each point and of the unreduced model.
    """

    name: str
    model: str
    task: dict[str, Any]
    methods: tuple[Method, ...]
    split: str = "test"
    examples: int | None = None
    train: dict[str, Any] | None = None
    baseline: Baseline = field(default_factory=Baseline)
    reference: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (1,)
    processes: int = 2
    batch_size: int = 32
    timed: int = 64
    runs: int = 9

    def __post_init__(self) -> None:
        check_name(self.name, "the study's name")
        names = [BASELINE, *(str(method.get("name")) for method in self.methods)]
        allowed_keys = {"name", "reducer", "points", "grid", "train"}
        for method in self.methods:
            if "name" not in method or "reducer" not in method or set(method) - allowed_keys:
                raise ValueError(
                    f"a method has name, reducer, points or grid, train; not {', '.join(method)}"
                )
            if "points" in method and "grid" in method:
                raise ValueError(f"{method['name']}: give points or grid, not both")
            values = (method[name] for name in ("points", "grid") if name in method)
            if not all(values) or not all(method.get("grid", {}).values()):
                raise ValueError(f"{method['name']}: points, or the values of a grid, are empty")
        if len(set(names)) < len(names):
            raise ValueError(
                f"methods have names of their own, and none is called {BASELINE}: "
                f"{', '.join(names[1:])}"
            )
        for reference in self.reference:
            if reference not in names:
                raise ValueError(
                    f"the reference {reference!r} is none of the methods {', '.join(names)}"
                )
        if set(self.baseline) - {"train"}:
            raise ValueError(f"the baseline has train alone, not {', '.join(self.baseline)}")
        if self.train is None and len(self.seeds) > 1:
            raise ValueError("without training a seed changes nothing: give one, or train")
        if self.train is None and any(
            method.get("train") for method in (self.baseline, *self.methods)
        ):
            raise ValueError("a method changes the training, but the study has no train")
        counts = {
            "processes": self.processes,
            "batch_size": self.batch_size,
            "timed": self.timed,
            "runs": self.runs,
        }
        too_small = [
            name for name, count in counts.items() if not isinstance(count, int) or count < 1
        ]
        if too_small or not self.seeds:
            raise ValueError(f"{', '.join(too_small) or 'seeds'}: give at least 1")

    def candidates(self) -> tuple[list[Point], list[str]]:
        """All points, seed by seed, and the reasons why others are impossible.

        Raises:
            ValueError: for an unknown model, recipe or training setting, and for equal points.
        """
        points: list[Point] = []
        reasons: list[str] = []
        model = fingerprint(model_folder(self.model))
        for method in self._every_method():
            recipe = self._recipe(method.get("train", {}))
            for change in _changes(method):
                label = _label(change)
                try:
                    reducer, image_size = _reducer(method, change)
                except (ValueError, TypeError) as error:
                    reasons.append(f"{method['name']}, {label}: {error}")
                    continue
                point_recipe = recipe
                if image_size is not None and recipe is not None:
                    point_recipe = recipe | {"image": _resized(recipe.get("image"), image_size)}
                points += [
                    self._point(
                        method["name"], label, reducer, image_size, point_recipe, seed, model
                    )
                    for seed in (self.seeds if point_recipe is not None else self.seeds[:1])
                ]
        _check_once(points)
        return sorted(points, key=lambda point: self.seeds.index(point.seed)), reasons

    def order(self) -> list[tuple[str, str]]:
        """(method, label) of all settings, in the study's order."""
        return [
            (method["name"], _label(change))
            for method in self._every_method()
            for change in _changes(method)
        ]

    def _every_method(self) -> tuple[Mapping[str, Any], ...]:
        return ({"name": BASELINE, "reducer": to_dict(Unreduced()), **self.baseline}, *self.methods)

    def _recipe(self, changes: Mapping[str, Any] | bool) -> dict[str, Any] | None:
        """Training settings of a method, without reducer and seed."""
        if self.train is None or changes is False:
            return None
        wanted = _merged(self.train, changes if isinstance(changes, Mapping) else {})
        name = wanted.pop("recipe", None)
        merged = _merged(read_recipe(name) if name else {}, wanted)
        trainer_settings(
            merged.get("trainer") or {}, early_stopping=bool(merged.get("early_stopping"))
        )
        unknown = set(merged) - set(TrainSettings.__dataclass_fields__) | {
            "output",
            "resume",
        } & set(merged)
        if unknown:
            hint = did_you_mean(min(unknown), TrainSettings.__dataclass_fields__)
            raise ValueError(f"a training has no setting {', '.join(sorted(unknown))}.{hint}")
        if "task" not in merged:
            raise ValueError("train has no task: name a recipe, or give task")
        for name in ("reducer", "seed"):  # which every point has its own of
            merged.pop(name, None)
        merged["model"] = {**(merged.get("model") or {}), "path": self.model}
        if merged.get("distill"):
            merged["distill"] = {**merged["distill"], "teacher": self.model}
        return merged

    def _point(
        self,
        method: str,
        label: str,
        reducer: dict[str, Any],
        image_size: int | None,
        recipe: dict[str, Any] | None,
        seed: int,
        model: str,
    ) -> Point:
        matters: dict[str, Any] = {
            "model": model,
            "task": self.task,
            "split": self.split,
            "examples": self.examples,
            "batch_size": self.batch_size,
            "timed": self.timed,
            "reducer": _identity(reducer),
            "image_size": image_size,
        }
        if recipe is not None:
            trainer = {
                name: value
                for name, value in recipe.get("trainer", {}).items()
                if name not in _HABITS
            }
            # The model is known by what is in its files, wherever they lie.
            start = {name: value for name, value in recipe["model"].items() if name != "path"}
            places = ("teacher", "cache")
            teacher = {
                name: value
                for name, value in (recipe.get("distill") or {}).items()
                if name not in places
            }
            changed = {
                "model": start,
                "trainer": trainer,
                "distill": teacher,
                "processes": self.processes,
            }
            matters["train"] = recipe | changed
            recipe = recipe | {"reducer": reducer, "seed": seed}
        return Point(
            method,
            label,
            reducer,
            image_size,
            recipe,
            seed,
            digest(matters),
            digest(matters | {"seed": seed}),
        )


def read_study(file: str | Path) -> Study:
    """Read a study from YAML; raises ValueError for missing, unknown or invalid settings."""
    settings = read_settings(Path(file))
    field_names = {field.name for field in fields(Study)}
    missing = sorted(
        name for name in ("name", "model", "task", "methods") if not settings.get(name)
    )
    unknown = sorted(set(settings) - field_names)
    if missing or unknown:
        hint = did_you_mean(unknown[0], field_names) if unknown else ""
        raise ValueError(
            f"{file}: a study has {', '.join(sorted(field_names))}; missing or empty "
            f"{missing or 'none'}, unknown {unknown or 'none'}.{hint}"
        )
    settings = {name: value for name, value in settings.items() if value is not None}
    if isinstance(settings["task"], str):
        settings["task"] = {"name": settings["task"]}
    if isinstance(settings.get("reference"), str):
        settings["reference"] = [settings["reference"]]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study)
    try:
        parser.parse_object(
            deepcopy(settings)
        )  # a check alone: it takes texts such as "no" and "007" for other things
    except ArgumentError as error:
        raise ValueError(f"{file}: {str(error).removeprefix('Parser key ')}") from error
    lists: dict[str, Any] = {
        name: tuple(settings[name])
        for name in ("methods", "seeds", "reference")
        if name in settings
    }
    return Study(**settings | lists)


def _check_once(points: Iterable[Point]) -> None:
    point_by_id: dict[str, Point] = {}
    for point in points:
        if point.id in point_by_id:
            raise ValueError(
                f"{point_by_id[point.id]} and {point} are the same point: leave one out"
            )
        point_by_id[point.id] = point


def _changes(method: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings that each point of a method changes."""
    if "grid" in method:
        return [
            dict(zip(method["grid"], values, strict=True))
            for values in itertools.product(*method["grid"].values())
        ]
    return method.get("points", [{}])


def _label(change: Mapping[str, Any]) -> str:
    """Text that distinguishes a setting from the method's other settings."""
    return ", ".join(f"{name} {_short(value)}" for name, value in change.items())


def _reducer(
    method: Mapping[str, Any], change: Mapping[str, Any]
) -> tuple[dict[str, Any], int | None]:
    """All settings of a point's reducer as plain JSON values, and its image size."""
    reducer_spec = method["reducer"]
    settings = _merged(
        reducer_spec if isinstance(reducer_spec, Mapping) else to_dict(read_reducer(reducer_spec)),
        change,
    )
    image_size = settings.pop("image_size", None)
    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size is a number of pixels, not {image_size!r}")
    plain: dict[str, Any] = json.loads(json.dumps(to_dict(read_reducer(settings))))
    return plain, image_size


def _identity(reducer: dict[str, Any]) -> dict[str, Any]:
    """Settings for a digest, with unset ones at the values that were once their defaults.

    So points keep their ids, and results from before defaults depended on the model stay valid.
    """
    return to_dict(from_dict(reducer).resolve(_ONCE))


def _resized(image: Mapping[str, Any] | None, size: int) -> dict[str, Any]:
    """A recipe's image transform at another image size."""
    if not image:
        raise ValueError(
            "image_size changes the image transform, and the training has none: give train.image"
        )
    return {**image, "shorter" if image["kind"] == "keep_aspect" else "size": size}


def _merged(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with changes, merged recursively."""
    merged = dict(settings)
    for name, value in changes.items():
        before = merged.get(name)
        both = isinstance(before, Mapping) and isinstance(value, Mapping)
        merged[name] = _merged(before, value) if both else value  # type: ignore[arg-type]
    return merged


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_short(part)}" for name, part in value.items())
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
