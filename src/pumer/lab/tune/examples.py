"""The examples that candidates are judged on, and the scores of a model on them."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pumer.lab.evaluate import answer, model_inputs, paired, take
from pumer.lab.tasks.base import Collator, Example

_KEEP = (
    1 << 30
)  # bytes of collated batches that stay in memory; others are made again when they are needed


@dataclass
class _Batch:
    numbers: list[int]
    examples: list[Example]
    inputs: dict[str, Any] | None


class ExamplePool:
    """Batches of independent examples in random order: at most one of each cluster, such as an
    image.

    Args:
        examples: of a labelled split.
        collator: the task's, with the model's transforms.
        batch_size: examples at a time; the last batch may be smaller.
        limit: examples at most.
        seed: of the order.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        collator: Collator,
        batch_size: int,
        limit: int,
        seed: int = 0,
    ) -> None:
        self._source, self.collator, self.batch_size, self.limit = (
            examples,
            collator,
            batch_size,
            limit,
        )
        self._order = random.Random(seed).sample(range(len(examples)), len(examples))
        self._drawn, self._clusters, self._kept = list[int](), set[Any](), 0
        self._batches: list[_Batch] = []

    @property
    def available(self) -> int:
        """Number of examples in total."""
        self._draw(self.limit)
        return len(self._drawn)

    def size(self, count: int) -> int:
        """Number of examples in the first `count` batches; fewer where the split ends."""
        while len(self._batches) < count and self._make():
            pass
        return sum(len(batch.numbers) for batch in self._batches[:count])

    def inputs(self, number: int) -> dict[str, Any]:
        """Collated inputs of a batch."""
        batch = self._batches[number]
        return (
            self._collate(take(self._source, batch.numbers))
            if batch.inputs is None
            else batch.inputs
        )

    def scores(self, model: nn.Module, batches: Iterable[int]) -> Iterator[list[float]]:
        """A model's score, from 0 to 1, on every example of each of these batches."""
        device = next(model.parameters()).device
        for batch_index in batches:
            if self.size(batch_index + 1) == self.size(batch_index):  # the split is at its end
                return
            batch, inputs = self._batches[batch_index], self.inputs(batch_index)
            moved = model_inputs(inputs, device)
            moved = paired(model, moved, inputs.get("texts_per_image", 1))
            answers = answer(model, moved, self.collator, len(batch.numbers))
            yield [
                self.collator.task.score(prediction, example)
                for prediction, example in zip(answers, batch.examples, strict=True)
            ]

    def _make(self) -> bool:
        """Make the next batch; returns False at the end of the split or the limit."""
        start = sum(len(batch.numbers) for batch in self._batches)
        self._draw(start + self.batch_size)
        numbers = self._drawn[start : start + self.batch_size]
        if not numbers:
            return False
        examples = take(self._source, numbers)
        inputs = self._collate(examples)
        size = sum(x.nbytes for x in inputs.values() if isinstance(x, Tensor))
        kept = self._kept + size <= _KEEP
        self._kept += size if kept else 0
        bare = [replace(example, images=()) for example in examples]
        self._batches.append(_Batch(numbers, bare, inputs if kept else None))
        return True

    def _draw(self, count: int) -> None:
        """Draw examples until there are `count`, or all."""
        count = min(count, self.limit)
        while len(self._drawn) < count and self._order:
            numbers = self._order[: count - len(self._drawn)]
            del self._order[: len(numbers)]
            for index, example in zip(numbers, take(self._source, numbers), strict=True):
                if example.target is None:
                    raise ValueError(
                        "examples without labels cannot be scored: name a labelled --split"
                    )
                if example.cluster not in self._clusters:
                    self._clusters.add(example.cluster)
                    self._drawn.append(index)

    def _collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        collated = self.collator(examples)
        wanted = model_inputs(collated)
        # An image's mask is eight bytes a pixel for one bit; as bytes it takes a hundredth of what
        # the image does.
        if "pixel_mask" in wanted:
            wanted["pixel_mask"] = wanted["pixel_mask"].to(torch.uint8)
        return wanted | {name: collated[name] for name in ("texts_per_image",) if name in collated}
