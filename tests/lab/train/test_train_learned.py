"""Training of learned reducers: their price, their learning rate, their own teacher, and what is
written."""

import json

import pytest
import torch
from test_train import REDUCER, STEPS, TASK, base, tokenizer  # noqa: F401  # fixtures
from tiny import model as tiny_model

import pumer
from pumer.hub import load
from pumer.lab.train.optimizer import OptimizerSettings, reducer_groups
from pumer.lab.train.run import train
from pumer.lab.train.settings import DistillSettings, ModelSettings, TrainSettings
from pumer.reducers import DynamicViT, SmartTrim

DYNAMIC = {"reducer": "dynamicvit", "keep": 0.6, "layers": [0, 1]}
SMART = {"reducer": "smarttrim", "target": 0.5, "layers": [0, 1, 2]}


def run(base, out, reducer, start=None, **more):  # noqa: F811
    train(
        TrainSettings(
            str(out),
            TASK,
            ModelSettings(path=str(start or base / "model")),
            reducer=reducer,
            trainer=STEPS,
            **more,
        )
    )
    return load(out / "model"), json.loads((out / "log.json").read_text())


def test_dynamicvit_trains_with_a_teacher(base, tmp_path):  # noqa: F811
    teacher = DistillSettings(teacher=str(base / "model"), weight=0.5)
    model, log = run(base, tmp_path / "one", DYNAMIC, distill=teacher)
    assert pumer.active(model).reducer == DynamicViT(0.6, (0, 1))
    assert log[0]["budget_loss"] > 0
    assert max(row.get("distill_loss", 0) for row in log) > 0
    first = {
        name: tensor.clone() for name, tensor in pumer.active(model).parts.state_dict().items()
    }
    again, _ = run(base, tmp_path / "two", DYNAMIC, start=tmp_path / "one/model")
    second = pumer.active(again).parts.state_dict()
    # A few small steps from where it stopped, not from anew.
    for name, tensor in second.items():
        assert not torch.equal(tensor, first[name]), name
        torch.testing.assert_close(tensor, first[name], rtol=0, atol=0.06, msg=name)


def test_smarttrim_is_its_own_teacher(base, tmp_path):  # noqa: F811
    model, log = run(base, tmp_path / "smart", SMART)
    assert pumer.active(model).reducer == SmartTrim(0.5, (0, 1, 2))
    assert {"task_loss", "whole_loss", "self_distill_loss", "budget_loss"} <= set(log[0])


def test_other_parts_than_the_reducers_are_left(base, tmp_path, caplog):  # noqa: F811
    run(base, tmp_path / "one", DYNAMIC)
    run(base, tmp_path / "other", SMART, start=tmp_path / "one/model")
    assert "starts with new ones" in caplog.text
    caplog.clear()
    run(base, tmp_path / "pumer", REDUCER, start=tmp_path / "one/model")
    assert "starts with new ones" not in caplog.text


def test_its_parts_learn_faster():
    model = pumer.apply(tiny_model(), DynamicViT(0.5, (1,)))
    groups = reducer_groups(model, 10.0, 1e-3, 0.1)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    decays = {
        id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]
    }
    parts = {id(parameter) for parameter in pumer.active(model).parts.parameters()}
    assert len(rates) == len(list(model.parameters()))
    assert {rate for key, rate in rates.items() if key in parts} == {1e-2}
    assert {rate for key, rate in rates.items() if key not in parts} == {1e-3}
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm)
        for parameter in module.parameters()
    }
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (
            0.0 if name.endswith("bias") or id(parameter) in norms else 0.1
        ), name


def test_the_published_optimizer_has_no_place_for_them(base, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="cannot be combined with a learned reducer"):
        run(base, tmp_path / "out", DYNAMIC, optimizer=OptimizerSettings())
    assert not (tmp_path / "out").exists()


def test_layers_that_are_run_again_have_to_let_gradients_through(base, tmp_path):  # noqa: F811
    again = STEPS | {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    start = ModelSettings(path=str(base / "model"))
    with pytest.raises(ValueError, match="reentrant gradient checkpointing loses"):
        train(TrainSettings(str(tmp_path / "out"), TASK, start, reducer=DYNAMIC, trainer=again))
    assert not (tmp_path / "out").exists()
