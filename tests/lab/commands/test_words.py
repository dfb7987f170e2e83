"""What is typed on the command line: names close to the right ones, and settings one by one."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from jsonargparse import ArgumentParser

import pumer
from pumer.cli import COMMANDS, _function, main
from pumer.lab.commands.help import FLAT, options
from pumer.lab.commands.words import unknown_command, with_settings


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--reducer", "tome", "--reducer.depth", "6"], {"reducer": "tome", "depth": 6}),
        (["--reducer=tome", "--reducer.r=[3,2]"], {"reducer": "tome", "r": [3, 2]}),
        (["--reducer.depth", "6", "--reducer", "tome"], {"reducer": "tome", "depth": 6}),
        (
            ["--reducer", "compose", "--reducer.inside", "pumer", "--reducer.inside.prune", "0.2"],
            {"reducer": "compose", "inside": {"reducer": "pumer", "prune": 0.2}},
        ),
        (
            ["--reducer", '{"reducer": "tome", "r": 4}', "--reducer.depth", "6"],
            {"reducer": "tome", "r": 4, "depth": 6},
        ),
    ],
)
def test_settings_one_by_one_are_one_mapping(words, expected):
    before, behind = ["--model", "m"], ["--limit", "3"]
    merged = with_settings([*before, *words, *behind])
    assert merged[:3] == [*before, "--reducer"]
    assert json.loads(merged[3]) == expected
    assert merged[4:] == behind


def test_a_task_is_named_the_same_way():
    assert json.loads(with_settings(["--task", "vqav2", "--task.root", "d"])[1]) == {
        "name": "vqav2",
        "root": "d",
    }


def test_other_words_stay_as_they_are():
    words = [
        "--reducer",
        "tome",
        "--trainer.learning_rate",
        "1e-4",
        "--reducers",
        '["tome"]',
        "file",
    ]
    assert with_settings(words) == words
    assert with_settings(["--reducer.depth", "6"]) == [
        "--reducer.depth",
        "6",
    ]  # of a file's reducer


@pytest.mark.parametrize("model", ["scenes-vilt"])
def test_a_command_takes_them(model, capsys):
    assert main(["report", "--model", model, "--reducer", "tome", "--reducer.r", "5"]) == 0
    assert "tome(r=5, depth=6, proportional=True)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evall"], "pumer: there is no command 'evall'. Did you mean 'eval'?"),
        (["data", "chek"], "there is no command 'data chek'. Did you mean 'data check'?"),
        (["bench", "lm"], "there is no command 'bench lm'. Did you mean 'bench llm'?"),
        (
            ["report", "--modle", "scenes-vilt"],
            "pumer report: there is no option --modle. Did you mean '--model'?",
        ),
        (["report", "--model", "scenes-vit"], "Did you mean 'scenes-vilt'?"),
        (["report", "--model", "scenes-vilt", "--reducer", "tomee"], "Did you mean 'tome'?"),
        (
            ["report", "--model", "scenes-vilt", "--reducer", "tome", "--reducer.dept", "6"],
            "Did you mean 'depth'?",
        ),
        (["eval", "--model", "scenes-vilt", "--task", "scene"], "Did you mean 'scenes'?"),
        (
            ["eval", "--model", "scenes-vilt", "--task", "scenes", "--task.question", "4"],
            "Did you mean 'questions'?",
        ),
        (["train", "--config", "scenes-pummer", "--output", "o"], "Did you mean 'scenes-pumer'?"),
    ],
)
def test_a_name_close_to_the_right_one_is_suggested(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) <= 5


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_option(name, capsys):
    function = _function(COMMANDS[name][0])
    shown = {option.name: option for option in options(COMMANDS[name][0])}
    parameters = dict(inspect.signature(function).parameters)
    settings = get_type_hints(function)[FLAT] if parameters.pop(FLAT, None) else None
    if settings is not None:  # a dataclass whose fields are the command's own options
        parameters = dict(inspect.signature(settings).parameters) | parameters
    assert [option for option in shown if "." not in option] == list(parameters)
    for parameter in parameters.values():
        assert (shown[parameter.name].default is None) == (parameter.default is parameter.empty)
        assert shown[parameter.name].help, f"{parameter.name} is not explained"
    # What is parsed is what is told: dataclasses among the arguments, field by field.
    parser = ArgumentParser()
    if settings is not None:
        parser.add_class_arguments(settings, as_positional=False)
    parser.add_function_arguments(function, as_positional=False, skip={FLAT})
    parsed = {key for key in parser.get_defaults().as_dict() if key in parameters}
    assert parsed <= set(shown)
    assert main([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert all(option in text for option in shown)


def test_help_of_nested_settings():
    shown = {option.name: option for option in options("pumer.lab.train.run:train")}
    assert shown["distill.teacher"].help.startswith("folder of the unreduced model")
    assert shown["attention"].type == "sdpa|eager"
    assert {option.name: option.type for option in options(COMMANDS["eval"][0])}[
        "batch_size"
    ] == "N"
    assert {"model.path", "grounding.weight", "augment.ops"} <= set(shown)


def test_help_imports_nothing_heavy():
    code = """
import resource, sys
from pumer.cli import main
main(["train", "--help"])
assert not {"torch", "transformers", "jsonargparse"} & set(sys.modules)
print(resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""
    env = {**os.environ, "PYTHONPATH": str(Path(pumer.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 2


def test_every_command_is_one():
    for name in COMMANDS:
        assert unknown_command([*name.split(), "--help"], COMMANDS) is None
    assert unknown_command(["study", "file.yaml"], COMMANDS) is None


def test_a_shell_completes_commands_options_and_choices(tmp_path, capsys):
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    script = tmp_path / "pumer"
    script.write_text(capsys.readouterr().out)
    ask = """
    source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))
    _shtab_pumer; echo "${COMPREPLY[@]}"
    """

    def completed(*words):
        command = ["bash", "-c", ask, "bash", str(script), "pumer", *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    assert completed("st") == ["study"]
    assert "llm" in completed("bench", "")
    assert completed("bench", "llm", "--tower") == ["--tower_layers"]
    assert completed("bench", "llm", "--device", "c") == ["cpu", "cuda"]


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "pumer", "--version"]
    assert (
        subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        == pumer.__version__
    )
