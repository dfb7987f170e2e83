"""The command line. Each command is a function with typed arguments, imported only when it runs."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from pumer._terminal import brief
from pumer.lab.commands.help import options, render
from pumer.lab.commands.words import unknown_command

COMMANDS = {
    "demo": (
        "pumer.lab.commands.demo:demo",
        "see the shipped models answer, faster, and which tokens they kept",
    ),
    "train": (
        "pumer.lab.train.run:train",
        "fine-tune a model with its reducer on, with or without a teacher",
    ),
    "eval": ("pumer.lab.commands.evaluate:evaluate_", "score a model on a task, with any reducer"),
    "predict": (
        "pumer.lab.commands.evaluate:predict_",
        "write the prediction file that a task's server takes",
    ),
    "score": (
        "pumer.lab.commands.score:score_",
        "score every image of a retrieval task with every caption; resumable",
    ),
    "convert": (
        "pumer.lab.commands.convert:convert",
        "turn a published checkpoint into a model folder, or back",
    ),
    "study": (
        "pumer.lab.commands.study:study_",
        "compare methods at many settings: trainings, tables, plots; resumable",
    ),
    "bench": (
        "pumer.lab.commands.bench:bench_",
        "time stock, fused and reduced models side by side",
    ),
    "bench model": (
        "pumer.lab.commands.bench_model:bench_model_",
        "time and weigh a saved model, stock and reduced",
    ),
    "bench llm": (
        "pumer.lab.commands.bench:llm_",
        "time answers of vision-language models: prefill, tokens, cache",
    ),
    "bench train": (
        "pumer.lab.commands.bench:train_",
        "time steps of training, with and without reducer and teacher",
    ),
    "bench where": (
        "pumer.lab.commands.bench:where_",
        "show at which batch and image sizes reduction pays",
    ),
    "bench pairs": (
        "pumer.lab.commands.score:bench_pairs_",
        "time scoring of a pool against the plain loop over its pairs",
    ),
    "tune": (
        "pumer.lab.commands.tune:tune_",
        "find the fastest setting within a bound on accuracy, speed or memory",
    ),
    "report": (
        "pumer.lab.commands.report:report_",
        "tokens and FLOPs per layer of a model and reducer",
    ),
    "viz": ("pumer.lab.commands.viz:viz_", "draw which tokens were kept, merged and dropped"),
    "data check": (
        "pumer.lab.commands.data:check",
        "count a task's official files and images, and list what is missing",
    ),
    "data scenes": (
        "pumer.lab.commands.data:scenes",
        "write generated images and texts in a task's official format",
    ),
    "data tokenizer": ("pumer.lab.commands.data:tokenizer", "train a small tokenizer"),
    "list": (
        "pumer.lab.commands.list:list_",
        "reducers, presets, model classes, tasks and recipes",
    ),
    "completion": (
        "pumer.lab.commands.completion:completion",
        "print a script that completes commands in a shell",
    ),
}
POSITIONAL = {
    "convert",
    "data check",
    "study",
    "completion",
}  # required arguments are positional


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that the user can fix are a few lines on stderr, never a traceback.

    Returns:
        0; 2 for wrong settings and input, 1 for failures of the machine such as a full disk; 130 or
        143 when stopped.
    """
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
        return _fail("", problem, 2)
    if {"-h", "--help"} & set(words):
        print(render(name, COMMANDS[name][1], COMMANDS[name][0], name in POSITIONAL))
        return 0
    try:
        with _stoppable():
            _run(name, words[len(name.split()) :])
    except _Stopped:
        return _fail(name, "stopped by SIGTERM", 143)
    except KeyboardInterrupt:
        return _fail(name, "interrupted", 130)
    except BrokenPipeError:  # the reader of our output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, FileNotFoundError) as error:
        return _fail(name, str(error), 2)
    except OSError as error:
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _fail(name, named, 1)
    except MemoryError:
        return _fail(name, "out of memory: give a smaller --batch_size, or fewer workers", 1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; not imported for this
            raise
        return _fail(name, f"out of memory: give a smaller --batch_size. {error}", 1)
    return 0


def _fail(name: str, message: str, code: int) -> int:
    print(brief(f"{' '.join(filter(None, ('pumer', name)))}: {message}"), file=sys.stderr)
    return code


class _Stopped(KeyboardInterrupt):
    """SIGTERM was received: handled like Ctrl-C."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Handle SIGTERM like Ctrl-C, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(name: str, words: list[str]) -> None:
    from transformers.utils.logging import disable_progress_bar

    from pumer.lab.commands.parsing import parse

    disable_progress_bar()  # of loading weights; commands show their own
    path = COMMANDS[name][0]
    function = _function(path)
    function(**parse(function, options(path), words, name in POSITIONAL, recipes=name == "train"))


def _function(path: str) -> Callable[..., Any]:
    module, _, attribute = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return function


def _overview() -> str:
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: pumer COMMAND [options]",
            "",
            *rows,
            "",
            "pumer COMMAND --help lists a command's options.",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
