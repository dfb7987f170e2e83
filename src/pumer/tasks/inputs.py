"""Inputs for a model: texts and images of your own to what its forward, or its `generate`, takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from pumer.data.images import ImageSource, Upright
from pumer.hub import is_stock
from pumer.presets import model_folder
from pumer.tasks.base import Collator, Example, Task
from pumer.tasks.processors import ProcessorCollator, saved_collator
from pumer.tasks.prompts import PromptCollator

Images = ImageSource | Sequence[ImageSource] | Sequence[Sequence[ImageSource]]


@dataclass(frozen=True)
class _Asking(Task):
    """Texts about images that nobody has answered."""

    image_count: int = 1  # type: ignore[misc]  # of each text, where other tasks have always as many
    name = "inputs"
    loss_kind = "soft"
    labels = ()

    def examples(self, split: str) -> Sequence[Example]:
        return ()

    def score(self, prediction: Any, example: Example) -> float:
        raise ValueError("nobody has answered these")

    def write_predictions(self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]) -> None:
        raise ValueError("no test server takes these")


class Inputs:
    """Makes a batch of texts and images as `model` was trained to take it: a dict for `model(**batch)`.

    `load_inputs` makes one. Called with one text and its image, or a list of both. An image is a path,
    its encoded bytes or a PIL image; a text with several of them has a list. Texts are padded to the
    longest, and cut to what the model reads. Tensors come on the model's device, in its dtype.

    Raises ValueError for empty texts, images that cannot be read, and numbers of images that the
    model does not take.
    """

    def __init__(self, model: Any, collator: Collator) -> None:
        self.model, self.collator = model, collator

    def __call__(self, texts: str | Sequence[str], images: Images) -> dict[str, Tensor]:
        single = isinstance(texts, str)
        asked: Sequence[str] = [texts] if isinstance(texts, str) else texts
        groups: Sequence[Any] = [images] if single else images  # type: ignore[list-item, assignment]
        rows = [[group] if _is_image(group) else list(group) for group in groups]
        if len(rows) != len(asked) or not rows:
            raise ValueError(f"{len(asked)} texts and {len(rows)} images: give each text its image, or a list of them")
        counts = sorted({len(row) for row in rows})
        if not isinstance(self.collator, ProcessorCollator) and counts != [self._image_count()]:
            raise ValueError(
                f"texts have {', '.join(map(str, counts))} images; {type(self.model).__name__} takes "
                f"{self._image_count()} each"
            )
        collator = replace(self.collator, task=_Asking(counts[0]))
        examples = [
            Example(index, text, row, None, index) for index, (text, row) in enumerate(zip(asked, rows, strict=True))
        ]
        device, dtype = self.model.device, self.model.dtype
        return {
            name: x.to(device, dtype) if x.is_floating_point() else x.to(device)
            for name, x in collator(examples).items()
        }

    def _image_count(self) -> int:
        if isinstance(self.collator, PromptCollator):
            return 1
        # ViLT's configuration says -1 where there is only one.
        return max(int(getattr(self.model.config, "num_images", 1)), 1)


def load_inputs(source: str | Path, model: Any) -> Inputs:
    """What makes inputs for a model, from the tokenizer and image transform, or processor, beside it.

    Args:
        source: the model's folder, a shipped one's name, or a stock decoder's name on the Hub.
        model: loaded from there, reduced or not.

    Raises:
        ValueError: where the folder has no tokenizer, or neither transform nor processor.
    """
    folder = str(source) if is_stock(str(source)) else str(model_folder(source))
    try:
        collator = saved_collator(folder, model, _Asking())
    except OSError as error:
        raise ValueError(f"{folder} has no tokenizer that can be read: save the model's there too") from error
    if isinstance(collator, ProcessorCollator):
        collator = replace(collator, instruction="")
    return Inputs(model, collator)


def _is_image(value: Any) -> bool:
    return isinstance(value, bytes | str | Path | Image.Image | Upright)
