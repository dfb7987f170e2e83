"""Commands: outputs and settings are checked before the work, faults are a few lines, locks hold,
names are text."""

import errno
import functools
import importlib
import inspect
import json
import os
import signal
import sys
import typing

import pytest
import tiny
import torch

import pumer
from pumer import cli
from pumer._files import locked, new_folder
from pumer._options import _checks, check_options
from pumer._terminal import brief, console, visible
from pumer._yaml import load_yaml
from pumer.cli import COMMANDS, main
from pumer.hub import load_stock
from pumer.hub.files import read_config
from pumer.lab.commands import evaluate as evaluate_command
from pumer.lab.data.text import load_tokenizer
from pumer.lab.scenes.files import write_vqav2
from pumer.lab.score.chunks import Chunks
from pumer.lab.tasks.processors import read_processor

MODEL = "scenes-vilt-pumer"
EVAL = [
    "eval",
    "--model",
    MODEL,
    "--task",
    '{"name": "scenes", "questions": 4}',
    "--batch_size",
    "4",
]
BENCH = ["--model", "vilt-tiny", "--runs", "1"]
# A command with an option that names an output, and whether a file or a folder is wanted.
OUTPUTS = [
    ([*EVAL, "--samples"], "file"),
    ([*EVAL, "--record"], "file"),
    (["predict", "--model", MODEL, "--task", "scenes", "--out"], "file"),
    (["score", "--model", MODEL, "--task", "scenes", "--out"], "folder"),
    (["train", "--config", "scenes-pumer", "--output"], "folder"),
    (["study", "study.yaml", "--out"], "folder"),
    (["study", "study.yaml", "--scratch"], "folder"),
    (["tune", "--model", MODEL, "--max_drop", "1", "--out"], "folder"),
    (["convert", MODEL], "folder"),
    (["viz", "--out"], "file"),
    (["demo", "--record"], "file"),
    (["demo", "--out"], "folder"),
    (["data", "scenes", "--out"], "folder"),
    (["data", "tokenizer", "--out"], "folder"),
    (["data", "check", "vqav2", ".", "--missing"], "file"),
    (["bench", *BENCH, "--record"], "file"),
    (["bench", "llm", "--model", "llava-tiny-shape", "--record"], "file"),
    (["bench", "train", *BENCH, "--record"], "file"),
    (["bench", "where", *BENCH, "--record"], "file"),
    (["bench", "pairs", "--model", "vilt-tiny", "--record"], "file"),
]


@pytest.fixture
def unworkable(monkeypatch):
    """No command does any work: what shows is found out before it."""

    def work(*arguments, **settings):
        pytest.fail("something was computed")

    monkeypatch.setattr(cli, "_function", lambda path: checked(path, work))


def checked(path, work):
    """A function with the arguments of a command, which does something else."""
    module, _, name = path.partition(":")
    return functools.wraps(getattr(importlib.import_module(module), name))(work)


def lines(capsys):
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert 1 <= len(said.splitlines()) <= 5, said
    return said


# --- outputs ---


@pytest.mark.usefixtures("unworkable")
@pytest.mark.parametrize(
    ("words", "kind"), OUTPUTS, ids=lambda value: " ".join(value[:2]) + value[-1]
)
def test_outputs_are_checked_before_the_work(words, kind, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    other = "folder" if kind == "file" else "file"
    for path in (
        tmp_path / other,
        tmp_path / "file/within",
        "/proc/nowhere/out",
        tmp_path / "pipe",
    ):
        assert main([*words, str(path)]) == 2
        assert "name a" in lines(capsys)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder", "pipe"]
    assert (tmp_path / "file").read_text() == "mine"


def test_every_output_is_annotated():
    """An option that is called like an output, of any command, is checked as one."""
    for path, _ in COMMANDS.values():
        function = cli._function(path)
        hints = typing.get_type_hints(function, include_extras=True)
        for name in inspect.signature(function).parameters:
            if name in (
                "out",
                "output",
                "record",
                "samples",
                "missing",
                "scratch",
                "batch_size",
                "runs",
                "batch",
            ):
                assert _checks(hints[name]), f"{path}, {name}"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_what_is_wanted_not_how_it_is_checked(command, capsys):
    assert main([*command.split(), "--help"]) == 0
    assert "Annotated" not in capsys.readouterr().out


def test_options_are_checked_where_they_may_be_none():
    def function(count: "pumer._options.Count | None" = None):
        pass

    check_options({"count": None}, function)
    with pytest.raises(ValueError, match="--count: give a whole number from 1, not 0"):
        check_options({"count": 0}, function)


def test_rows_of_other_columns_are_refused_before_the_work(tmp_path, capsys, monkeypatch):
    record = tmp_path / "rows.csv"
    record.write_text("a,b\n1,2\n")
    work = lambda *arguments, **settings: pytest.fail("something was computed")  # noqa: E731
    for name in (
        "evaluate.open_model",
        "demo._variants",
        "bench.bench",
        "bench.bench_llm",
        "bench.bench_training",
    ):
        monkeypatch.setattr(f"pumer.lab.commands.{name}", work)
    for name in ("bench.sweep", "score.bench_pairs"):
        monkeypatch.setattr(f"pumer.lab.commands.{name}", work)
    for words, _ in OUTPUTS:
        if words[-1] == "--record":
            assert main([*words, str(record)]) == 2
            assert "other columns" in lines(capsys)
    assert record.read_text() == "a,b\n1,2\n"


def test_results_are_shown_even_if_they_cannot_be_written(tmp_path, capsys, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rows.csv")

    monkeypatch.setattr("pumer._rows.append_rows", full)
    assert main([*EVAL, "--record", str(tmp_path / "rows.csv")]) == 1
    said = capsys.readouterr()
    assert "accuracy" in said.out
    assert said.err == "pumer eval: rows.csv: No space left on device\n"


def test_predictions_that_cannot_be_written_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    written = []

    class Task:
        def write_predictions(self, out, predictions, examples):
            if not written:
                written.append(out)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            out.write_text(json.dumps(predictions))

    result = evaluate_command.Result({"1": "yes"}, {}, 1.0, 1)
    with pytest.raises(
        OSError, match=r"out.json cannot be written \(No space left .*the predictions are in"
    ):
        evaluate_command._write(Task(), "far/out.json", result, [])
    (kept,) = tmp_path.glob("pumer-*/out.json")
    assert json.loads(kept.read_text()) == {"1": "yes"}


# --- faults ---


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*EVAL[:-1], "0"], "--batch_size: give a whole number from 1, not 0"),
        (["study", "nowhere.yaml"], "there is no file"),
        (["train", "--config", "nowhere"], "no file, nor a recipe"),
        (["data", "scenes", "--out", "new", "--split", "../../x"], "no plain name"),
    ],
)
def test_what_a_user_can_mend_is_told_in_a_line(words, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in lines(capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_a_device_that_is_not_there(capsys):
    assert main([*EVAL, "--device", "cuda"]) == 2
    assert "no CUDA device" in lines(capsys)


def test_a_package_that_training_misses(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    trainer = '{"report_to": ["tensorboard"], "max_steps": 1}'
    words = [
        "train",
        "--config",
        "scenes-pumer",
        "--model.path",
        "scenes-vilt",
        "--output",
        str(tmp_path / "out"),
    ]
    words += ["--distill", "null"]
    assert main([*words, "--trainer", trainer]) == 2
    assert "pip install '.[train]'" in lines(capsys)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ValueError("wrong"), 2, "wrong"),
        (FileNotFoundError(2, "No such file", "x"), 2, "No such file"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 1, "x: No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, "x: Permission denied"),
        (MemoryError(), 1, "smaller --batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory"), 1, "smaller --batch_size"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ValueError("\n".join(map(str, range(9)))), 2, "5 more lines"),
        (ValueError("\x1b[2Jgone"), 2, "\\x1b[2Jgone"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_have_a_line_and_a_code(error, code, message, capsys, monkeypatch):
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "_function", lambda path: fail)
    assert main(["list"]) == code
    assert message in lines(capsys)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def fail() -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(cli, "_function", lambda path: fail)
    with pytest.raises(RuntimeError, match="a fault"):
        main(["list"])


def test_sigterm_ends_as_ctrl_c_does(tmp_path, capsys, monkeypatch):
    def stop() -> None:
        with new_folder(tmp_path / "out"):
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_function", lambda path: stop)
    assert main(["list"]) == 143
    assert "stopped by SIGTERM" in lines(capsys)
    assert signal.getsignal(signal.SIGTERM) is before
    assert os.listdir(tmp_path) == []


# --- two processes ---


def test_an_output_that_another_process_writes(tmp_path, capsys):
    out = tmp_path / "out"
    pumer.save(tiny.model(), tmp_path / "model")
    commands = (
        ["convert", str(tmp_path / "model"), str(out)],
        ["data", "scenes", "--out", str(out)],
    )
    with new_folder(out):
        for words in commands:
            assert main(words) == 2
            assert "another process is writing" in lines(capsys)


def test_a_score_that_another_process_writes(tmp_path, monkeypatch):
    from pumer.lab.score import run

    class Job:
        chunks = Chunks(2, 2, 1, 1)

        def fingerprint(self):
            return {}

    with locked(tmp_path / "out"), pytest.raises(ValueError, match="another process works in"):
        run.stream_pairs(Job(), tmp_path / "out")


# --- names and texts of others ---


def test_what_others_wrote_is_shown_as_text(capsys):
    from rich.table import Table

    assert visible("a\tb\nß 猫 \u202e\x1b[1m\x07") == "a\tb\nß 猫 \\u202e\\x1b[1m\\x07"
    assert brief("1\n2\n3\n4\n5") == "1\n2\n3\n4\n5"
    screen = console(width=80)
    table = Table(title="[bold]\x1b]0;title")
    table.add_column("[red]")
    table.add_row("[/nothing] \x1b[2J")
    screen.print(table)
    screen.print("[/b]\x1b[31m", style="yellow")
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    for text in ("[bold]\\x1b]0;title", "[red]", "[/nothing] \\x1b[2J", "[/b]\\x1b[31m"):
        assert text in shown


def test_the_split_of_scenes_stays_in_its_folder(tmp_path):
    with pytest.raises(ValueError, match="no plain name"):
        write_vqav2(tmp_path / "a/out", 1, 1, 1, split="../../x")
    assert os.listdir(tmp_path) == []


def test_settings_without_end_are_refused(tmp_path):
    import yaml

    with pytest.raises(ValueError, match="number of layers from 0 to 10000, not 1000000000"):
        pumer.ToMe(depth=10**9)
    with pytest.raises(ValueError, match="layers are whole numbers"):
        pumer.PuMer(layers=(10**9,))
    pumer.save(tiny.model(), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    for broken in ({"num_hidden_layers": 10**9}, {"text_config": {"num_hidden_layers": 1e300}}):
        (tmp_path / "model/config.json").write_text(json.dumps(config | broken))
        with pytest.raises(ValueError, match="is damaged, its num_hidden_layers is"):
            pumer.load(tmp_path / "model")
        with pytest.raises(ValueError, match="is damaged"):
            read_config(tmp_path / "model", "")
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
    )
    for text in (bomb, "a: &a [*a]", "a: !!python/object/apply:os.system [ls]"):
        with pytest.raises(yaml.YAMLError):
            load_yaml(text)
    assert load_yaml("a: &x [1]\nb: *x") == {"a": [1], "b": [1]}


def test_code_in_a_model_folder_is_not_run(tmp_path, monkeypatch):
    """Not even if somebody at a terminal would say yes to transformers' question."""
    monkeypatch.setattr("builtins.input", lambda *arguments: "y")
    config = {
        "model_type": "evil",
        "auto_map": {},
        "image_processor_type": "Evil",
        "tokenizer_class": "Evil",
    }
    for name in (
        "AutoConfig",
        "AutoModelForImageTextToText",
        "AutoTokenizer",
        "AutoProcessor",
        "AutoImageProcessor",
    ):
        config["auto_map"][name] = ["evil.Evil", None] if name == "AutoTokenizer" else "evil.Evil"
    for name in (
        "config",
        "tokenizer_config",
        "processor_config",
        "preprocessor_config",
        "tokenizer",
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    for read in (load_stock, load_tokenizer, read_processor):
        with pytest.raises(ValueError, match=r"evil|code|read"):
            read(str(tmp_path))
    assert not (tmp_path / "ran").exists()
