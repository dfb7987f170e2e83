"""Sentences, hypotheses and captions of generated pictures: right, balanced, the same everywhere;
and their tasks."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from pumer.lab import tasks
from pumer.lab.scenes.captions import describe, mistake
from pumer.lab.scenes.drawing import COLOURS, SHAPES, SIZES, draw_scenes
from pumer.lab.scenes.hypotheses import KINDS as HYPOTHESES
from pumer.lab.scenes.hypotheses import LABELS, suppose
from pumer.lab.scenes.sets import draw_sets
from pumer.lab.scenes.statements import KINDS as STATEMENTS
from pumer.lab.scenes.statements import PAIRS, state
from pumer.lab.scenes.views import dice_of, views

SETS = 160
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven"]
NAMES = ["scenes-nlvr2", "scenes-ve", "scenes-retrieval"]


class NoClearCase(Exception):
    """What is asked of a picture has no clear answer."""


def objects(scenes, row):
    """The objects of a picture as dicts, most plainly."""
    return [
        {
            "color": COLOURS[scenes.colour[row, k]],
            "shape": SHAPES[scenes.shape[row, k]],
            "size": SIZES[scenes.size[row, k]],
            "x": int(scenes.x[row, k]),
            "y": int(scenes.y[row, k]),
        }
        for k in range(10)
        if scenes.present[row, k]
    ]


def matching(table, phrase):
    """The objects of which a noun phrase can be said."""
    singular = re.sub(r"^(an?|the) ", "", phrase).replace("crosses", "cross")
    words = {
        word if word in ("cross", *COLOURS, *SIZES) else word.removesuffix("s")
        for word in singular.split()
    }
    words -= {"object"}
    assert words <= {*COLOURS, *SHAPES, *SIZES}, phrase
    return [o for o in table if words <= {o["color"], o["shape"], o["size"]}]


def beside(table, what, way, other):
    """Whether any of the one lies clearly that way of any of the other; False only where none does
    at all."""
    axis, sign = {"left": ("x", -1), "right": ("x", 1), "above": ("y", -1), "below": ("y", 1)}[way]
    gaps = [
        sign * (a[axis] - b[axis])
        for a in matching(table, what)
        for b in matching(table, other)
        if a is not b
    ]
    if gaps and 0 < max(gaps) < 9.6:
        raise NoClearCase
    return any(gap >= 9.6 for gap in gaps)


def in_half(table, what, half):
    axis, sign = {"left": ("x", -1), "right": ("x", 1), "top": ("y", -1), "bottom": ("y", 1)}[half]
    places = [sign * (o[axis] - 47.5) for o in matching(table, what)]
    if places and abs(max(places)) < 0.08 * 96:
        raise NoClearCase
    return any(place > 0 for place in places)


def way_of(words):
    return (
        re.sub("^to the | of$", "", words)
        .replace("higher up than", "above")
        .replace("lower down than", "below")
    )


BESIDE = r"((?:to the )?(?:left|right) of|above|below|higher up than|lower down than)"


def has(table, phrase):
    """Whether a picture has what a noun phrase of a sentence speaks of."""
    if found := re.fullmatch(r"(exactly|at least) (\w+) (.+)", phrase):
        count, number = len(matching(table, found[3])), NUMBERS.index(found[2])
        return count == number if found[1] == "exactly" else count >= number
    if found := re.fullmatch(r"two (.+) of (?:the same|different) (color|shape|size)s?", phrase):
        values = [o[found[2]] for o in matching(table, found[1])]
        return len(set(values)) > 1 if "different" in phrase else len(set(values)) < len(values)
    if found := re.fullmatch(r"(an? .+) in the (\w+) half", phrase):
        return in_half(table, *found.groups())
    if found := re.fullmatch(rf"(an? .+?) {BESIDE} (an? .+)", phrase):
        return beside(table, found[1], way_of(found[2]), found[3])
    assert re.match("an? ", phrase)
    return bool(matching(table, phrase))


def is_true(sentence, left, right):
    """Whether a sentence is true of two pictures, worked out from its words; and the form it
    has."""

    def match(*patterns):
        return next(
            (found for pattern in patterns if (found := re.fullmatch(pattern, sentence))), None
        )

    if found := match(
        "there are (.+) in all", "(?:the two|both) pictures together (?:have|contain) (.+)"
    ):
        number, what = found[1].split(" ", 1)
        return len(matching(left, what)) + len(matching(right, what)) == NUMBERS.index(
            number
        ), "sum"
    if found := match(
        r"there are more (.+) in the (left|right) picture than in the (?:left|right) one",
        r"the (left|right) picture has more (.+) than the (?:left|right) one",
    ):
        side, what = sorted(found.groups(), key=lambda part: part not in ("left", "right"))
        counts = [len(matching(table, what)) for table in (left, right)]
        return counts[0] > counts[1] if side == "left" else counts[0] < counts[1], "more"
    if found := match(
        "both pictures have the same number of (.+)",
        "there is the same number of (.+) in each picture",
    ):
        return len(matching(left, found[1])) == len(matching(right, found[1])), "equal"
    if found := match(
        "(an? .+) in the left picture has the same (.+) as one in the right picture",
        r"both pictures have (an? .+) of the same (\w+)",
    ):
        values = [{o[found[2]] for o in matching(table, found[1])} for table in (left, right)]
        assert all(values)
        return bool(values[0] & values[1]), "same"
    if found := match(
        r"both pictures have (.+)", r"each (?:of the pictures|picture) (?:has|contains) (.+)"
    ):
        return has(left, found[1]) and has(right, found[1]), "both"
    if found := match(r"(?:exactly|only) one (?:of the pictures|picture) (?:has|contains) (.+)"):
        return has(left, found[1]) != has(right, found[1]), "one"
    if found := match(
        r"only the (\w+) picture has (.+)", r"only the picture on the (\w+) contains (.+)"
    ):
        one, other = (left, right) if found[1] == "left" else (right, left)
        return has(one, found[2]) and not has(other, found[2]), "only"
    if found := match(
        r"at least one of the pictures has (.+)", r"one or both of the pictures contain (.+)"
    ):
        return has(left, found[1]) or has(right, found[1]), "any"
    found = match(r"no(?:ne of the pictures has| picture contains) (.+)")
    return not has(left, found[1]) and not has(right, found[1]), "none"


def follows(sentence, table):
    """What a picture says of a hypothesis, worked out from its words; None where it should not have
    been made."""
    sentence = sentence.replace(" of the picture", "")

    def the(phrase):
        assert phrase.startswith("the ")
        return matching(table, phrase)

    if found := re.fullmatch(
        r"the (two|three|four|five|six|seven) (.+) (?:are|have) (.+)", sentence
    ):
        fitting, said = matching(table, found[2]), found[3]
        if len(fitting) != NUMBERS.index(found[1]):
            return "neutral"
        if trait := re.fullmatch(r"(?:of )?the same (\w+)", said):
            return "entailment" if len({o[trait[1]] for o in fitting}) == 1 else "contradiction"
        return "entailment" if all(said in o.values() for o in fitting) else "contradiction"
    if found := re.fullmatch(rf"(the .+?) is {BESIDE} (the .+)", sentence):
        what, other = the(found[1]), the(found[3])
        if not what or not other:
            return "neutral"
        assert len(what) == len(other) == 1
        return (
            "entailment" if beside(table, found[1], way_of(found[2]), found[3]) else "contradiction"
        )
    if found := re.fullmatch(r"(the .+) is in the (\w+) half", sentence):
        what = the(found[1])
        assert len(what) <= 1
        return (
            LABELS[1]
            if not what
            else LABELS[2]
            if in_half(table, found[1], found[2])
            else LABELS[0]
        )
    for pattern in (
        r"the color of (the .+) is (\w+)",
        r"(the .+) has the shape of an? (\w+)",
        r"(the .+) is a (\w+) one",
        r"(the .+) is (?:a )?(\w+)",
    ):
        if found := re.fullmatch(pattern, sentence):
            what = the(found[1])
            assert len(what) <= 1
            return (
                LABELS[1] if not what else LABELS[2] if found[2] in what[0].values() else LABELS[0]
            )
    raise AssertionError(sentence)


def facts(caption, table):
    """What a picture says of each part of a caption, worked out from its words; None where it is no
    clear case."""
    for part in caption.removeprefix("the picture has ").split(", and "):
        number, _, what = part.partition(" ")
        try:
            yield (
                len(matching(table, what)) == NUMBERS.index(number)
                if number in NUMBERS
                else has(table, part)
            )
        except NoClearCase:
            yield None


@pytest.fixture(scope="module")
def statements():
    return draw_sets(5, range(SETS), 4, state)


@pytest.fixture(scope="module")
def hypotheses():
    return draw_sets(5, range(SETS), 3, suppose)


# NLVR2


def test_statements_by_brute_force(statements):
    scenes, sets = statements
    assert list(sets) == list(range(SETS))
    forms = Counter()
    for made in sets.values():
        tables = [objects(scenes, row) for row in made.rows]
        for label, (left, right) in zip(made.said.labels, PAIRS, strict=True):
            truth, form = is_true(made.said.sentence, tables[left], tables[right])
            assert label == truth, made.said
        forms[form] += 1
    assert len(forms) == 9
    assert {made.said.kind for made in sets.values()} == set(STATEMENTS)


def test_statements_are_balanced_whatever_the_words(statements):
    _, sets = statements
    by_word = defaultdict(Counter)
    for made in sets.values():
        template = re.sub("|".join((*COLOURS, *SHAPES, *SIZES, *NUMBERS)), "_", made.said.sentence)
        for word in {template, *made.said.sentence.split()}:
            by_word[word].update(made.said.labels)
    assert all(count[True] == count[False] for count in by_word.values())
    diagonal = 0
    for made in sets.values():
        labels, form = (
            made.said.labels,
            is_true(made.said.sentence, [], [])[1] if "same" not in made.said.sentence else "",
        )
        diagonal += labels[0] == labels[1]
        if form in ("one", "sum"):
            assert labels[0] == labels[1] != labels[2] == labels[3], (
                "each picture is once in a true pair"
            )
    assert diagonal / SETS > 0.35


def test_kinds_of_statements_can_be_chosen():
    _, sets = draw_sets(5, range(8), 4, lambda seen, dice: state(seen, dice, {"position": 1.0}))
    assert {made.said.kind for made in sets.values()} == {"position"}


# Visual entailment


def test_hypotheses_by_brute_force(hypotheses):
    scenes, sets = hypotheses
    for made in sets.values():
        tables = [objects(scenes, row) for row in made.rows]
        for hypothesis in made.said:
            found = [follows(hypothesis.sentence, table) for table in tables]
            assert found == [LABELS[label] for label in hypothesis.labels], hypothesis
    assert {hypothesis.kind for made in sets.values() for hypothesis in made.said} == set(
        HYPOTHESES
    )


def test_hypotheses_are_balanced_whatever_the_words_and_whatever_the_picture(hypotheses):
    _, sets = hypotheses
    for made in sets.values():
        labels = np.array([hypothesis.labels for hypothesis in made.said])
        assert (np.sort(labels, 0) == [[0], [1], [2]]).all()
        assert (np.sort(labels, 1) == [0, 1, 2]).all()


# Captions


def test_captions_by_brute_force():
    scenes = draw_scenes(5, range(300))
    tables, seen = [objects(scenes, row) for row in range(300)], views(scenes)
    texts = []
    for number, (table, view) in enumerate(zip(tables, seen, strict=True)):
        captions = describe(view, dice_of(5, number))
        assert len({caption.text for caption in captions}) == 5
        for caption in captions:
            assert caption.fits(view)
            assert all(facts(caption.text, table)), caption.text
            wrong = mistake(caption, view, dice_of(6, number))
            assert not wrong.fits(view)
            assert (
                sum(a != b for a, b in zip(wrong.text.split(), caption.text.split(), strict=False))
                <= 4
            )
        texts.append(captions[0])
    others = [
        caption.fits(view)
        for i, caption in enumerate(texts[:60])
        for j, view in enumerate(seen)
        if i != j
    ]
    assert np.mean(others) < 0.005


# Tasks


@pytest.mark.parametrize("name", NAMES)
def test_examples_do_not_depend_on_the_batch(name):
    task = tasks.build({"name": name, "questions": 40, "image_size": 48})
    examples = task.examples("test")
    assert len(examples) == 40
    every = examples[:]
    picked = [17, 3, 39, 3]
    for one, number in zip(examples.__getitems__(picked), picked, strict=True):
        other = every[number]
        assert (one.id, one.text, one.target, one.meta) == (
            other.id,
            other.text,
            other.target,
            other.meta,
        )
        assert one.negatives == other.negatives
        assert [np.asarray(image).tolist() for image in one.images] == [
            np.asarray(image).tolist() for image in other.images
        ]
    assert len(one.images) == task.image_count
    assert len({example.id for example in every}) == 40
    assert examples[3].text == every[3].text
    assert task.examples("train")[:4] != every[:4]
    assert tasks.build({"name": name, "seed": 1}).examples("test")[0].text != every[0].text
    with pytest.raises(ValueError, match="splits train, val, test"):
        task.examples("dev")
    with pytest.raises(IndexError):
        examples[40]
    with pytest.raises(ValueError, match="from 1"):
        tasks.build({"name": name, "questions": 0})


@pytest.mark.parametrize("name", NAMES)
def test_metrics_and_predictions(name, tmp_path):
    task = tasks.build({"name": name, "questions": 36, "image_size": 32})
    examples = task.examples("val")[:]
    right = {
        e.id: e.target if name == "scenes-retrieval" else task.labels[e.target] for e in examples
    }
    metric = task.metric(right, examples)
    assert metric["accuracy"] == 100
    assert {e.meta["kind"] for e in examples} <= set(metric)
    assert ("consistency" in metric) == (name == "scenes-nlvr2")
    task.write_predictions(tmp_path / "predictions", right, examples)
    assert len((tmp_path / "predictions").read_text().splitlines()) == 36


def test_nlvr2_examples_are_the_sets():
    examples = tasks.build({"name": "scenes-nlvr2"}).examples("test")
    scenes, sets = draw_sets(3, [7], 4, state)
    for pair, example in enumerate(examples[28:32]):
        assert example.id == f"test-7-{pair}-0"
        assert (example.text, example.target) == (sets[7].said.sentence, sets[7].said.labels[pair])
        for image, picture in zip(example.images, PAIRS[pair], strict=True):
            assert (
                np.asarray(image) == scenes.images[sets[7].rows[picture]].permute(1, 2, 0).numpy()
            ).all()


def test_ve_examples_are_the_sets():
    examples = tasks.build({"name": "scenes-ve"}).examples("test")[18:27]
    scenes, sets = draw_sets(3, [2], 3, suppose)
    assert [e.id for e in examples[:3]] == [
        f"6.jpg#0r1{LABELS[h.labels[0]][0]}" for h in sets[2].said
    ]
    for place, example in enumerate(examples):
        picture = place // 3
        assert example.target == sets[2].said[place % 3].labels[picture]
        image = scenes.images[sets[2].rows[picture]].permute(1, 2, 0).numpy()
        assert (np.asarray(example.images[0]) == image).all()


@pytest.mark.parametrize("negatives", [0, 1, 15])
def test_negatives_do_not_fit(negatives):
    task = tasks.build({"name": "scenes-retrieval", "questions": 40, "negatives": negatives})
    scenes = draw_scenes(3, range(40))
    for number, example in enumerate(task.examples("test")[:]):
        assert len(set(example.negatives)) == negatives
        table = objects(scenes, number)
        assert all(facts(example.text, table))
        assert all(False in facts(text, table) for text in example.negatives)


def test_pool():
    task = tasks.build({"name": "scenes-retrieval", "pictures": 12, "image_size": 32})
    pool = task.pool("test")
    assert (len(pool.images), len(pool.captions), pool.image_of.tolist()) == (
        12,
        60,
        sorted(list(range(12)) * 5),
    )
    scores = (pool.image_of[None] == np.arange(12)[:, None]).astype(float)
    assert tasks.retrieval.recalls(scores, pool.image_of, ks=(1,))["ir_r1"] == 100
    assert task.examples("test")[7].text in pool.captions[35:40]
