"""The code in the documents, as it stands: each Python block runs, each command is one."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import tiny
import tiny_llm
import tiny_retrieval
import torch
import transformers
from PIL import Image

import pumer
from pumer.adapters import base
from pumer.cli import COMMANDS, POSITIONAL, _function
from pumer.lab.commands.help import options
from pumer.lab.commands.parsing import parse
from pumer.lab.commands.words import unknown_command
from pumer.lab.data.text import train_tokenizer
from pumer.lab.data.transforms import Square, build_transform, save_transform
from pumer.lab.tasks import build
from pumer.lab.train.arguments import trainer_settings
from pumer.presets import read_reducer
from pumer.reducers import registry

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def blocks(path, *languages):
    return [
        code
        for language, code in BLOCK.findall(path.read_text(encoding="utf-8"))
        if language in languages
    ]


class Processor:
    """Stands for the processor of a checkpoint that cannot be downloaded."""

    def __init__(self, make):
        self.make = make

    def __call__(self, *args, **kwargs):
        assert args or kwargs
        return self.make()

    def save_pretrained(self, folder):
        Path(folder).mkdir(exist_ok=True)

    def batch_decode(self, *args, **kwargs):
        return ["two"]


@pytest.fixture
def checkpoints(monkeypatch, tmp_path):
    """Small models where the documents name released ones, and an image and a folder to work in."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (96, 96), "orange").save("cats.jpg")
    Image.new("RGB", (96, 96), "black").save("dogs.jpg")
    Image.new("RGB", (96, 96), "red").save("image.png")
    answers = {number: f"answer {number}" for number in range(7)}
    vilt = functools.partial(tiny.model, num_hidden_layers=12, id2label=answers)
    _retrieval("my-meter")

    def replace(cls, make):
        """Answer for released checkpoints, whose names have an owner; read folders as ever."""
        stock = cls.from_pretrained
        monkeypatch.setattr(
            cls,
            "from_pretrained",
            lambda name, *args, **kwargs: (
                make() if str(name).count("/") == 1 else stock(name, *args, **kwargs)
            ),
        )

    replace(transformers.ViltForQuestionAnswering, vilt)
    joint, decoder = (
        Processor(lambda: tiny.batch(rows=1)),
        Processor(lambda: tiny_llm.batch("llava")),
    )
    replace(transformers.ViltProcessor, lambda: joint)
    replace(transformers.AutoProcessor, lambda: decoder)
    pages = Processor(lambda: tiny_retrieval.batch("colpali", ((4, "i", 6),)))
    pages.score_retrieval = functools.partial(transformers.ColPaliProcessor.score_retrieval, None)
    replace(transformers.ColPaliProcessor, lambda: pages)
    replace(transformers.ColPaliForRetrieval, lambda: tiny_retrieval.model("colpali"))
    replace(transformers.AutoModelForImageTextToText, lambda: tiny_llm.model("llava"))
    monkeypatch.setattr(pumer, "load_official", lambda path: vilt())
    # What a document registers is gone with it.
    monkeypatch.setattr(registry, "_REDUCERS", dict(registry._REDUCERS))
    monkeypatch.setattr(base, "_ADAPTERS", list(base._ADAPTERS))
    return tmp_path


def _retrieval(folder):
    """A small retrieval model with its tokenizer and image transform."""
    pumer.save(tiny.model("MeterForImageAndTextRetrieval"), folder)
    train_tokenizer(["a cat", "two dogs"], 50).save_pretrained(folder)
    save_transform(Square(96), folder)


RUNNING = [path for path in DOCUMENTS if blocks(path, "python")]


@pytest.mark.parametrize("path", RUNNING, ids=[path.stem for path in RUNNING])
@pytest.mark.filterwarnings("ignore:`seen_tokens`")
def test_python_blocks_run(path, checkpoints, capsys):
    namespace = {"__name__": "document"}
    for code in blocks(path, "python"):
        exec(compile(code, str(path), "exec"), namespace)


def commands(path):
    """The words of every `pumer` command in a document, and whether it may lack some.

    Those in shell blocks are whole, but for dots; those in text and tables are often only named.
    """
    text = path.read_text(encoding="utf-8")
    lines = [
        (line, "..." in line)
        for code in blocks(path, "sh", "bash")
        for line in code.replace("\\\n", " ").splitlines()
    ]
    lines += [(line, True) for line in re.findall(r"`(pumer [a-z][^`]*)`", text)]
    for line, partial in lines:
        words = [word for word in shlex.split(line, comments=True) if word != "..."]
        if "pumer" in words[:1]:
            yield words[1:], partial
        elif "pumer.cli" in words:
            yield words[words.index("pumer.cli") + 1 :], partial


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.stem for path in DOCUMENTS])
def test_commands_are_ones_that_can_be_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # documents name them as from a checkout
    for words, partial in commands(path):
        check_command(words, partial)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evall", "no command"),
        ("eval --modle m", "no option --modle"),
        ("eval --model m --batch_size ten", "--batch_size is ten"),
        ("eval --model m --device gpu", "give auto, cpu or cuda"),
        ("eval --model m --reducer tome --reducer.dpth 3", "no setting dpth"),
        ("bench --reducers [tomee]", "Did you mean 'tome'"),
        ("eval --model m --task vqav2 --task.rot d", "no setting rot"),
        ("train --config scenes-pumer --output o --trainer.max_stps 3", "no setting max_stps"),
        ("train --config scenes-pumer --output o --image.kind squar", "not 'squar'"),
    ],
)
def test_a_command_that_cannot_be_run_is_found(line, message):
    with pytest.raises(ValueError, match=message):
        check_command(line.split())


def check_command(words, partial=False):
    """Raise ValueError for names and values that a command does not take.

    Nothing is run, and no file need be there. `partial`: words may be missing.
    """
    if (problem := unknown_command(words, COMMANDS)) is not None:
        raise ValueError(problem)
    name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
    words = [word for word in words[len(name.split()) :] if word != "--help"]
    path = COMMANDS[name][0]
    try:
        values = parse(
            _function(path), options(path), words, name in POSITIONAL, recipes=name == "train"
        )
    except ValueError as error:
        if partial and re.match(r"give |--\w+ has no value", str(error)):
            return
        raise
    if "settings" in values:  # a dataclass whose fields are the command's options
        values |= vars(values["settings"])
    for reducer in (values.get("reducer"), *(values.get("reducers") or ())):
        if reducer is not None:
            read_reducer(reducer)
    if isinstance(values.get("task"), dict):
        build(values["task"])
    trainer_settings(values.get("trainer") or {}, early_stopping=False)
    if values.get("image") and isinstance(values["image"], dict):
        build_transform(values["image"])


RESULTS = ROOT / "benchmarks" / "RESULTS.md"
SECTIONS = {
    section.splitlines()[0]: section
    for section in re.split(r"^## ", RESULTS.read_text(encoding="utf-8"), flags=re.M)[1:]
}


@pytest.mark.parametrize("title", SECTIONS)
def test_results_name_the_files_of_their_rows(title):
    section = SECTIONS[title]
    assert "\n|---|" in section
    files = re.findall(r"`(results/[^`]*)`", section)
    assert files
    assert [file for file in files if not (RESULTS.parent / file).is_file()] == []


DERIVED = {
    "Scenes-VQA": "1.83 1.80 1.78 1.82 8.45",  # quotients of examples per second
    "PuMer without its parts": "0.6 1.76 0.3 1.52 0.4 1.46 0.9 1.8 2.03 2.01 0.1 1.31",  # paper
    "Questions of your own": "7.7 7.9 2.0 4.5 6.4 3.3",  # minutes, from the logs
}
"""Numbers that are not in a section's files, by the start of its title."""
SCALES = torch.tensor((1.0, 100.0, 1000.0, 2.0**-20), dtype=torch.float64)
"""As they are, in percent, in milliseconds, in MiB."""


def strangers(title, section):
    """Decimal numbers in the section's tables that its files do not have, up to rounding."""
    linked = re.findall(r"\((results/[^)]*\.md)\)", section)
    text = " ".join(
        (RESULTS.parent / file).read_text(encoding="utf-8")
        for file in (*re.findall(r"`(results/[^`]*)`", section), *linked)
    )
    values = {float(number) for number in re.findall(r"\d+(?:\.\d+)?", text)}
    values = torch.outer(torch.tensor([*values], dtype=torch.float64), SCALES).flatten()
    derived = [numbers for start, numbers in DERIVED.items() if title.startswith(start)]
    cells = [
        cell
        for line in section.splitlines()
        if line.startswith("|")
        for cell in line.split("|")[2:]
    ]
    return [
        number
        for number in re.findall(r"\d+\.\d+", " ".join(cells))
        if number not in " ".join(derived).split()
        and (values - float(number)).abs().min() > 0.5001 * 10.0 ** -len(number.split(".")[1])
    ]


@pytest.mark.parametrize("title", SECTIONS)
def test_tables_have_the_numbers_of_their_rows(title):
    assert strangers(title, SECTIONS[title]) == []


def test_a_number_of_no_row_is_noticed():
    title = next(title for title in SECTIONS if title.startswith("ViLT-B/32"))
    assert strangers(title, SECTIONS[title].replace("60.8 MiB", "61.7 MiB")) == ["61.7"]


def test_results_have_the_footnotes_that_they_point_to():
    text = RESULTS.read_text(encoding="utf-8")
    notes = re.findall(r"^\[\^([\w-]+)\]: ", text, re.M)
    assert len(notes) == len({*notes}) > 0
    assert {*notes} == {*re.findall(r"\[\^([\w-]+)\](?!:)", text)}


def test_there_is_something_to_check():
    assert {"README", "start", "add-a-reducer", "add-a-model"} <= {path.stem for path in RUNNING}
    assert sum(len(list(commands(path))) for path in DOCUMENTS) > 20
    assert torch.is_tensor(tiny.batch()["input_ids"])
