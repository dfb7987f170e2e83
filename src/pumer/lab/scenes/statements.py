"""Sentences about two pictures, true or false of them, as in NLVR2.

A sentence goes with four pairs made of four pictures and is true of exactly two of them, so that no
words, alone or together, say anything about the label. In forms where that can be ("exactly one of
the pictures has ...", sums, equal numbers, common traits) each picture is once in a pair the
sentence is true of and once in one it is false of: one picture and the sentence say nothing either.
With "both", "only the left", "more than" they must say something, as a left picture without a star
decides against a star in both; over all kinds, one picture and the sentence are good for 65 % at
most. One picture, or both, without the sentence say next to nothing.
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
    View,
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
"""The pictures of a set's pairs, left and right."""

_TRIES = 40  # at filling in a sentence, before another form is tried


@dataclass(frozen=True)
class SceneStatement:
    """A sentence and whether it is true of each of the PAIRS; `kind` is a key of KINDS."""

    sentence: str
    labels: tuple[bool, ...]
    kind: str


def state(
    seen: Sequence[View], dice: random.Random, kinds: Mapping[str, float] = KINDS
) -> SceneStatement | None:
    """A sentence that is true of two of the PAIRS of four pictures, of a kind drawn by weight.

    Of another kind where the pictures allow none of that kind, and None where they allow none at
    all.
    """
    left = dict(kinds)
    while left:
        kind = list(left)[weighted(dice, list(left.values()))]
        forms = dict(_FORMS[kind])
        while forms:
            form = list(forms)[weighted(dice, list(forms.values()))]
            for _ in range(_TRIES):
                said = _say(kind, form, seen, dice)
                if said and sum(said[1]) == 2 and (form not in _EVEN or said[1][0] == said[1][1]):
                    return SceneStatement(said[0], tuple(said[1]), kind)
            del forms[form]
        del left[kind]
    return None


# Forms: how the two pictures come together

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
    **{kind: {**_QUANTIFIERS, "same": 0.5} for kind in ("colour", "shape", "size")},
    "position": _QUANTIFIERS,
    "relation": _QUANTIFIERS,
}
_OWNERS = {"colour": ("s", "s", "zs"), "shape": ("c", "c", "zc"), "size": ("s", "c", "cs")}
_SPELLED = {"colour": "color", "shape": "shape", "size": "size"}
_EVEN = {"one", "sum", "equal", "same"}
"""Forms that a single picture need not tell anything about."""
_RULES: dict[str, Callable[[int, int], bool]] = {
    "both": lambda left, right: bool(left and right),
    "one": lambda left, right: left != right,
    "left": lambda left, right: bool(left and not right),
    "right": lambda left, right: bool(right and not left),
    "any": lambda left, right: bool(left or right),
    "none": lambda left, right: not (left or right),
    "more left": lambda left, right: left > right,
    "more right": lambda left, right: left < right,
    "equal": lambda left, right: left == right,
}

_Said = tuple[str, list[bool]]  # the sentence and its labels


def _say(kind: str, form: str, seen: Sequence[View], dice: random.Random) -> _Said | None:
    """Fill in a form at random; None where the pictures make no clear case of it."""
    wording = pick(dice, _WORDINGS[form])
    if form == "same":
        return _same(kind, wording, seen, dice)
    if form == "sum":
        return _sum(wording, seen, dice)
    found = _CLAUSES[kind](seen, dice)
    if found is None or (form == "equal" and 0 in found[1]):
        return None
    rule = _RULES[form]
    return wording.format(x=found[0]), [
        rule(found[1][left], found[1][right]) for left, right in PAIRS
    ]


def _sum(wording: str, seen: Sequence[View], dice: random.Random) -> _Said | None:
    description = _some(seen, dice, ("c", "s", "s", "zs"))
    sums = [seen[left].count(description) + seen[right].count(description) for left, right in PAIRS]
    number = pick(dice, sums)
    if not 2 <= number < len(NUMBERS):
        return None
    return wording.format(x=counted(number, description)), [found == number for found in sums]


def _same(kind: str, wording: str, seen: Sequence[View], dice: random.Random) -> _Said | None:
    description = _some(seen, dice, _OWNERS[kind])
    values = [set(view.values(description, kind)) for view in seen]
    if not all(values):  # else it would be enough to see whether there is one
        return None
    labels = [bool(values[left] & values[right]) for left, right in PAIRS]
    return wording.format(x=one(description), trait=_SPELLED[kind]), labels


# Clauses: what can be true of one picture, with its truth in each, or counted in it

_Found = tuple[str, Sequence[int]]


def _some(seen: Sequence[View], dice: random.Random, levels: Sequence[str]) -> Description:
    """A description of some object of some picture."""
    view = pick(dice, seen)
    return view.describe(pick(dice, view.present), pick(dice, levels))


def _existence(seen: Sequence[View], dice: random.Random) -> _Found:
    description = _some(seen, dice, ("c", "s", "cs", "cs", "zc", "zs", "zcs"))
    return one(description), [view.count(description) > 0 for view in seen]


def _count(seen: Sequence[View], dice: random.Random) -> _Found | None:
    description = _some(seen, dice, ("c", "s", "s", "zs"))
    counts = [view.count(description) for view in seen]
    number, exactly = pick(dice, counts), dice.random() < 0.5
    if not 1 <= number < len(NUMBERS) or (number == 1 and not exactly):
        return None
    words = ("exactly " if exactly else "at least ") + counted(number, description)
    return words, [found == number or (found > number and not exactly) for found in counts]


def _numbers(seen: Sequence[View], dice: random.Random) -> _Found:
    description = _some(seen, dice, ("c", "s", "s", "zs"))
    return many(description), [view.count(description) for view in seen]


def _alike(kind: str, seen: Sequence[View], dice: random.Random) -> _Found:
    description, alike = _some(seen, dice, _OWNERS[kind]), dice.random() < 0.5
    values = [view.values(description, kind) for view in seen]
    truth = [len(set(found)) < len(found) if alike else len(set(found)) > 1 for found in values]
    return (
        f"two {many(description)} of {'the same' if alike else 'different'} "
        f"{_SPELLED[kind]}{'s' * (not alike)}",
        truth,
    )


def _clear(found: Sequence[float], margin: float, below: float) -> bool | None:
    """Whether any of the values is at least `margin`; None where none is, but one is over
    `below`."""
    most = max(found, default=-1.0)
    return True if most >= margin else None if most > below else False


def _if_clear(words: str, truth: Sequence[bool | None]) -> _Found | None:
    known = [value for value in truth if value is not None]
    return (words, known) if len(known) == len(truth) else None


def _position(seen: Sequence[View], dice: random.Random) -> _Found | None:
    description, way = _some(seen, dice, ("c", "s", "cs", "zs")), pick(dice, WAYS)
    truth = [
        _clear([view.towards[way][k] for k in view.fits.get(description, ())], MIDDLE, -MIDDLE)
        for view in seen
    ]
    return _if_clear(f"{one(description)} in the {HALVES[way]} half", truth)


_BESIDE = {"left": ("left of", "to the left of"), "right": ("right of", "to the right of"),
           "above": ("above",), "below": ("below",)}  # fmt: skip


def _relation(seen: Sequence[View], dice: random.Random) -> _Found | None:
    view = pick(dice, seen)
    levels = ("s", "cs", "cs", "c")
    what, other = (view.describe(pick(dice, view.present), pick(dice, levels)) for _ in range(2))
    if what == other:
        return None
    way = pick(dice, WAYS)
    truth = []
    for view in seen:
        at = view.towards[way]
        gaps = [
            at[a] - at[b]
            for a in view.fits.get(what, ())
            for b in view.fits.get(other, ())
            if a != b
        ]
        truth.append(_clear(gaps, APART, 0.0))
    return _if_clear(f"{one(what)} {pick(dice, _BESIDE[way])} {one(other)}", truth)


_CLAUSES: dict[str, Callable[[Sequence[View], random.Random], _Found | None]] = {
    "existence": _existence, "count": _count, "comparison": _numbers, "position": _position,
    "relation": _relation,
    **{kind: functools.partial(_alike, kind) for kind in _OWNERS},
}  # fmt: skip
