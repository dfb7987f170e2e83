"""Hypotheses about an image, which entails, contradicts or leaves them open, as in visual
entailment (SNLI-VE).

An image shows everything there is, so only a hypothesis about something absent is open: of an image
without a star, "the star is red" is neither true nor false (Strawson, "On Referring", 1950). A
hypothesis is neutral where the image lacks the object, or the number of objects, that it mentions;
a contradiction where the object is there but differs. "The star" is used only where there is one.
Hypotheses without such a presupposition ("there are two stars") are not used: none could be
neutral.

Three hypotheses go with three images. Each image entails one, contradicts one and leaves one open,
and the same holds for each hypothesis, so neither text nor image alone predicts the label.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from pumer.lab.scenes.drawing import COLOURS, SHAPES, SIZES
from pumer.lab.scenes.views import (
    APART,
    HALVES,
    MIDDLE,
    NUMBERS,
    WAYS,
    Description,
    SceneView,
    article,
    level,
    many,
    pick,
    weighted,
    words,
)

KINDS = {
    "colour": 0.24,
    "shape": 0.16,
    "size": 0.18,
    "count": 0.1,
    "position": 0.16,
    "relation": 0.16,
}
LABELS = ("contradiction", "neutral", "entailment")


@dataclass(frozen=True)
class SceneHypothesis:
    """A sentence and its label for each of three images, as indices of LABELS; `kind` is a key of
    KINDS."""

    sentence: str
    labels: tuple[int, ...]
    kind: str


def suppose(
    seen: Sequence[SceneView], dice: random.Random, kinds: Mapping[str, float] = KINDS
) -> tuple[SceneHypothesis, ...] | None:
    """Three hypotheses about three images, each of a kind drawn by weight.

    Another kind is drawn where the images allow none of the first; None if they allow none at all.
    """
    one_way = pick(dice, (1, 2))
    for turn in (
        one_way,
        3 - one_way,
    ):  # the two ways to give each image and each hypothesis all labels
        hypotheses = []
        for first in range(3):
            order = (
                first,
                (first + turn) % 3,
                (first + 2 * turn) % 3,
            )  # contradicts, leaves open, entails
            said = _suppose([seen[image_index] for image_index in order], dice, kinds)
            if said is None:
                break
            hypotheses.append(
                SceneHypothesis(
                    said[1], tuple(order.index(image_index) for image_index in range(3)), said[0]
                )
            )
        else:
            return tuple(hypotheses)
    return None


def _suppose(
    order: Sequence[SceneView], dice: random.Random, kinds: Mapping[str, float]
) -> tuple[str, str] | None:
    """Kind and sentence for an image that contradicts, one that leaves open and one that
    entails."""
    untried = dict(kinds)
    while untried:
        case_kind = list(untried)[weighted(dice, list(untried.values()))]
        cases = list(_CASES[case_kind](*order))
        if cases:
            wording, parts = pick(dice, cases)
            return case_kind, pick(dice, _WORDINGS[wording]).format(**parts)
        del untried[case_kind]
    return None


_WORDINGS = {
    "colour": ("{the} is {value}", "the color of {the} is {value}"),
    "shape": ("{the} is {value}", "{the} has the shape of {value}"),
    "size": ("{the} is {value}", "{the} is a {value} one"),
    "count": ("{the} are {value}",),
    "same": ("{the} have the same {trait}", "{the} are of the same {trait}"),
    "left": ("{the} is left of {other}", "{the} is to the left of {other}"),
    "right": ("{the} is right of {other}", "{the} is to the right of {other}"),
    "above": ("{the} is above {other}", "{the} is higher up than {other}"),
    "below": ("{the} is below {other}", "{the} is lower down than {other}"),
    "half": ("{the} is in the {half} half", "{the} is in the {half} half of the picture"),
}
_TRAITS = {"colour": COLOURS, "shape": tuple(map(article, SHAPES)), "size": SIZES}
_LEVELS = {"colour": ("s", "zs"), "shape": ("c", "zc"), "size": ("s", "c", "cs"),
           "count": ("s", "c", "cs"),
           "position": ("s", "c", "cs", "zc", "zs"), "relation": ("s", "c", "cs", "zc",
                        "zs")}  # fmt: skip

# A case: the key of a wording and what goes into it
_Case = tuple[str, dict[str, str]]


def _subjects(
    no: SceneView, yes: SceneView, levels: Sequence[str]
) -> Iterator[tuple[Description, int, int]]:
    """Descriptions of exactly one object in both images, with its index in each."""
    for description, places in yes.fits.items():
        if len(places) == 1 == no.count(description) and level(description) in levels:
            yield description, no.fits[description][0], places[0]


def _trait(trait: str) -> Callable[[SceneView, SceneView, SceneView], Iterator[_Case]]:
    def cases(no: SceneView, open_: SceneView, yes: SceneView) -> Iterator[_Case]:
        """Objects whose trait differs between the two images and that the third lacks."""
        for description, _, _ in _subjects(no, yes, _LEVELS[trait]):
            value = yes.values(description, trait)
            if value != no.values(description, trait) and not open_.count(description):
                yield trait, {"the": "the " + words(description), "value": _TRAITS[trait][value[0]]}

    return cases


def _counted(no: SceneView, open_: SceneView, yes: SceneView) -> Iterator[_Case]:
    for description, places in yes.fits.items():
        count = len(places)
        if (
            not 2 <= count < len(NUMBERS)
            or no.count(description) != count
            or open_.count(description) == count
        ):
            continue
        if level(description) not in _LEVELS["count"]:
            continue
        the = f"the {NUMBERS[count]} {many(description)}"
        for trait, values in (("colour", COLOURS), ("size", SIZES)):
            if trait == "colour" and description[1] >= 0:
                continue
            said, denied = set(yes.values(description, trait)), set(no.values(description, trait))
            if len(said) == 1 and said != denied:
                yield "count", {"the": the, "value": values[said.pop()]}
                if len(denied) > 1:
                    yield "same", {"the": the, "trait": {"colour": "color"}.get(trait, trait)}


def _position(no: SceneView, open_: SceneView, yes: SceneView) -> Iterator[_Case]:
    for description, a, b in _subjects(no, yes, _LEVELS["position"]):
        if not open_.count(description):
            for way in WAYS:
                if no.towards[way][a] < -MIDDLE and yes.towards[way][b] > MIDDLE:
                    yield "half", {"the": "the " + words(description), "half": HALVES[way]}


def _relation(no: SceneView, open_: SceneView, yes: SceneView) -> Iterator[_Case]:
    subjects = list(_subjects(no, yes, _LEVELS["relation"]))
    for what, a, b in subjects:
        for other, c, d in subjects:
            if open_.count(what) and open_.count(other):
                continue
            for way in WAYS:
                false_offsets, true_offsets = no.towards[way], yes.towards[way]
                if (
                    false_offsets[c] - false_offsets[a] >= APART
                    and true_offsets[b] - true_offsets[d] >= APART
                ):
                    yield way, {"the": "the " + words(what), "other": "the " + words(other)}


_CASES: dict[str, Callable[[SceneView, SceneView, SceneView], Iterator[_Case]]] = {
    **{trait: _trait(trait) for trait in _TRAITS}, "count": _counted, "position": _position,
    "relation": _relation
}  # fmt: skip
