"""Captions of images: true, and specific enough to fit few other images.

A caption names two or three objects, most of them by size, colour and shape, and where some of them
are. It is stored as facts, so it can be tested on any other image, and changed to be wrong in one
fact.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pumer.lab.scenes.drawing import COLOURS, SHAPES, SIZES
from pumer.lab.scenes.views import (
    APART,
    HALVES,
    MIDDLE,
    NUMBERS,
    WAYS,
    Description,
    SceneView,
    counted,
    level,
    one,
    pick,
    weighted,
)

KINDS = {"pair": 0.25, "three": 0.35, "halves": 0.15, "number": 0.25}

_BESIDE = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_OPENINGS = ("", "", "the picture has ")


@dataclass(frozen=True)
class Fact:
    """There is `what`, or exactly `number` of it if above one; in the half `way` of the image, or
    in that direction from `other`."""

    what: Description
    number: int = 1
    way: str | None = None
    other: Description | None = None

    @property
    def text(self) -> str:
        """The fact in words."""
        said = one(self.what) if self.number == 1 else counted(self.number, self.what)
        if self.other is not None:
            return f"{said} {_BESIDE[str(self.way)]} {one(self.other)}"
        return said if self.way is None else f"{said} in the {HALVES[self.way]} half"

    def fits(self, view: SceneView) -> bool:
        """Whether it may be said of an image; borderline cases count as fitting."""
        places = view.fits.get(self.what, ())
        if self.number > 1 or self.way is None:
            return len(places) == self.number if self.number > 1 else bool(places)
        at = view.towards[self.way]
        if self.other is None:
            return any(at[k] > -MIDDLE for k in places)
        return any(at[k] > at[other] for k in places for other in view.fits.get(self.other, ()))


@dataclass(frozen=True)
class SceneCaption:
    """A caption: facts after an opening; `kind` is a key of KINDS."""

    kind: str
    facts: tuple[Fact, ...]
    opening: str = ""

    @property
    def text(self) -> str:
        """The caption in words."""
        return self.opening + ", and ".join(fact.text for fact in self.facts)

    def fits(self, view: SceneView) -> bool:
        """Whether it may be said of an image; borderline cases, such as an object hardly left of
        another, count as fitting."""
        return all(fact.fits(view) for fact in self.facts)


def describe(view: SceneView, dice: random.Random, number: int = 5) -> list[SceneCaption]:
    """`number` different captions of an image."""
    captions: dict[str, SceneCaption] = {}
    while len(captions) < number:
        caption = _describe(view, dice)
        captions.setdefault(caption.text, caption)
    return list(captions.values())


def mistake(caption: SceneCaption, view: SceneView, dice: random.Random) -> SceneCaption:
    """The caption with one fact changed, so that it no longer fits the image."""
    while True:
        facts = list(caption.facts)
        fact_index = int(dice.random() * len(facts))
        facts[fact_index] = _change(facts[fact_index], dice)
        changed = replace(caption, facts=tuple(facts))
        if not changed.fits(view):
            return changed


def _change(fact: Fact, dice: random.Random) -> Fact:
    part = pick(dice, ("what", "other" if fact.other else "what", "way" if fact.way else "what"))
    if part == "way":
        return replace(fact, way=_OPPOSITE[str(fact.way)])
    if fact.number > 1 and dice.random() < 0.5:
        return replace(
            fact,
            number=pick(dice, [n for n in range(2, len(NUMBERS)) if abs(n - fact.number) == 1]),
        )
    if part == "other" and fact.other:
        return replace(fact, other=_other_trait(fact.other, dice))
    return replace(fact, what=_other_trait(fact.what, dice))


def _other_trait(description: Description, dice: random.Random) -> Description:
    """The description with one of its traits changed."""
    changed = list(description)
    trait = pick(dice, [trait_index for trait_index, value in enumerate(description) if value >= 0])
    values = len((SIZES, COLOURS, SHAPES)[trait])
    changed[trait] = (changed[trait] + 1 + int(dice.random() * (values - 1))) % values
    size, colour, shape = changed
    return size, colour, shape


def _describe(view: SceneView, dice: random.Random) -> SceneCaption:
    caption_kind = list(KINDS)[weighted(dice, list(KINDS.values()))]
    order = list(view.present)
    for position in range(len(order) - 1, 0, -1):  # shuffled by `random()` alone
        other = int(dice.random() * (position + 1))
        order[position], order[other] = order[other], order[position]
    facts = (
        _halves(view, dice, order)
        if caption_kind == "halves"
        else _related(view, dice, order, caption_kind)
    )
    return SceneCaption(caption_kind, tuple(facts), pick(dice, _OPENINGS))


def _halves(view: SceneView, dice: random.Random, order: Sequence[int]) -> list[Fact]:
    """Two objects and the halves they are in, where they are clearly in one."""
    facts = []
    for k in order[:2]:
        ways = [way for way in WAYS if view.towards[way][k] > MIDDLE]
        facts.append(Fact(view.describe(k, "zcs"), way=pick(dice, ways) if ways else None))
    return facts


def _related(
    view: SceneView, dice: random.Random, order: Sequence[int], caption_kind: str
) -> list[Fact]:
    """One object beside another and, except for the kind "pair", another fact before or after."""
    what, other = order[:2]
    ways = [way for way in WAYS if view.towards[way][what] - view.towards[way][other] >= APART]
    said = "zcs" if caption_kind == "pair" else pick(dice, ("zcs", "cs"))
    if ways:
        facts = [
            Fact(view.describe(what, "zcs"), way=pick(dice, ways), other=view.describe(other, said))
        ]
    else:
        facts = [Fact(view.describe(k, "zcs")) for k in (what, other)]
    more = None
    if caption_kind == "three" and len(order) > 2:
        more = Fact(view.describe(order[2], pick(dice, ("zcs", "cs"))))
    elif caption_kind == "number":
        several = [
            d
            for d, places in view.fits.items()
            if 2 <= len(places) < len(NUMBERS) and level(d) in "cs"
        ]
        if several:
            description = pick(dice, several)
            more = Fact(description, number=view.count(description))
    if more is not None:
        facts.insert(pick(dice, (0, len(facts))), more)
    return facts
