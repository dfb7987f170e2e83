"""The command line. Each command is a function with typed arguments; only the one that is asked for is imported."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pumer._suggest import did_you_mean
from pumer.commands.help import render
from pumer.commands.words import unknown_command, unknown_option, with_settings

COMMANDS = {
    "demo": ("pumer.commands.demo:demo", "see the shipped models answer, faster, and which tokens they kept"),
    "train": ("pumer.train.run:train", "fine-tune a model with its reducer on, with or without a teacher"),
    "eval": ("pumer.commands.evaluate:evaluate_", "score a model on a task, with any reducer"),
    "predict": ("pumer.commands.evaluate:predict_", "write the prediction file that a task's server takes"),
    "score": ("pumer.commands.score:score_", "score every image of a retrieval task with every caption; resumable"),
    "convert": ("pumer.commands.convert:convert", "turn a published checkpoint into a model folder, or back"),
    "study": ("pumer.commands.study:study_", "compare methods at many settings: trainings, tables, plots; resumable"),
    "bench": ("pumer.commands.bench:bench_", "time stock, fused and reduced models side by side"),
    "bench model": ("pumer.commands.bench_model:bench_model_", "time and weigh a saved model, stock and reduced"),
    "bench llm": (
        "pumer.commands.bench:llm_",
        "time answers of vision-language models: prefill, tokens, cache",
    ),
    "bench train": ("pumer.commands.bench:train_", "time steps of training, with and without reducer and teacher"),
    "bench where": ("pumer.commands.bench:where_", "show at which batch and picture sizes reduction pays"),
    "bench pairs": ("pumer.commands.score:bench_pairs", "time scoring of a pool against the plain loop over its pairs"),
    "tune": ("pumer.commands.tune:tune_", "find the fastest setting within a bound on accuracy, speed or memory"),
    "report": ("pumer.commands.report:report_", "tokens and FLOPs per layer of a model and reducer"),
    "viz": ("pumer.commands.viz:viz_", "draw which tokens were kept, merged and dropped"),
    "data check": ("pumer.commands.data:check", "say what of a task's official files is there and what is missing"),
    "data scenes": ("pumer.commands.data:scenes", "write generated pictures and questions as official VQAv2 files"),
    "data tokenizer": ("pumer.commands.data:tokenizer", "train a small tokenizer"),
    "list": ("pumer.commands.list:list_", "reducers, presets, model classes, tasks and recipes"),
}
RECIPES = Path(__file__).parent / "train" / "recipes"
POSITIONAL = {"convert", "data check", "study"}  # their required arguments go by place, not by name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors in what the user gave are one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else " ".join(words[:1])
    if name in ("--version", "-V"):
        from pumer import __version__

        print(__version__)
        return 0
    if name in ("", "-h", "--help", "help"):
        print(_overview())
        return 0 if name else 2
    if (problem := unknown_command(words, COMMANDS)) is not None:
        print(f"pumer: {problem}", file=sys.stderr)
        return 2
    if {"-h", "--help"} & set(words):
        print(render(name, COMMANDS[name][1].capitalize(), COMMANDS[name][0], name in POSITIONAL))
        return 0
    return _run(name, words[len(name.split()) :])


def _run(name: str, words: list[str]) -> int:
    from jsonargparse import ArgumentParser
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights; the commands show their own
    function = _function(COMMANDS[name][0])
    parser = ArgumentParser(prog=f"pumer {name}", description=COMMANDS[name][1].capitalize() + ".", exit_on_error=True)
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of these settings" + ", or a recipe's name" * (name == "train"),
    )
    parser.add_function_arguments(function, as_positional=name in POSITIONAL)
    words = with_settings([_recipe(word) for word in words])
    if (problem := unknown_option(words, [*inspect.signature(function).parameters, "config", "help"])) is not None:
        print(f"pumer {name}: {problem}", file=sys.stderr)
        return 2
    for option, word in pairwise(words):
        if option == "--config" and not Path(word).exists():
            hint = did_you_mean(word, [path.stem for path in RECIPES.glob("*.yaml")])
            print(f"pumer {name}: {word} is no file, nor a recipe that `pumer list` names.{hint}", file=sys.stderr)
            return 2
        if option == "--config" and (problem := _bad_yaml(word)):
            print(f"pumer {name}: {word} is no YAML: {problem}", file=sys.stderr)
            return 2
    settings = parser.instantiate(parser.parse_args(words))
    values = {key: value for key, value in vars(settings).items() if key != "config"}
    try:
        function(**values)
    except (ValueError, FileNotFoundError) as error:
        print(f"pumer {name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"pumer {name}: interrupted", file=sys.stderr)
        return 130
    return 0


def _bad_yaml(file: str) -> str:
    """What is wrong with a file of settings, if it is no YAML, or too much of it."""
    import yaml

    from pumer._yaml import load_yaml

    try:
        load_yaml(Path(file).read_text(encoding="utf-8"))
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        return str(error)
    return ""


def _recipe(word: str) -> str:
    """The file of a shipped recipe, where a word is the name of one."""
    path = RECIPES / f"{word}.yaml"
    return str(path) if re.fullmatch(r"[\w-]+", word) and path.is_file() else word


def _function(path: str) -> Callable[..., Any]:
    module, _, attribute = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        ["usage: pumer COMMAND [options]", "", *rows, "", "pumer COMMAND --help tells a command's options."]
    )


if __name__ == "__main__":
    raise SystemExit(main())
