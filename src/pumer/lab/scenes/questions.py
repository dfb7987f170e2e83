"""Template questions about generated images.

Each is about one or a few objects: most of the image is irrelevant to the answer, as in visual
question answering and unlike in captioning. No question is ambiguous: "the small star" is used only
where there is one. Where wording or frequencies could give the answer away, the answer is drawn
first and then a question for it.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pumer.lab.scenes.drawing import COLOURS, SHAPES, SIZES, Scenes, patch_pixels
from pumer.lab.scenes.views import (
    APART,
    MIDDLE,
    Description,
    SceneView,
    dice_of,
    many,
    one,
    pick,
    views,
    weighted,
    words,
)

KINDS = {"existence": 0.18, "colour": 0.18, "shape": 0.16, "size": 0.12, "count": 0.12,
         "position": 0.12,
         "relation": 0.12}  # fmt: skip
MAX_COUNT = 6
ANSWERS = tuple(
    sorted(
        [
            "yes",
            "no",
            *COLOURS,
            *SHAPES,
            *SIZES,
            "left",
            "right",
            "top",
            "bottom",
            *map(str, range(MAX_COUNT + 1)),
        ]
    )
)

_WORDINGS = {
    "existence": ("is there {a}?", "is there {a} in the picture?", "can you see {a}?"),
    "colour": ("what color is {the}?", "what is the color of {the}?", "{the} has which color?"),
    "shape": ("what shape is {the}?", "what is the shape of {the}?", "{the} has which shape?"),
    "size": ("is {the} small or large?", "what size is {the}?", "is {the} large or small?"),
    "count": (
        "how many {many} are there?",
        "how many {many} are in the picture?",
        "what number of {many} is there?",
    ),
    "left": ("is {the} to the left of {other}?", "is {the} left of {other}?"),
    "right": ("is {the} to the right of {other}?", "is {the} right of {other}?"),
    "above": ("is {the} above {other}?", "is {the} higher up than {other}?"),
    "below": ("is {the} below {other}?", "is {the} lower down than {other}?"),
    "x": ("is {the} on the left or right?", "which half is {the} in, left or right?"),
    "y": ("is {the} at the top or bottom?", "which half is {the} in, top or bottom?"),
}
# Roughly how much rarer each count is than zero among the possible count questions.
_COUNT_WEIGHTS = (0.75, 0.75, 0.85, 1.3, 2.6, 6.0, 14.0)
_TRIES = 4  # at a question that the image does not have yet


@dataclass(frozen=True)
class SceneQuestion:
    """A question, its answer and the objects it is about.

    `image_index` is the row in the batch of `Scenes`, `referents` are columns of its object table:
    the objects asked about, none where the answer is that there is none. `kind` is a key of KINDS.
    """

    image_index: int
    question: str
    answer: str
    kind: str
    referents: tuple[int, ...]


def ask(
    scenes: Scenes,
    seed: int,
    index: Sequence[int] | Tensor,
    *,
    per_picture: int = 4,
    kinds: Mapping[str, float] = KINDS,
) -> list[SceneQuestion]:
    """Ask `per_picture` questions about every image; `seed` and `index` as given to `draw_scenes`.

    Question j of an image depends on the seed, the image's index and j, not on the batch or on
    `per_picture`. Questions of one image differ, with very rare exceptions. `kinds` are the weights
    of the kinds. Raises ValueError when `index` does not fit `scenes`.

    >>> from pumer.lab.scenes.drawing import draw_scenes
    >>> len(ask(draw_scenes(7, [0, 1]), 7, [0, 1], per_picture=3))
    6
    """
    numbers = torch.as_tensor(index).tolist()
    if len(numbers) != len(scenes.images):
        raise ValueError(
            f"{len(numbers)} indices for {len(scenes.images)} images; pass the index given to draw."
        )
    questions = []
    for image_index, (scene_index, view) in enumerate(zip(numbers, views(scenes), strict=True)):
        had: set[str] = set()
        for j in range(per_picture):
            dice = dice_of(seed, scene_index, j)
            for _ in range(_TRIES):
                question_kind, question, answer, referents = _ask(view, dice, kinds)
                if question not in had:
                    break
            had.add(question)
            questions.append(
                SceneQuestion(image_index, question, answer, question_kind, tuple(referents))
            )
    return questions


def referent_targets(scenes: Scenes, questions: Sequence[SceneQuestion], patch_size: int) -> Tensor:
    """Patches at least a quarter covered by a question's referents: bool [Q, N], in raster order.

    The patch that holds most of a referent always counts, so that none is lost between patches.
    Raises ValueError when `patch_size` does not divide the image.
    """
    pixels_BNK = patch_pixels(scenes, patch_size)
    about_QK = torch.zeros(len(questions), pixels_BNK.shape[-1], dtype=torch.bool)
    rows = [(q, k) for q, question in enumerate(questions) for k in question.referents]
    if rows:
        about_QK[tuple(torch.tensor(rows).T)] = True
    about_QK = about_QK.to(pixels_BNK.device)
    image_Q = torch.tensor(
        [question.image_index for question in questions], dtype=torch.int64, device=about_QK.device
    )
    fullest_BNK = torch.zeros_like(pixels_BNK, dtype=torch.bool)
    # Columns without an object get a patch too, but no question is about them.
    fullest_BNK.scatter_(1, pixels_BNK.argmax(1, keepdim=True), True)
    covered_QN = (pixels_BNK[image_Q] * about_QK[:, None]).sum(-1) * 4 >= patch_size**2
    return covered_QN | (fullest_BNK[image_Q] & about_QK[:, None]).any(-1)


# One question

_Asked = tuple[str, str, Sequence[int]]  # the question, its answer and the referents


def _ask(
    view: SceneView, dice: random.Random, weights: Mapping[str, float]
) -> tuple[str, str, str, Sequence[int]]:
    """One question: of a kind drawn by weight, or of another where the image allows none of that
    kind."""
    kinds = dict(weights)
    while kinds:
        question_kind = list(kinds)[weighted(dice, list(kinds.values()))]
        asked = _ASKERS[question_kind](view, dice)
        if asked:
            question, answer, referents = asked
            return question_kind, question, answer, referents
        del kinds[question_kind]
    return "existence", *_existence(view, dice)  # always possible


def _word(dice: random.Random, template: str, **parts: str) -> str:
    return pick(dice, _WORDINGS[template]).format(**parts)


def _existence(view: SceneView, dice: random.Random) -> _Asked:
    colour, shape, _ = view.traits[pick(dice, view.present)]
    absent_colours = [c for c in range(len(COLOURS)) if (-1, c, -1) not in view.fits]
    absent_shapes = [s for s in range(len(SHAPES)) if (-1, -1, s) not in view.fits]
    # A form is used only where the image allows both answers, so that no form gives its answer
    # away.
    form = pick(
        dice, ("cs", "cs", "cs", "c" if absent_colours else "cs", "s" if absent_shapes else "cs")
    )
    yes = dice.random() < 0.5
    if form == "c":
        description = (-1, colour if yes else pick(dice, absent_colours), -1)
    elif form == "s":
        description = (-1, -1, shape if yes else pick(dice, absent_shapes))
    elif yes:
        description = (-1, colour, shape)
    else:  # near misses: this colour in a shape it does not come in, or the other way round
        absent = [
            (-1, c, s)
            for c in range(len(COLOURS))
            for s in range(len(SHAPES))
            if (-1, c, s) not in view.fits
        ]
        misses = [pair for pair in absent if pair[1] == colour]
        others = [pair for pair in absent if pair[2] == shape]
        if misses or others:  # always, among up to eleven objects
            near = misses if misses and dice.random() < 0.5 else others or misses
            description = pick(dice, near)
        else:  # in a crowd, any pair that is not there; there may be none
            yes = not absent
            description = (-1, colour, shape) if yes else pick(dice, absent)
    question = _word(dice, "existence", a=one(description))
    return question, "yes" if yes else "no", view.fits.get(description, ())


def _trait(
    view: SceneView,
    dice: random.Random,
    trait: str,
    column: int,
    values: Sequence[str],
    *levels: Sequence[str],
) -> _Asked | None:
    """Ask for a trait of an object that the levels' descriptions single out, all values being as
    likely."""
    named: dict[int, list[tuple[int, list[Description]]]] = {}
    for k in view.present:
        names = view.unique(k, *levels)
        if names:
            named.setdefault(view.traits[k][column], []).append((k, names))
    if not named:
        return None
    k, names = pick(dice, named[pick(dice, sorted(named))])
    question = _word(dice, trait, the="the " + words(pick(dice, names)))
    return question, values[view.traits[k][column]], (k,)


def _colour(view: SceneView, dice: random.Random) -> _Asked | None:
    return _trait(view, dice, "colour", 0, COLOURS, ("s",), ("zs",))


def _shape(view: SceneView, dice: random.Random) -> _Asked | None:
    return _trait(view, dice, "shape", 1, SHAPES, ("c",), ("zc",))


def _size(view: SceneView, dice: random.Random) -> _Asked | None:
    return _trait(view, dice, "size", 2, SIZES, ("s",), ("c", "cs"))


def _count(view: SceneView, dice: random.Random) -> _Asked:
    colours = [c for c in range(len(COLOURS)) if (-1, c, -1) in view.fits]
    shapes = [s for s in range(len(SHAPES)) if (-1, -1, s) in view.fits]
    by_count: list[dict[str, list[Description]]] = [{} for _ in range(MAX_COUNT + 1)]
    forms = {
        "c": [(-1, c, -1) for c in range(len(COLOURS))],
        "s": [(-1, -1, s) for s in range(len(SHAPES))],
        "cs": [
            (-1, c, s) for c in colours for s in shapes
        ],  # both seen, though perhaps not on one object
    }
    for form, descriptions in forms.items():
        for description in descriptions:
            count = len(view.fits.get(description, ()))
            if count <= MAX_COUNT:
                by_count[count].setdefault(form, []).append(description)
    weights = [
        weight if candidates else 0.0
        for weight, candidates in zip(_COUNT_WEIGHTS, by_count, strict=True)
    ]
    count = weighted(dice, weights)
    description = pick(dice, by_count[count][pick(dice, list(by_count[count]))])
    return _word(dice, "count", many=many(description)), str(count), view.fits.get(description, ())


def _position(view: SceneView, dice: random.Random) -> _Asked | None:
    middle = (view.side - 1) / 2
    options = [
        (axis, k, before if at < middle else after)
        for axis, places, before, after in (
            ("x", view.x, "left", "right"),
            ("y", view.y, "top", "bottom"),
        )
        for k in view.present
        if abs((at := places[k]) - middle) > MIDDLE * view.side and view.names(k)
    ]
    if not options:
        return None
    axis, k, answer = pick(dice, options)
    return _word(dice, axis, the="the " + words(pick(dice, view.names(k)))), answer, (k,)


def _relation(view: SceneView, dice: random.Random) -> _Asked | None:
    named = [k for k in view.present if view.names(k)]
    template = pick(dice, ("left", "right", "above", "below"))
    places, sign = (
        (view.x if template in ("left", "right") else view.y),
        (1 if template in ("left", "above") else -1),
    )
    pairs = [
        (a, b) for a in named for b in named if sign * (places[b] - places[a]) >= APART * view.side
    ]
    if not pairs:
        return None
    a, b = pick(dice, pairs)  # the template is true of a and b, so that the coin decides the answer
    yes = dice.random() < 0.5
    if not yes:
        a, b = b, a
    the, other = ("the " + words(pick(dice, view.names(k))) for k in (a, b))
    return _word(dice, template, the=the, other=other), "yes" if yes else "no", (a, b)


_ASKERS = {"existence": _existence, "colour": _colour, "shape": _shape, "size": _size,
           "count": _count,
           "position": _position, "relation": _relation}  # fmt: skip
