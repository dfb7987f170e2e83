"""Evaluate a model on a task: predictions per example, a metric with its interval, a prediction
file."""

from __future__ import annotations

import inspect
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList

from pumer._files import replacing
from pumer.lab.data.images import BrokenImageError, open_image
from pumer.lab.tasks.base import Collator, Example, Task
from pumer.lab.tasks.prompts import MAX_ANSWER, GenerativeCollator
from pumer.lab.tasks.retrieval import ranking_scores

NOT_NUMBERS = (
    "{} are NaN: the model's weights are damaged, or overflow in half precision; get the model "
    "again, or use float32"
)
_NO_INPUTS = ("labels", "patch_labels", "teacher_logits", "texts_per_image")


@dataclass(frozen=True)
class Result:
    """The outcome of an evaluation.

    `predictions` are by example id. `broken` holds the examples whose images could not be read, by
    id, with the reason. `seconds` is the time spent in the model, for `examples` examples.
    """

    predictions: dict[Any, Any]
    metric: dict[str, float]
    seconds: float
    examples: int
    broken: dict[Any, str] = field(default_factory=dict)

    @property
    def per_second(self) -> float:
        """Examples per second of model time."""
        return self.examples / self.seconds if self.seconds else 0.0


def predict(
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    *,
    batch_size: int = 32,
    skip_broken: bool = False,
    show_progress: bool = False,
) -> Result:
    """Predict every example; the metric is left empty.

    Args:
        model: reduced or not, on its device.
        examples: of a task's split.
        collator: that task's, with the model's transforms.
        skip_broken: skip and report examples with unreadable images, instead of failing.
        show_progress: show a bar.

    Raises:
        BrokenImageError: for an unreadable image, unless `skip_broken`.
    """
    device = next(model.parameters()).device
    model.eval()
    predictions: dict[Any, Any] = {}
    broken: dict[Any, str] = {}
    seconds = 0.0
    steps = -(-len(examples) // batch_size)
    for chunk in track(
        _chunks(examples, batch_size), "predicting", total=steps, disable=not show_progress
    ):
        if skip_broken:
            chunk = _readable(chunk, broken)
        if not chunk:
            continue
        batch = collator(chunk)
        inputs = paired(model, model_inputs(batch, device), batch.get("texts_per_image", 1))
        start = time.perf_counter()
        answers = answer(model, inputs, collator, len(chunk))
        seconds += time.perf_counter() - start
        predictions |= zip((example.id for example in chunk), answers, strict=True)
    return Result(predictions, {}, seconds, len(predictions), broken)


def answer(model: Any, inputs: Mapping[str, Any], collator: Collator, count: int) -> list[Any]:
    """Predictions for `count` examples: the most likely labels, or the generated answers.

    Args:
        model: reduced or not, in eval mode.
        inputs: of the model's forward, on its device.
        collator: the one that made the batch.

    Raises:
        ValueError: for NaN outputs.
    """
    with torch.inference_mode():
        if isinstance(collator, GenerativeCollator):
            written = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=MAX_ANSWER,
                logits_processor=LogitsProcessorList([_Numbers()]),
            )
            return collator.read(written[:, inputs["input_ids"].shape[1] :])
        logits = model(**inputs).logits.float().cpu()
    if nan := int(logits.isnan().flatten(1).any(1).sum()):
        raise ValueError(NOT_NUMBERS.format(f"the outputs for {nan} of {len(logits)} inputs"))
    if collator.task.loss_kind == "rank":  # a row per image
        logits = ranking_scores(logits).reshape(count, -1)
    return collator.task.decode(collator.in_task_order(logits))


class _Numbers(LogitsProcessor):
    """Raise ValueError for NaN logits of the next tokens."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if nan := int(scores.isnan().any(1).sum()):
            raise ValueError(NOT_NUMBERS.format(f"the outputs for {nan} of {len(scores)} prompts"))
        return scores


def model_inputs(batch: Mapping[str, Any], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The inputs of a model's forward from a collated batch, without training targets."""
    return {name: value.to(device) for name, value in batch.items() if name not in _NO_INPUTS}


def paired(model: Any, inputs: dict[str, Tensor], texts_per_image: int) -> dict[str, Any]:
    """Inputs with an image for every text; models that can repeat images after their vision tower
    do that themselves."""
    if texts_per_image == 1:
        return inputs
    if "texts_per_image" in inspect.signature(type(model.base_model).forward).parameters:
        return {**inputs, "texts_per_image": texts_per_image}
    images = {
        name: inputs[name].repeat_interleave(texts_per_image, 0)
        for name in ("pixel_values", "pixel_mask")
    }
    return {**inputs, **images}


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    collator: Collator,
    *,
    batch_size: int = 32,
    show_progress: bool = False,
) -> Result:
    """Predict and score every example of a labelled split; the metric's `constant` is
    `constant_accuracy`."""
    result = predict(model, examples, collator, batch_size=batch_size, show_progress=show_progress)
    examples = [
        replace(example, images=()) for example in examples
    ]  # once, because they may be generated
    constant = constant_accuracy(collator.task, examples)
    metric = collator.task.metric(result.predictions, examples) | {"constant": constant}
    return Result(result.predictions, metric, result.seconds, result.examples)


def constant_accuracy(task: Task, examples: Sequence[Example]) -> float:
    """The score of the best constant answer on these examples, in percent.

    Any answer in the data counts, also ones that a model does not know. For ranking, where no
    answer can be constant, it is the expected score of a random choice.
    """
    if any(example.negatives for example in examples):
        return round(
            100 * sum(1 / (1 + len(example.negatives)) for example in examples) / len(examples), 2
        )
    scores: defaultdict[Any, float] = defaultdict(float)
    for example in examples:
        for label, score in task.answer_scores(example).items():
            scores[label] += score
    return round(100 * max(scores.values(), default=0.0) / len(examples), 2)


def take(examples: Sequence[Example], numbers: Sequence[int]) -> list[Example]:
    """The examples at these indices, fetched together where a task supports that."""
    many = getattr(examples, "__getitems__", None)
    return many(list(numbers)) if many else [examples[index] for index in numbers]


def write_samples(
    path: str | Path, result: Result, examples: Sequence[Example], collator: Collator
) -> None:
    """Write one JSON line per example, atomically: id, text, prediction, and score if there is a
    label."""
    with replacing(path) as file:
        for example in examples:
            if example.id not in result.predictions:
                continue
            prediction = result.predictions[example.id]
            row = {"id": example.id, "text": example.text, "prediction": prediction}
            if example.target is not None:
                row["score"] = collator.task.score(prediction, example)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _chunks(examples: Sequence[Example], size: int) -> Iterator[list[Example]]:
    for start in range(0, len(examples), size):
        yield take(examples, range(start, min(start + size, len(examples))))


def _readable(chunk: Sequence[Example], broken: dict[Any, str]) -> list[Example]:
    readable = []
    for example in chunk:
        try:
            for image in example.images:
                open_image(image, name=f"the image of example {example.id}")
            readable.append(example)
        except BrokenImageError as error:
            broken[example.id] = str(error)
    return readable
