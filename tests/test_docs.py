"""The code in the documents, as it stands: each Python block runs, each command is one."""

import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import pumer
import tiny
import tiny_llm
from pumer.adapters import base
from pumer.cli import COMMANDS, _function
from pumer.commands.words import unknown_command, unknown_option
from pumer.data.text import train_tokenizer
from pumer.data.transforms import Square, save_transform
from pumer.reducers import registry

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)


def blocks(path, *languages):
    return [code for language, code in BLOCK.findall(path.read_text(encoding="utf-8")) if language in languages]


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
            lambda name, *args, **kwargs: make() if str(name).count("/") == 1 else stock(name, *args, **kwargs),
        )

    replace(transformers.ViltForQuestionAnswering, vilt)
    joint, decoder = Processor(lambda: tiny.batch(rows=1)), Processor(lambda: tiny_llm.batch("llava"))
    replace(transformers.ViltProcessor, lambda: joint)
    replace(transformers.AutoProcessor, lambda: decoder)
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
    """The words of every `pumer` command in a document's shell blocks and tables."""
    text = path.read_text(encoding="utf-8")
    lines = [line for code in blocks(path, "sh", "bash") for line in code.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(pumer [a-z][^`]*)`", text)
    for line in lines:
        words = shlex.split(line, comments=True)
        if "pumer" in words[:1]:
            yield words[1:]
        elif "pumer.cli" in words:
            yield words[words.index("pumer.cli") + 1 :]


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.stem for path in DOCUMENTS])
def test_commands_are_ones_with_these_options(path):
    for words in commands(path):
        assert unknown_command(words, COMMANDS) is None, words
        name = " ".join(words[:2]) if " ".join(words[:2]) in COMMANDS else words[0]
        assert unknown_option(words, options(name)) is None, words


@functools.cache
def options(name):
    return [*inspect.signature(_function(COMMANDS[name][0])).parameters, "config", "help"]


def test_there_is_something_to_check():
    assert {"README", "start", "add-a-reducer", "add-a-model"} <= {path.stem for path in RUNNING}
    assert sum(len(list(commands(path))) for path in DOCUMENTS) > 20
    assert torch.is_tensor(tiny.batch()["input_ids"])
