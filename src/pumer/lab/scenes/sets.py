"""Sets of generated images that share sentences."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Generic, TypeVar

import torch

from pumer.lab.scenes.drawing import Scenes, draw_scenes
from pumer.lab.scenes.views import SceneView, dice_of, views

_ATTEMPTS = 1024  # image numbers kept for one image; few sets need two of them
T = TypeVar("T")


@dataclass(frozen=True)
class SceneSet(Generic[T]):
    """What is `said` of the images in `rows` of a batch: statements or hypotheses."""

    rows: range
    said: T


def draw_sets(
    seed: int,
    index: Iterable[int],
    size: int,
    say: Callable[[Sequence[SceneView], random.Random], T | None],
    *,
    image_size: int = 96,
) -> tuple[Scenes, dict[int, SceneSet[T]]]:
    """Draw sets of `size` images each, with sentences by `say`.

    Where `say` returns None for a set's images, others are drawn. A set depends on the seed and its
    index, not on the batch. Returns the images, in no particular order, and the sets by index.
    Raises ValueError as `draw_scenes` does.
    """
    batches, sets, done = [], {}, 0
    missing = list(dict.fromkeys(index))
    for attempt in range(_ATTEMPTS):
        image_indices = [
            (set_index * _ATTEMPTS + attempt) * size + k
            for set_index in missing
            for k in range(size)
        ]
        scenes = draw_scenes(seed, image_indices, image_size=image_size)
        scene_views = views(scenes)
        for position, set_index in enumerate(missing):
            said = say(
                scene_views[position * size : (position + 1) * size],
                dice_of(seed, set_index, attempt),
            )
            if said is not None:
                sets[set_index] = SceneSet(
                    range(done + position * size, done + (position + 1) * size), said
                )
        batches.append(scenes)
        done += len(image_indices)
        missing = [set_index for set_index in missing if set_index not in sets]
        if not missing:
            break
    assert not missing, "nothing can be said of any image"
    return Scenes(
        *(torch.cat([getattr(b, field.name) for b in batches]) for field in fields(Scenes))
    ), sets
