"""Settings are compared with the types of what they are for, before anything starts."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from transformers import TrainingArguments

import pumer
from pumer._settings import check_settings
from pumer.lab.tasks import build
from pumer.reducers import from_dict


@dataclass
class Inner:
    weight: float = 1.0


@dataclass
class Outer:
    labels: tuple[str, ...] = ()
    pair: tuple[int, float] = (1, 1.0)
    rates: dict[str, float] = field(default_factory=dict)
    mode: Literal["a", 1] = "a"
    root: str | Path = ""
    size: int | None = None
    rate: float = 0.1
    flag: bool = False
    inner: Inner | None = None
    anything: Any = None


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("labels", ["a", "b"], ("a", "b")),
        ("labels", [], ()),
        ("pair", [2, 3], (2, 3)),
        ("rates", {"a": 1}, {"a": 1}),
        ("mode", 1, 1),
        ("root", Path("x"), Path("x")),
        ("root", "7", "7"),
        ("size", None, None),
        ("size", "12", 12),
        ("rate", 1, 1),
        ("rate", "1e-4", 1e-4),  # which PyYAML reads as text
        ("inner", Inner(2), Inner(2)),
        ("inner", Inner("2"), Inner(2.0)),
        ("anything", object, object),
        ("unknown", 3, 3),
    ],
)
def test_settings_of_the_right_type_pass(name, value, expected):
    checked = check_settings(Outer, {name: value}, "outer")[name]
    assert checked == expected
    assert type(checked) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "labels",
            [True, False, "rectangle"],
            r"outer: labels is \[True.*tuple\[str, \.\.\.\].*in quotes",
        ),
        ("labels", "yes", r"labels is 'yes'; expected tuple\[str"),
        ("pair", [2], r"pair is \[2\]; expected tuple\[int, float\]"),
        ("rates", {"a": "b"}, r"expected dict\[str, float\]"),
        ("mode", True, r"mode is True; expected Literal\['a', 1\]"),
        ("root", 5, r"root is 5; expected str \| Path"),
        ("size", 2.5, r"size is 2\.5; expected int \| None"),
        ("size", True, "size is True"),
        ("rate", True, "rate is True; expected float"),
        ("rate", "fast", "rate is 'fast'"),
        ("flag", "yes", "flag is 'yes'; expected bool"),
        ("flag", 1, "flag is 1"),
        ("inner", {"weight": 1}, "inner is {'weight': 1}"),
        ("inner", Inner("heavy"), r"inner\.weight is 'heavy'; expected float"),
    ],
)
def test_settings_of_another_type_are_named(name, value, message):
    with pytest.raises(ValueError, match=message):
        check_settings(Outer, {name: value}, "outer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"name": "vqav2", "root": "x", "labels": [True, False]},
            "task vqav2: labels is .*in quotes",
        ),
        ({"name": "scenes", "questions": 7.5}, r"task scenes: questions is 7\.5; expected int"),
        (
            {"name": "nlvr", "root": "x", "held_out": ["a"]},
            r"held_out is \['a'\]; expected tuple\[int",
        ),
        ({"name": "snli-ve", "root": "x", "skip": "all"}, "skip is 'all'; expected Literal"),
    ],
)
def test_tasks_check_theirs(settings, message):
    with pytest.raises(ValueError, match=message):
        build(settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reducer": "tome", "r": 2.5}, r"reducer tome: r is 2\.5; expected int"),
        (
            {"reducer": "dart", "pivots": [4]},
            r"reducer dart: pivots is \(4,\); expected tuple\[int, int\]",
        ),
        ({"reducer": "pumer", "official": "yes"}, "reducer pumer: official is 'yes'"),
    ],
)
def test_reducers_check_theirs(settings, message):
    with pytest.raises(ValueError, match=message):
        from_dict(settings)


@pytest.mark.parametrize("name", pumer.reducers.list_reducers())
def test_types_of_every_reducer_are_known(name):
    for setting in fields(pumer.reducers.get(name)):
        with pytest.raises(ValueError, match=f"{name}: {setting.name} is <object.*; expected"):
            check_settings(pumer.reducers.get(name), {setting.name: object()}, name)


def test_settings_of_the_trainer_are_known():
    for name, value in (
        ("max_steps", True),
        ("learning_rate", "fast"),
        ("metric_for_best_model", 3),
    ):
        with pytest.raises(ValueError, match=f"trainer: {name} is"):
            check_settings(TrainingArguments, {name: value}, "trainer")
    good = {
        "lr_scheduler_kwargs": {"lr_end": 1e-7},
        "report_to": ["none"],
        "eval_strategy": "steps",
        "bf16": True,
    }
    assert check_settings(TrainingArguments, good, "trainer") == good
