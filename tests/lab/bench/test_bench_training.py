"""The benchmark of training: every way is there, and its numbers fit each other."""

import csv

import pytest

from pumer._rows import append_rows
from pumer.lab.bench.settings import TrainingBenchSettings
from pumer.lab.bench.training import BASE, bench_training


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    record = tmp_path_factory.mktemp("bench") / "training.csv"
    reducers = [
        {"reducer": "pumer", "layers": [1, 4]},
        {"reducer": "dynamicvit", "layers": [2]},
        {"reducer": "smarttrim", "layers": [1, 2]},
    ]
    measured = bench_training(
        TrainingBenchSettings("vilt-tiny", reducers, batch=2, runs=2, device="cpu", threads=1)
    )
    append_rows(record, measured.records())
    return measured, record


def test_every_way_is_measured_once(result):
    found, record = result
    assert [(step.variant.partition("(")[0], step.teacher) for step in found.rows] == [
        (name, teacher)
        for name in (BASE, "pumer", "dynamicvit", "smarttrim")
        for teacher in (False, True)
    ]
    with record.open() as file:
        assert len(list(csv.DictReader(file))) == len(found.rows)
    assert str(found).count("\n") > len(found.rows)


def test_flops_of_a_step(result):
    steps = {(step.variant.partition("(")[0], step.teacher): step for step in result[0].rows}
    base = steps[BASE, False].macs
    assert (
        steps[BASE, True].macs == base + base // 3
    )  # a third forward besides forward and two for the backward
    assert steps["pumer", False].macs < base
    assert steps["pumer", True].macs - steps["pumer", False].macs == base // 3
    assert steps["dynamicvit", False].macs == base
    assert steps["smarttrim", False].macs == 2 * base
    assert steps[BASE, False].flops_ratio == steps[BASE, False].x_base == 1
    assert steps["pumer", False].flops_ratio > steps["pumer", True].flops_ratio > 1


def test_fewer_tokens_are_less_to_remember(result):
    steps = {(step.variant.partition("(")[0], step.teacher): step for step in result[0].rows}
    assert steps["pumer", False].peak_bytes < steps[BASE, False].peak_bytes
