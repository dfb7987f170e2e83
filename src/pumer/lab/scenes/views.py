"""The objects of a generated image, the descriptions that fit them, and the words for these."""

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch

from pumer.lab.scenes.drawing import COLOURS, SHAPES, SIZES, Scenes

MIDDLE = 0.08  # share of the side around the middle where an object is in neither half
APART = 0.10  # share of the side by which two objects must differ for a relation
WAYS = ("left", "right", "above", "below")
HALVES = {"left": "left", "right": "right", "above": "top", "below": "bottom"}
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven")
_PLURALS = {**{shape: shape + "s" for shape in SHAPES}, "cross": "crosses"}

# A description is (size, colour, shape), -1 for each that it does not mention.
Description = tuple[int, int, int]


class SceneView:
    """The objects of one image and which of them each description fits."""

    def __init__(self, objects: list[list[int]], side: int):
        self.side = side
        self.x = [o[3] for o in objects]
        self.y = [o[4] for o in objects]
        self.traits = [tuple(o[:3]) for o in objects]  # colour, shape, size
        self.present = [k for k, o in enumerate(objects) if o[5]]
        self.fits: dict[Description, list[int]] = {}
        for k in self.present:
            colour, shape, size = self.traits[k]
            for description in (
                (-1, colour, -1), (-1, -1, shape), (-1, colour, shape), (size, colour, -1),
                (size, -1, shape), (size, colour, shape),
            ):  # fmt: skip
                self.fits.setdefault(description, []).append(k)
        self._names: dict[int, list[Description]] = {}

    @functools.cached_property
    def towards(self) -> dict[str, list[float]]:
        """Distance of every object from the middle in each direction, in shares of the side."""
        right, below = (
            [(at - (self.side - 1) / 2) / self.side for at in places] for places in (self.x, self.y)
        )
        return {
            "left": [-at for at in right],
            "right": right,
            "above": [-at for at in below],
            "below": below,
        }

    def count(self, description: Description) -> int:
        """Number of objects that a description fits."""
        return len(self.fits.get(description, ()))

    def values(self, description: Description, trait: str) -> list[int]:
        """The "colour", "shape" or "size" of every object that a description fits."""
        column = ("colour", "shape", "size").index(trait)
        return [self.traits[k][column] for k in self.fits.get(description, ())]

    def describe(self, k: int, said: str) -> Description:
        """Describe object `k` by the traits in `said`: size (z), colour (c), shape (s)."""
        colour, shape, size = self.traits[k]
        return (
            size if "z" in said else -1,
            colour if "c" in said else -1,
            shape if "s" in said else -1,
        )

    def unique(self, k: int, *levels: Sequence[str]) -> list[Description]:
        """Unambiguous descriptions of object `k`, from the first of `levels` that has any."""
        for level in levels:
            descriptions = [d for said in level if len(self.fits[d := self.describe(k, said)]) == 1]
            if descriptions:
                return descriptions
        return []

    def names(self, k: int) -> list[Description]:
        """The shortest unambiguous descriptions of object `k`, if any."""
        if k not in self._names:
            self._names[k] = self.unique(k, ("s",), ("c", "cs", "zs"))
        return self._names[k]


def views(scenes: Scenes) -> list[SceneView]:
    """A view of every image of a batch."""
    columns = (scenes.colour, scenes.shape, scenes.size, scenes.x, scenes.y, scenes.present)
    side = scenes.images.shape[-1]
    return [
        SceneView(objects, side)
        for objects in torch.stack([column.long() for column in columns], -1).tolist()
    ]


# Words


def level(description: Description) -> str:
    """Letters of the traits in a description: size (z), colour (c), shape (s)."""
    return "".join(letter for letter, value in zip("zcs", description, strict=True) if value >= 0)


def words(description: Description, noun: str = "object") -> str:
    """The description in words, `noun` where it has no shape.

    >>> words((0, 0, 3)), words((-1, 0, -1))
    ('small red star', 'red object')
    """
    size, colour, shape = description
    said = [SIZES[size]] if size >= 0 else []
    said += [COLOURS[colour]] if colour >= 0 else []
    return " ".join([*said, SHAPES[shape] if shape >= 0 else noun])


def many(description: Description) -> str:
    """The description in the plural."""
    *before, noun = words(description).split()
    return " ".join([*before, _PLURALS.get(noun, noun + "s")])


def one(description: Description) -> str:
    """The description with an indefinite article."""
    return article(words(description))


def article(noun: str) -> str:
    """The noun with an indefinite article."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def counted(number: int, description: Description) -> str:
    """A number up to seven and the description: "one star", "two stars"."""
    return f"{NUMBERS[number]} {words(description) if number == 1 else many(description)}"


# Chance


def dice_of(seed: int, number: int, j: int = 0) -> random.Random:
    """Random numbers for sentence `j` (below 2**16) about image or set `number`."""
    return random.Random(((seed & (2**64 - 1)) << 80) | (number << 16) | j)


def pick(dice: random.Random, options: Sequence[Any]) -> Any:
    """`dice.choice` by `random()`, the only method that is stable across versions of Python."""
    return options[int(dice.random() * len(options))]


def weighted(dice: random.Random, weights: Sequence[float]) -> int:
    """An index drawn by weight."""
    point = dice.random() * sum(weights)
    for index, weight in enumerate(weights):
        point -= weight
        if point < 0:
            return index
    return max(index for index, weight in enumerate(weights) if weight)
