"""Sentences about two images, true or false of them, as in NLVR2.

A sentence goes with four pairs made of four images and is true of exactly two of them, so the text
alone does not predict the label. In some forms ("exactly one of the pictures has ...", sums, equal
numbers, common traits) each image is in one pair of either label, so one image with the sentence
does not predict it either. With "both", "only the left" or "more than" it must: a left image
without a star rules out a star in both. Over all kinds, one image with the sentence reaches 65 % at
most. Images without the sentence reach little more than chance.
"""

import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pumer.lab.scenes.views import (
    APART,
    HALVES,
    MIDDLE,
    NUMBERS,
    WAYS,
    Description,
    SceneView,
    counted,
    many,
    one,
    pick,
    weighted,
)

KINDS = {"existence": 0.26, "count": 0.2, "comparison": 0.14, "colour": 0.1, "shape": 0.06,
         "size": 0.06,
         "position": 0.1, "relation": 0.08}  # fmt: skip
PAIRS = ((0, 1), (2, 3), (0, 3), (2, 1))
"""The images of a set's pairs, left and right."""

_TRIES = 40  # at filling in a sentence, before another form is tried


@dataclass(frozen=True)
class SceneStatement:
    """A sentence and whether it is true of each of the PAIRS; `kind` is a key of KINDS."""

    sentence: str
    labels: tuple[bool, ...]
    kind: str


def state(
    seen: Sequence[SceneView], dice: random.Random, kinds: Mapping[str, float] = KINDS
) -> SceneStatement | None:
    """A sentence that is true of two of the PAIRS of four images, of a kind drawn by weight.

    Another kind is drawn where the images allow none of the first; None if they allow none at all.
    """
    untried = dict(kinds)
    while untried:
        statement_kind = list(untried)[weighted(dice, list(untried.values()))]
        forms = dict(_FORMS[statement_kind])
        while forms:
            form = list(forms)[weighted(dice, list(forms.values()))]
            for _ in range(_TRIES):
                said = _say(statement_kind, form, seen, dice)
                if said and sum(said[1]) == 2 and (form not in _EVEN or said[1][0] == said[1][1]):
                    return SceneStatement(said[0], tuple(said[1]), statement_kind)
            del forms[form]
        del untried[statement_kind]
    return None


# Forms: how the two images come together

_WORDINGS = {
    "both": ("both pictures have {x}", "each picture contains {x}", "each of the pictures has {x}"),
    "one": ("exactly one of the pictures has {x}", "only one picture contains {x}",
            "exactly one picture has {x}"),
    "left": ("only the left picture has {x}", "only the picture on the left contains {x}"),
    "right": ("only the right picture has {x}", "only the picture on the right contains {x}"),
    "any": ("at least one of the pictures has {x}", "one or both of the pictures contain {x}"),
    "none": ("none of the pictures has {x}", "no picture contains {x}"),
    "sum": ("there are {x} in all", "the two pictures together have {x}",
            "both pictures together contain {x}"),
    "more left": ("there are more {x} in the left picture than in the right one",
                  "the left picture has more {x} than the right one"),
    "more right": ("there are more {x} in the right picture than in the left one",
                   "the right picture has more {x} than the left one"),
    "equal": ("both pictures have the same number of {x}",
              "there is the same number of {x} in each picture"),
    "same": ("{x} in the left picture has the same {trait} as one in the right picture",
             "both pictures have {x} of the same {trait}"),
}  # fmt: skip
_QUANTIFIERS = {"both": 0.2, "one": 0.4, "left": 0.1, "right": 0.1, "any": 0.1, "none": 0.1}
_FORMS = {
    "existence": _QUANTIFIERS,
    "count": {**_QUANTIFIERS, "sum": 1.0},
    "comparison": {"more left": 0.3, "more right": 0.3, "equal": 0.4},
    **{trait: {**_QUANTIFIERS, "same": 0.5} for trait in ("colour", "shape", "size")},
    "position": _QUANTIFIERS,
    "relation": _QUANTIFIERS,
}
_OWNERS = {"colour": ("s", "s", "zs"), "shape": ("c", "c", "zc"), "size": ("s", "c", "cs")}
_SPELLED = {"colour": "color", "shape": "shape", "size": "size"}
_EVEN = {"one", "sum", "equal", "same"}
"""Forms in which a single image does not predict the label."""
_RULES: dict[str, Callable[[int, int], bool]] = {
    "both": lambda on_left, on_right: bool(on_left and on_right),
    "one": lambda on_left, on_right: on_left != on_right,
    "left": lambda on_left, on_right: bool(on_left and not on_right),
    "right": lambda on_left, on_right: bool(on_right and not on_left),
    "any": lambda on_left, on_right: bool(on_left or on_right),
    "none": lambda on_left, on_right: not (on_left or on_right),
    "more left": lambda on_left, on_right: on_left > on_right,
    "more right": lambda on_left, on_right: on_left < on_right,
    "equal": lambda on_left, on_right: on_left == on_right,
}

_Said = tuple[str, list[bool]]  # the sentence and its labels


def _say(
    statement_kind: str, form: str, scene_views: Sequence[SceneView], dice: random.Random
) -> _Said | None:
    """Fill in a form at random; None where the images are no clear case."""
    wording = pick(dice, _WORDINGS[form])
    if form == "same":
        return _same(statement_kind, wording, scene_views, dice)
    if form == "sum":
        return _sum(wording, scene_views, dice)
    clause = _CLAUSES[statement_kind](scene_views, dice)
    if clause is None or (form == "equal" and 0 in clause[1]):
        return None
    rule = _RULES[form]
    return wording.format(x=clause[0]), [
        rule(clause[1][first], clause[1][second]) for first, second in PAIRS
    ]


def _sum(wording: str, scene_views: Sequence[SceneView], dice: random.Random) -> _Said | None:
    description = _some(scene_views, dice, ("c", "s", "s", "zs"))
    sums = [
        scene_views[first].count(description) + scene_views[second].count(description)
        for first, second in PAIRS
    ]
    total = pick(dice, sums)
    if not 2 <= total < len(NUMBERS):
        return None
    return wording.format(x=counted(total, description)), [pair_sum == total for pair_sum in sums]


def _same(
    trait: str, wording: str, scene_views: Sequence[SceneView], dice: random.Random
) -> _Said | None:
    description = _some(scene_views, dice, _OWNERS[trait])
    values = [set(view.values(description, trait)) for view in scene_views]
    if not all(values):  # else it would be enough to see whether there is one
        return None
    labels = [bool(values[first] & values[second]) for first, second in PAIRS]
    return wording.format(x=one(description), trait=_SPELLED[trait]), labels


# Clauses: what can be true of one image, with its truth in each, or counted in it

_Found = tuple[str, Sequence[int]]


def _some(
    scene_views: Sequence[SceneView], dice: random.Random, levels: Sequence[str]
) -> Description:
    """A description of some object of some image."""
    view = pick(dice, scene_views)
    return view.describe(pick(dice, view.present), pick(dice, levels))


def _existence(scene_views: Sequence[SceneView], dice: random.Random) -> _Found:
    description = _some(scene_views, dice, ("c", "s", "cs", "cs", "zc", "zs", "zcs"))
    return one(description), [view.count(description) > 0 for view in scene_views]


def _count(scene_views: Sequence[SceneView], dice: random.Random) -> _Found | None:
    description = _some(scene_views, dice, ("c", "s", "s", "zs"))
    counts = [view.count(description) for view in scene_views]
    threshold, exactly = pick(dice, counts), dice.random() < 0.5
    if not 1 <= threshold < len(NUMBERS) or (threshold == 1 and not exactly):
        return None
    words = ("exactly " if exactly else "at least ") + counted(threshold, description)
    return words, [count == threshold or (count > threshold and not exactly) for count in counts]


def _numbers(scene_views: Sequence[SceneView], dice: random.Random) -> _Found:
    description = _some(scene_views, dice, ("c", "s", "s", "zs"))
    return many(description), [view.count(description) for view in scene_views]


def _alike(trait: str, scene_views: Sequence[SceneView], dice: random.Random) -> _Found:
    description, alike = _some(scene_views, dice, _OWNERS[trait]), dice.random() < 0.5
    values = [view.values(description, trait) for view in scene_views]
    truth = [len(set(traits)) < len(traits) if alike else len(set(traits)) > 1 for traits in values]
    return (
        f"two {many(description)} of {'the same' if alike else 'different'} "
        f"{_SPELLED[trait]}{'s' * (not alike)}",
        truth,
    )


def _clear(values: Sequence[float], margin: float, below: float) -> bool | None:
    """Whether any of the values is at least `margin`; None where none is, but one is over
    `below`."""
    most = max(values, default=-1.0)
    return True if most >= margin else None if most > below else False


def _if_clear(words: str, truth: Sequence[bool | None]) -> _Found | None:
    decided = [value for value in truth if value is not None]
    return (words, decided) if len(decided) == len(truth) else None


def _position(scene_views: Sequence[SceneView], dice: random.Random) -> _Found | None:
    description, way = _some(scene_views, dice, ("c", "s", "cs", "zs")), pick(dice, WAYS)
    truth = [
        _clear([view.towards[way][k] for k in view.fits.get(description, ())], MIDDLE, -MIDDLE)
        for view in scene_views
    ]
    return _if_clear(f"{one(description)} in the {HALVES[way]} half", truth)


_BESIDE = {"left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
           "above": ("above",), "below": ("below",)}  # fmt: skip


def _relation(scene_views: Sequence[SceneView], dice: random.Random) -> _Found | None:
    view = pick(dice, scene_views)
    levels = ("s", "cs", "cs", "c")
    what, other = (view.describe(pick(dice, view.present), pick(dice, levels)) for _ in range(2))
    if what == other:
        return None
    way = pick(dice, WAYS)
    truth = []
    for view in scene_views:
        at = view.towards[way]
        gaps = [
            at[a] - at[b]
            for a in view.fits.get(what, ())
            for b in view.fits.get(other, ())
            if a != b
        ]
        truth.append(_clear(gaps, APART, 0.0))
    return _if_clear(f"{one(what)} {pick(dice, _BESIDE[way])} {one(other)}", truth)


_CLAUSES: dict[str, Callable[[Sequence[SceneView], random.Random], _Found | None]] = {
    "existence": _existence, "count": _count, "comparison": _numbers, "position": _position,
    "relation": _relation,
    **{trait: functools.partial(_alike, trait) for trait in _OWNERS},
}  # fmt: skip
