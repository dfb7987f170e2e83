"""A model for lmms-eval: any decoder that pumer supports, with any reducer or none.

lmms-eval finds it by the entry point in pyproject.toml:

    lmms-eval --model pumer --tasks mme --model_args pretrained=FOLDER,reducer=fastv,keep=0.5

This is the only file that imports lmms_eval.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.image_utils import load_image

from pumer._extras import hint
from pumer._yaml import load_yaml
from pumer.api import apply
from pumer.hub import is_stock
from pumer.hub.reduction import saved_reducer
from pumer.lab.tasks.processors import encode, read_processor, write
from pumer.presets import read_reducer
from pumer.reducers import Reducer, from_dict, to_dict

try:
    from lmms_eval.api.model import lmms
    from lmms_eval.models.registry_v2 import ModelManifest
except ImportError as error:
    raise ImportError(f"benchmarks of lmms-eval need {error.name}: {hint('lmms-eval')}") from error

MANIFEST = ModelManifest(model_id="pumer", chat_class_path="pumer.lmms_eval.PumerModel")
"""What the entry point gives lmms-eval."""
MAX_NEW_TOKENS = 1024
"""Longest answer where a task sets none, as lmms-eval's own models have it."""

Conversation = list[dict[str, Any]]


class PumerModel(lmms):
    """A model that answers questions about images, for lmms-eval.

    Settings that are a reducer's own go to it, the others to the image processor. Strings among
    them are read as YAML,
    so that lists can be given: `layers=[7,15,23]`. A task's `generation_kwargs` go to `generate`: a
    temperature above 0 means sampling unless `do_sample` says otherwise, none means greedy.

    Args:
        pretrained: name or folder of a model with its processor.
        reducer: name of a reducer or of a preset, or a YAML or JSON file; if not given, that which
            the model was saved with, else the stock model runs. "none" is the unreduced model with
            what pumer does besides.
        batch_size: how many prompts run together; they are padded on the left.
        device: where it runs; each process takes its own where accelerate starts several.
        dtype: of the weights, such as "bfloat16"; "auto" as they were saved.
        attn_implementation: see transformers.
        revision: of the model on the Hub.
        settings: of the reducer, such as `keep`; and of the image processor, such as `max_pixels`.

    Raises:
        ValueError: for models, reducers and settings that do not exist or do not fit together.
    """

    is_simple = False  # lmms-eval then gives conversations, with every image in its place

    def __init__(
        self,
        pretrained: str,
        reducer: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str = "auto",
        attn_implementation: str | None = None,
        revision: str = "main",
        **settings: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(
                f"batch_size is {batch_size}: give a number from 1 on, it is not found by itself"
            )
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        alone = self._world_size == 1
        self.device = (
            torch.device(device) if device is not None and alone else self.accelerator.device
        )
        chosen, processor_settings = _split(
            _saved(pretrained, revision) if reducer is None else reducer, settings
        )
        self.processor = read_processor(pretrained, revision=revision, **processor_settings)
        _check(processor_settings, self.processor.image_processor, chosen)
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained,
            revision=revision,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=False,
        )
        self.model = model.to(self.device).eval()
        if chosen is not None:
            apply(self.model, chosen)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The answers, in the order of the requests.

        Raises:
            ValueError: for inputs other than images, and for `generation_kwargs` that `generate`
                rejects.
        """
        alike = defaultdict(list)  # what is generated in the same way can be generated together
        for request_index, request in enumerate(requests):
            alike[str(request.args[2])].append(request_index)
        answers = [""] * len(requests)
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="pumer")
        for numbers in alike.values():
            settings = requests[numbers[0]].args[2]
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                conversations = [
                    self._conversation(requests[request_index]) for request_index in batch
                ]
                for request_index, answer in zip(
                    batch, self.answer(conversations, settings), strict=True
                ):
                    answers[request_index] = answer
                progress.update(len(batch))
        progress.close()
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The answers of every request, round by round: the task builds the next prompt from the
        answers so far.

        Raises:
            ValueError: as `generate_until`.
        """
        answers = []
        for request in requests:
            _, messages_of, settings, doc_id, task, split = request.args
            doc, info, rounds = self.task_dict[task][split][doc_id], None, []
            messages, end = messages_of(doc), False
            while not end:
                rounds += self.answer([messages], settings)
                messages, end, _, info = messages_of(
                    doc,
                    round_idx=len(rounds),
                    previous_output=list(rounds),
                    previous_round_info=info,
                )
            answers.append(rounds)
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Not implemented: lmms-eval does not call it for chat models, whose implementations
        disagree on its sign."""
        raise NotImplementedError(
            "pumer writes answers, it does not compare given ones: take the form of the task that "
            "generates, such as seedbench in place of seedbench_ppl"
        )

    def answer(
        self, conversations: Sequence[Conversation], settings: Mapping[str, Any]
    ) -> list[str]:
        """The model's answers to a batch of conversations.

        Args:
            conversations: messages of lmms-eval's chat protocol, images as PIL images, files or
                addresses.
            settings: a task's `generation_kwargs`; those that `generate` does not know are ignored.

        Raises:
            ValueError: for content other than texts and images.
        """
        images = [
            [load_image(part["url"]) for part in _parts(messages, "image")]
            for messages in conversations
        ]
        answers = [""] * len(conversations)
        for with_images in (True, False):  # processors take no batches of which some have no image
            rows = [row for row, row_images in enumerate(images) if bool(row_images) is with_images]
            if rows:
                written = self._write(
                    [conversations[row] for row in rows], [images[row] for row in rows], settings
                )
                for row, text in zip(rows, written, strict=True):
                    answers[row] = _cut(text, settings.get("until"))
        return answers

    @torch.inference_mode()
    def _write(
        self, conversations: list[Conversation], images: list[list[Any]], settings: Mapping
    ) -> list[str]:
        prompts = [write(self.processor, _plain(messages)) for messages in conversations]
        inputs = encode(self.processor, prompts, images).to(self.device, self.model.dtype)
        tokenizer = self.processor.tokenizer
        ids = self.model.generate(
            **inputs, **_generation(settings), pad_token_id=tokenizer.pad_token_id
        )
        texts: list[str] = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return texts

    def _conversation(self, request: Any) -> Conversation:
        _, messages_of, _, doc_id, task, split = request.args
        messages: Conversation = messages_of(self.task_dict[task][split][doc_id])
        return messages


def _saved(model: str, revision: str) -> Reducer | None:
    """The reducer that a model was saved with; None for a stock model."""
    return None if is_stock(model, revision=revision) else saved_reducer(model, revision=revision)


def _split(
    reducer: str | Reducer | None, settings: dict[str, Any]
) -> tuple[Reducer | None, dict[str, Any]]:
    """The reducer with those of the settings that belong to it, and the other settings."""
    settings = {name: load_yaml(x) if isinstance(x, str) else x for name, x in settings.items()}
    if reducer is None:
        return None, settings
    base = read_reducer(reducer)
    names = {field.name for field in dataclasses.fields(base)}
    reducer_settings = {name: settings.pop(name) for name in names & set(settings)}
    return from_dict(to_dict(base) | reducer_settings), settings


def _check(settings: dict[str, Any], image_processor: Any, reducer: Reducer | None) -> None:
    """Raise ValueError for unknown settings, which transformers would silently ignore."""
    valid_settings = type(image_processor).valid_kwargs.__annotations__
    unknown = sorted(set(settings) - set(valid_settings))
    if unknown:
        reader_name = (
            "no reducer"
            if reducer is None
            else f"{reducer.name}, which has {', '.join(reducer.settings()) or 'none'}"
        )
        raise ValueError(
            f"{', '.join(unknown)} is a setting neither of {reader_name}, nor of "
            f"{type(image_processor).__name__}, which has {', '.join(sorted(valid_settings))}"
        )


def _parts(messages: Conversation, part_type: str) -> Iterator[dict[str, Any]]:
    for message in messages:
        for part in message["content"]:
            if part["type"] not in ("text", "image"):
                raise ValueError(
                    f"pumer reduces images: it cannot run a task with {part['type']}, take "
                    "another one"
                )
            if part["type"] == part_type:
                yield part


def _plain(messages: Conversation) -> Conversation:
    """The conversation with image placeholders in place of images, for chat templates."""
    return [
        message
        | {
            "content": [
                {k: v for k, v in part.items() if k != "url"} for part in message["content"]
            ]
        }
        for message in messages
    ]


def _generation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task's settings as arguments of `generate`; greedy by default, whatever the model's own
    default."""
    options = {
        name: x
        for name, x in settings.items()
        if x is not None and hasattr(GenerationConfig(), name)
    }
    temperature = options.get("temperature")
    options["do_sample"] = bool(options.get("do_sample", temperature)) and temperature != 0
    if not options["do_sample"]:
        options |= dict.fromkeys(("temperature", "top_p", "top_k"))
    return {"max_new_tokens": MAX_NEW_TOKENS} | options


def _cut(text: str, until: str | Sequence[str] | None) -> str:
    for end in [until] if isinstance(until, str) else until or []:
        text = text.split(end)[0] if end else text
    return text.strip()
