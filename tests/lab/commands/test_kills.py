"""Killed at any moment and started again, a command ends as if it had not been; nothing
half-written looks whole.

Every command is killed at PUMER_KILLS random moments, 20 for example; at 2 if that is not set.
"""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

import pumer
from pumer.cli import main
from pumer.hub import save_official
from pumer.lab.bench.latency import LatencyModel
from pumer.lab.data.text import train_tokenizer
from pumer.lab.data.transforms import Square, save_transform
from pumer.lab.scenes.tasks import Scenes
from pumer.lab.tune import run as tune_run

KILLS = int(os.environ.get("PUMER_KILLS", "2"))
FLICKR = {"name": "retrieval", "root": str(Path(__file__).parents[2] / "data/fixtures/flickr30k")}
TASK = {"name": "scenes", "questions": 60, "image_size": 96}
CLOCK = (
    "date",
    "seconds",
    "median_s",
    "p20_s",
    "p80_s",
    "x_unreduced",
    "x_low",
    "x_high",
    "overhead",
)
Files = dict[str, Any]


def files(folder: Path) -> Files:
    """Name -> content of all files below a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def rows(path: Path) -> Files:
    """Rows of a table by what they begin with, without what depends on the clock."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        table = list(csv.DictReader(file))
    dropped = (*CLOCK, "examples_per_s")
    return {
        next(iter(row.values())): {k: v for k, v in row.items() if k not in dropped}
        for row in table
    }


def trained(out: Path) -> Files:
    return {f"model/{name}": content for name, content in files(out / "model").items()}


def studied(out: Path) -> Files:
    return rows(out / "results/tiny.csv") | {
        f"speed {key}": row for key, row in rows(out / "results/tiny-speed.csv").items()
    }


def tuned(out: Path) -> Files:
    preset = out / "reducer.yaml"
    named = {"preset": preset.read_text()} if preset.exists() else {}
    return rows(out / "candidates.csv") | named


def scored(out: Path) -> Files:
    return {name: content for name, content in files(out).items() if name == "scores.npy"}


def predicted(out: Path) -> Files:
    return {"out": out.read_bytes()} if out.exists() else {}


@dataclass(frozen=True)
class Command:
    """A command that writes to `OUT`, and how its result is read.

    Args:
        words: of the command.
        result: of `OUT`; what is there after a kill has to be part of what is there in the end.
        grows: whether a part of it may be there before the rest.
        resume: further words when it is started again.
        once: whether it leaves a complete result alone, and says so.
    """

    words: tuple[str, ...]
    result: Callable[[Path], Files]
    grows: bool = False
    resume: tuple[str, ...] = ()
    once: bool = False


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    task = Scenes(questions=60, per_picture=2, image_size=96)
    names = dict(enumerate(task.labels))
    settings = {"vocab_size": 300, "max_position_embeddings": 24}
    for name, net in {
        "model": tiny.model(num_labels=len(names), id2label=names, **settings),
        "pairs": tiny.model("ViltForImageAndTextRetrieval", **settings),
    }.items():
        pumer.save(net, folder / name)
        tokenizer = train_tokenizer([example.text for example in task.examples("train")[:]], 300)
        tokenizer.model_max_length = 24
        tokenizer.save_pretrained(folder / name)
        save_transform(Square(96), folder / name)
    save_official(tiny.model(), folder / "published")
    model, reducer = str(folder / "model"), {"reducer": "pumer", "layers": [1], "prune": 0.2}
    trainer = {
        "max_steps": 6,
        "save_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
    }
    trainer |= {"disable_tqdm": True, "logging_steps": 1}
    recipe = {
        "task": TASK,
        "model": {"path": model},
        "reducer": reducer,
        "trainer": trainer,
        "eval_split": None,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    points = [{"prune": prune} for prune in (0.1, 0.3, 0.5)]
    methods = [{"name": "PuMer", "reducer": reducer, "points": points}]
    study = {
        "name": "tiny",
        "model": model,
        "task": TASK,
        "methods": methods,
        "batch_size": 4,
        "timed": 8,
        "runs": 1,
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    grid = [
        "--grid.prune",
        "[0.0, 0.2]",
        "--grid.merge",
        "[0.0]",
        "--grid.merge_text",
        "[0.0]",
        "--grid.tome",
        "[0]",
    ]
    grid += [
        "--grid.layers",
        "[[1], [2], [1, 2]]",
        "--choose",
        "100",
        "--check",
        "200",
        "--batch_size",
        "10",
    ]
    asked = ["--task", json.dumps({"name": "scenes", "questions": 300}), "--max_drop", "90"]
    chunks = [
        "--task",
        json.dumps(FLICKR),
        "--split",
        "train",
        "--chunk_images",
        "1",
        "--chunk_texts",
        "2",
    ]
    predict = ["--task", json.dumps(TASK), "--split", "test"]
    splits = ["--task", "retrieval", "--splits", '{"train": 40, "val": 10, "test": 10}']
    return {
        "train": Command(
            ("train", "--config", str(folder / "recipe.yaml"), "--output", "OUT"),
            trained,
            resume=("--resume", "true"),
        ),
        "study": Command(
            ("study", str(folder / "study.yaml"), "--out", "OUT/results", "--scratch", "OUT/runs"),
            studied,
            grows=True,
        ),
        "tune": Command(
            ("tune", "--model", model, "--out", "OUT", *asked, *grid),
            tuned,
            grows=True,
            resume=("--resume", "true"),
        ),
        "score": Command(
            ("score", "--model", str(folder / "pairs"), *chunks, "--out", "OUT"), scored
        ),
        "convert": Command(("convert", str(folder / "published"), "OUT"), files, once=True),
        "predict": Command(("predict", "--model", model, *predict, "--out", "OUT"), predicted),
        "data scenes": Command(("data", "scenes", "--out", "OUT", *splits), files, once=True),
    }


def start(words: tuple[str, ...], out: Path) -> multiprocessing.process.BaseProcess:
    """Run a command in a fork of this process, which has imported all that it needs."""
    process = multiprocessing.get_context("fork").Process(
        target=_run, args=([w.replace("OUT", str(out)) for w in words],)
    )
    process.start()
    return process


def _run(words: tuple[str, ...]) -> None:
    torch.set_num_threads(1)  # the threads of this process's parent are not in the fork
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    raise SystemExit(main(words))


def finish(words: tuple[str, ...], out: Path, code: int = 0) -> None:
    process = start(words, out)
    process.join(300)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == code, words


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["train", "study", "tune", "score", "convert", "predict", "data scenes"]
)
def test_killed_at_any_moment_a_command_ends_as_if_it_had_not_been(
    commands, name, tmp_path, monkeypatch
):
    # Measured times would let a tuning choose another setting.
    terms = (
        "products",
        "forward",
        "tokens",
        "pairs",
        "reducer",
        "reducer operators",
        "reducer traffic",
    )
    costs = dict.fromkeys(terms, 0.0) | {"products": 1e-9}
    monkeypatch.setattr(tune_run, "calibrate", lambda model, inputs: LatencyModel(costs))
    monkeypatch.setattr(
        tune_run,
        "measure",
        lambda model, inputs, variants, runs: (
            {"fused": 2.0, **dict.fromkeys(variants, 1.0)},
            None,
        ),
    )
    command = commands[name]
    begin = time.monotonic()
    finish(command.words, tmp_path / "whole")
    length = time.monotonic() - begin
    expected = command.result(tmp_path / "whole")
    assert expected
    moments = random.Random(int.from_bytes(os.urandom(4)))
    killed = 0
    for number in range(KILLS):
        out = tmp_path / f"{number}/out"
        process = start(command.words, out)
        process.join(moments.uniform(0, length))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        there = command.result(out) if out.parent.exists() else {}
        assert there.items() <= expected.items() if command.grows else there in ({}, expected)
        refused = command.once and there == expected
        finish((*command.words, *command.resume), out, code=2 if refused else 0)
        assert command.result(out) == expected
        assert not [
            path
            for path in out.parent.rglob("*")
            if path.name.startswith(".") or path.name == "lock"
        ]
    print(f"{name}: {killed} of {KILLS} killed within {length:.1f} s, all equal when resumed")
