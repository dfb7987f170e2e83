"""What is computed once per image, once per text, and per pair.

METER runs each tower once, and its fusion layers per pair. ViLT has one encoder for both, and
BridgeTower's stock class runs towers and cross-modal layers together, so only patch embedding is
done once per image.

Shape suffixes: B batch, T text tokens, I image tokens, D channels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from pumer.adapters.encoder.patches import embed_patches
from pumer.adapters.rebind import rebind
from pumer.api import active
from pumer.lab.tasks.retrieval import ranking_scores

Inputs = dict[str, Tensor]


class Pairs(ABC):
    """The parts of a model, with its active reducer."""

    def __init__(self, model: Any) -> None:
        self.model = model

    @abstractmethod
    def images(self, pixel_values_B3HW: Tensor) -> list[Any]:
        """Encode images, each as far as it goes without a text."""

    @abstractmethod
    def texts(self, inputs: Inputs) -> Any:
        """Encode a batch of texts as far as it goes without an image; `inputs` [B,T] are the
        tokenizer's."""

    @abstractmethod
    def score(self, image: Any, texts: Any) -> Tensor:
        """Scores [B] of one encoded image with every text of an encoded batch."""


class MeterPairs(Pairs):
    """`MeterForImageAndTextRetrieval`."""

    def images(self, pixel_values_B3HW: Tensor) -> list[Any]:
        encoded = self.model.meter.encode_image(pixel_values_B3HW)
        return [encoded[row : row + 1] for row in range(len(encoded))]

    def texts(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        return self.model.meter.encode_text(**inputs)

    def score(self, image: Any, texts: tuple[Tensor, Tensor]) -> Tensor:
        states_BTD, mask_BT = texts
        fused = self.model.meter.fuse(states_BTD, mask_BT, image, texts_per_image=len(states_BTD))
        return self.model.score(fused.pooler_output).logits[:, 0]


class ViltPairs(Pairs):
    """`ViltForImageAndTextRetrieval`.

    Of an image with more patches than `config.max_image_length` evenly spaced ones are kept, as
    with a reducer; the stock model samples them at random, so that two forwards differ.
    """

    def images(self, pixel_values_B3HW: Tensor) -> list[Inputs]:
        patch = active(self.model)
        if patch is not None and patch.reducer.traits.needs_grid:
            # Pooling needs positions, which the model does not know for embedded patches.
            return [{"pixel_values": pixels} for pixels in pixel_values_B3HW.split(1)]
        embeddings = self.model.vilt.embeddings
        # Called as a module, because offload hooks load its parameters only for a call.
        rebound = rebind(embeddings, "forward", embed_patches)
        try:
            states_BID, mask_BI, _, _ = embeddings(pixel_values_B3HW, None)
        finally:
            rebound.undo()
        pairs = zip(states_BID.split(1), mask_BI.split(1), strict=True)
        return [{"image_embeds": states, "pixel_mask": mask} for states, mask in pairs]

    def texts(self, inputs: Inputs) -> Inputs:
        return inputs

    def score(self, image: Inputs, texts: Inputs) -> Tensor:
        count = len(texts["input_ids"])
        repeated = {name: value.expand(count, *value.shape[1:]) for name, value in image.items()}
        return self.model(**texts, **repeated).logits[:, 0]


class BridgeTowerPairs(Pairs):
    """`BridgeTowerForImageAndTextRetrieval`, whose score is that of a match against none."""

    def images(self, pixel_values_B3HW: Tensor) -> list[Inputs]:
        patch = active(self.model)
        if patch is not None and patch.reducer.traits.needs_grid:
            return [{"pixel_values": pixels} for pixels in pixel_values_B3HW.split(1)]
        vision = self.model.bridgetower.vision_model
        states_IBD = vision.visual.forward_pre(pixel_values_B3HW.type(vision.dtype))
        return [{"image_embeds": states} for states in states_IBD.transpose(0, 1).split(1)]

    def texts(self, inputs: Inputs) -> Inputs:
        return inputs

    def score(self, image: Inputs, texts: Inputs) -> Tensor:
        count = len(texts["input_ids"])
        repeated = {name: value.expand(count, *value.shape[1:]) for name, value in image.items()}
        return ranking_scores(self.model(**texts, **repeated).logits)


_CLASSES: dict[str, type[Pairs]] = {
    "BridgeTowerForImageAndTextRetrieval": BridgeTowerPairs,
    "MeterForImageAndTextRetrieval": MeterPairs,
    "ViltForImageAndTextRetrieval": ViltPairs,
}


def pairs(model: nn.Module) -> Pairs:
    """The parts of a model; raises ValueError for classes that do not score pairs."""
    for cls in type(model).__mro__:
        if cls.__name__ in _CLASSES:
            return _CLASSES[cls.__name__](model)
    raise ValueError(
        f"{type(model).__name__} scores no pairs of image and text; {', '.join(_CLASSES)} do"
    )


def counts_padding(model: nn.Module) -> bool:
    """Whether padded text changes the scores, as with official reducers."""
    patch = active(model)
    return patch is not None and patch.reducer.traits.official
