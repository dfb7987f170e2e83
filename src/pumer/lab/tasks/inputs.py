"""Model inputs from your own texts and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature

from pumer.hub.files import read_config
from pumer.hub.folders import base_of, class_in
from pumer.hub.sources import ADAPTER, CONFIG, PROCESSING, find_source
from pumer.lab.data.images import ImageSource, Upright
from pumer.lab.tasks.base import Collator, Example, Task
from pumer.lab.tasks.processors import ProcessorCollator, saved_collator
from pumer.lab.tasks.prompts import PromptCollator

Images = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]]


@dataclass(frozen=True)
class _Asking(Task):
    """Texts about images, without answers."""

    image_count: int = 1  # type: ignore[misc]  # of each text, where other tasks have always as many
    name = "inputs"
    loss_kind = "none"
    labels = ()

    def examples(self, split: str) -> Sequence[Example]:
        return ()

    def score(self, prediction: Any, example: Example) -> float:
        raise ValueError("nobody has answered these")

    def write_predictions(
        self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]
    ) -> None:
        raise ValueError("no test server takes these")


class Inputs:
    """Makes a batch of texts and images as a model was trained to take it, for `model(**batch)`.

    `processor` and `load_inputs` make one. Called with one text and its image, or a list of both.
    An image is a path, its encoded bytes or a PIL image; a text with several of them has a list.
    Texts are padded to the longest, and cut to what the model reads.

    Raises ValueError for empty texts, images that cannot be read, and numbers of images that the
    model does not take.

    Args:
        model: the class and configuration count; so do device and dtype, where the weights are
            there.
        collator: of the model, for questions that nobody has answered.
    """

    def __init__(self, model: Any, collator: Collator) -> None:
        self.model, self.collator = model, collator

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, to decode what it generates."""
        return self.collator.text.tokenizer

    def __call__(self, texts: str | Sequence[str], images: Images) -> BatchFeature:
        single = isinstance(texts, str)
        asked: Sequence[str] = [texts] if isinstance(texts, str) else texts
        groups: Sequence[Any] = [images] if single else images  # type: ignore[list-item, assignment]
        rows = [[group] if _is_image(group) else list(group) for group in groups]
        if len(rows) != len(asked) or not rows:
            raise ValueError(
                f"{len(asked)} texts and {len(rows)} images: give each text its image, or a list "
                "of them"
            )
        counts = sorted({len(row) for row in rows})
        if not isinstance(self.collator, ProcessorCollator) and counts != [self._image_count()]:
            raise ValueError(
                f"texts have {', '.join(map(str, counts))} images; {type(self.model).__name__} "
                f"takes {self._image_count()} each"
            )
        collator = replace(self.collator, task=_Asking(counts[0]))
        examples = [
            Example(index, text, row, None, index)
            for index, (text, row) in enumerate(zip(asked, rows, strict=True))
        ]
        batch = BatchFeature(collator(examples))
        if self.model.device.type == "meta":
            return batch
        return batch.to(self.model.device, self.model.dtype)

    def _image_count(self) -> int:
        if isinstance(self.collator, PromptCollator):
            return 1
        # ViLT's configuration says -1 where there is only one.
        return max(int(getattr(self.model.config, "num_images", 1)), 1)


def processor(source: str | Path, **arguments: Any) -> Inputs:
    """What makes a model's inputs, as pumer's commands make them, from what lies beside its
    weights.

    Args:
        source: the model's folder, a shipped one's name, or an owner's and a model's name on the
            Hub.
        arguments: `revision`, `token`, `cache_dir` and the like, where it is on the Hub.

    Returns:
        A function of a text and its image, or lists of them, that gives a batch on the CPU in
        float32: `.to(model.device, model.dtype)` moves it.

    Raises:
        ValueError: where there is no such model, or no tokenizer beside it, or neither an image
            transform nor a processor.

    Example:
        >>> from PIL import Image
        >>> model = pumer.load("scenes-vilt-pumer")
        >>> make_inputs = pumer.processor("scenes-vilt-pumer")
        >>> answer = model(**make_inputs("is there a red circle?", Image.new("RGB", (96, 96))))
    """
    folder = _folder(source, arguments)
    cls = class_in(read_config(folder, "save the model there"), folder)
    with torch.device("meta"):  # its class and configuration say it all
        model = cls(cls.config_class.from_pretrained(folder, local_files_only=True))
    return load_inputs(folder, model.float())


def load_inputs(source: str | Path, model: Any) -> Inputs:
    """`processor` for a model that is loaded: its batches are on the model's device, in its dtype.

    Args:
        source: the model's folder, a shipped one's name, or an owner's and a model's name on the
            Hub.
        model: loaded from there, reduced or not.

    Raises:
        ValueError: where the folder has no tokenizer, or neither transform nor processor.
    """
    folder = _folder(source, {})
    try:
        collator = saved_collator(str(folder), model, _Asking())
    except OSError as error:
        raise ValueError(
            f"{folder} has no tokenizer that can be read: save the model's there too"
        ) from error
    if isinstance(collator, ProcessorCollator):
        collator = replace(collator, instruction="")
    return Inputs(model, collator)


def _folder(source: str | Path, hub: Mapping[str, Any]) -> Path:
    """Where the files are that say how a model takes its inputs; for an adapter of PEFT, its base
    model's."""
    files = (CONFIG, *PROCESSING)
    model = find_source(source, files, **hub)
    if model.has(ADAPTER) and not model.has(CONFIG):
        model = base_of(model, files, hub)
    if not model.has(CONFIG):
        raise ValueError(f"{source} is not a model folder: there is no {CONFIG} in it")
    return model.folder


def _is_image(value: Any) -> bool:
    return isinstance(value, bytes | str | Path | Image.Image | Upright)
