"""Images that were encoded before the call that they are for.

`generate` asks for the image features first and hands the vision tower's output on to the forward.
What is known of these images is kept beside the output, never on it: hooks that move tensors
between devices rebuild every output.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pumer.adapters.decoder.prompt import Picture


class EncodedImages:
    """What is known of images, for as long as anybody holds their features."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, in which nobody holds the features."""
        return {}

    def __setstate__(self, _: Any) -> None:
        self.__init__()  # type: ignore[misc]

    def remember(self, output: Any, images: list[Picture]) -> None:
        """Note the images of an output of `get_image_features`."""
        for features in _tensors(output):
            self._known[features] = images

    def recall(self, output: Any) -> list[Picture]:
        """The images of an output, or of one that was rebuilt from its tensors or copies of them.

        Raises:
            ValueError: if nothing is known of them.
        """
        outputs = list(_tensors(output))
        for features in outputs:
            if features in self._known:
                images: list[Picture] = self._known[features]
                return images
        # They were copied, as between devices: seldom, and the host has to look at them.
        for features, images in list(self._known.items()):
            if any(_same(features, other) for other in outputs):
                return list(images)
        raise ValueError(
            "nothing is known of the images in mm_encoder_outputs: give what get_image_features "
            "returns while this reducer is in force, all in one prefill (leave prefill_chunk_size "
            "unset)"
        )


def _same(features: Tensor, other: Tensor) -> bool:
    if features.shape != other.shape:
        return False
    return torch.equal(features, other.to(features.device, features.dtype))


def _tensors(output: Any) -> Iterator[Tensor]:
    """The features, and what the tower gives besides."""
    if isinstance(output, tuple):  # not what `mm_encoder_outputs` takes
        return
    for value in (output.pooler_output, *output.values()):
        yield from (
            item
            for item in ([value] if isinstance(value, Tensor) else value or ())
            if isinstance(item, Tensor)
        )
