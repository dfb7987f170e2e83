"""VQAv2: answers, scores, targets, reading the official files, writing predictions."""

import json
import re
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pumer.lab import tasks
from pumer.lab.data.images import BrokenImageError, KeepAspect
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.tasks import Collator, Example, VQAv2
from pumer.lab.tasks.base import bootstrap_interval
from pumer.lab.tasks.check import check_files
from pumer.lab.tasks.vqa_answers import (
    build_vocabulary,
    leave_one_out,
    normalize,
    soft_targets,
    vocabulary_of,
    vqa_score,
)
from pumer.lab.tasks.vqav2 import read_answers

FIXTURE = Path(__file__).parents[2] / "data" / "fixtures" / "vqav2"
QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"
ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
LABELS = ("2", "red", "no", "tree", "brown", "4", "squares")
PERFECT = {
    1000: "2",
    1001: "red",
    1002: "no",
    2000: "tree",
    2001: "no",
    2002: "brown",
    3000: "4",
    3001: "squares",
}

# Normalised, and distinct when normalised: for these the raw counts of the targets are the
# evaluator's counts.
PLAIN = st.sampled_from(["yes", "no", "red", "dark red", "2", "don't"])
ANYTHING = st.text("ab ,.;-'!?/\n\tT1320", max_size=12) | st.sampled_from(
    ["the dog", "Dog.", "two", "2", "cant", "U.S."]
)


@pytest.fixture
def root(tmp_path):
    """A copy of the fixture to change."""
    return shutil.copytree(FIXTURE, tmp_path / "vqav2")


def edit(path, key, change):
    """Pass the rows of an official file through `change`, which may work in place."""
    content = json.loads(path.read_text())
    content[key] = change(content[key]) or content[key]
    path.write_text(json.dumps(content))


# --- answers ---


@pytest.mark.parametrize(
    ("answer", "normalised"),
    [
        ("The Dog.", "dog"),
        ("2,000", "2000"),
        ("black-white", "black white"),
        ("red, blue", "red blue"),
        ("U.S.", "us"),
        ("3.5", "3.5"),
        ("None", "0"),
        ("a/b", "b"),
        ("10:30 a.m.", "10:30 am"),
        ("t-shirt, 1,000", "tshirt 1000"),
        ("black -white", "black white"),  # a mark beside a blank goes, the blank stays
        ("a-b c -", "ab c"),  # beside a blank anywhere: every one goes
        ("dont", "don't"),
        ("couldnt've couldn'tve", "couldn't've couldn't've"),
        ("couldntve", "couldntve"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # the evaluator's table has "Im", but the text is lower case by then
        ("an apple the", "apple"),
        ("ten none zero", "10 0 0"),
        ("3. 4", "3 4"),
        ("." * 40 + "a1", "." * 8 + "a1"),  # only 32 periods go
    ],
)
def test_normalisation(answer, normalised):
    assert normalize(answer) == normalised


def slow_score(prediction, answers):
    """The official evaluator's loop, written out again: whole annotator records compared, thirds
    exact."""

    def clean(text):
        return text.replace("\n", " ").replace("\t", " ").strip()

    records = [{"answer": clean(answer), "answer_id": i} for i, answer in enumerate(answers)]
    prediction = clean(prediction)
    if len({record["answer"] for record in records}) > 1:
        for record in records:
            record["answer"] = normalize(record["answer"])
        prediction = normalize(prediction)
    total = Fraction(0)
    for left_out in records:
        others = [record for record in records if record != left_out]
        total += min(
            Fraction(1), Fraction(sum(record["answer"] == prediction for record in others), 3)
        )
    return total / len(records)


@given(PLAIN | ANYTHING, st.lists(PLAIN | ANYTHING, min_size=10, max_size=10))
def test_score_is_the_leave_one_out_loop(prediction, answers):
    for answer in (prediction, *set(answers)):
        assert vqa_score(answer, answers) == float(slow_score(answer, answers))


def test_score_by_number_of_annotators():
    assert [leave_one_out(n) for n in range(11)] == [0, 0.3, 0.6, 0.9] + [1] * 7


def test_nothing_is_normalised_when_annotators_agree():
    assert vqa_score("The dog", ["dog"] * 10) == 0
    assert vqa_score("The dog", ["dog"] * 9 + ["cat"]) == 1
    assert vqa_score("\tdog\n", ["dog "] * 10) == 1


@given(st.lists(PLAIN, min_size=10, max_size=10))
def test_soft_targets_are_the_score(answers):
    labels = sorted(set(answers) | {"purple"})
    targets = soft_targets(answers, {label: i for i, label in enumerate(labels)})
    for i, label in enumerate(labels):
        assert targets.get(i, 0) == vqa_score(label, answers)
        assert targets.get(i, 0) == [0, 0.3, 0.6, 0.9, 1][min(Counter(answers)[label], 4)]


def test_soft_targets_compare_raw_strings():
    assert soft_targets(["Red"] * 5 + ["red"] * 5, {"red": 3}) == {3: 1.0}
    assert soft_targets(["Red"] * 9 + ["red"], {"red": 3}) == {3: 0.3}


# --- vocabularies ---


def test_vocabulary_orders_and_threshold():
    answers = ["yes", "The Cat", "no", "cat", "yes", "cat", "no", "dog"]
    assert build_vocabulary(answers, 2) == ("cat", "no", "yes")
    assert build_vocabulary(answers, 2, "first") == ("yes", "cat", "no")
    assert build_vocabulary(answers, 3) == ("cat",)
    with pytest.raises(ValueError, match="none of 4 answers has 9 questions"):
        build_vocabulary(answers)


def test_vocabulary_of_files():
    assert build_vocabulary(read_answers(FIXTURE, ["val2014"]), 1, "first") == (
        "2",
        "red",
        "no",
        "tree",
        "brown",
        "4",
        "windows",
    )
    assert build_vocabulary(read_answers(FIXTURE, ["val2014"]), 2) == ("no",)
    with pytest.raises(ValueError, match=r"train2014_annotations\.json does not exist"):
        read_answers(FIXTURE, ["train2014"])


def test_vocabulary_of_a_model():
    assert vocabulary_of({1: "no", 0: "yes"}) == ("yes", "no")
    for bad in ({0: "LABEL_0", 1: "LABEL_1"}, {1: "yes", 2: "no"}):
        with pytest.raises(ValueError, match="id2label"):
            vocabulary_of(bad)


def test_labels_must_differ():
    with pytest.raises(ValueError, match=r"1 of 3 labels \(yes\) repeat"):
        VQAv2(FIXTURE, labels=("yes", "no", "yes"))


# --- reading ---


def test_reads_the_files():
    task = tasks.get("vqav2")(FIXTURE, labels=LABELS)
    examples = task.examples("val2014")
    assert [example.id for example in examples] == list(PERFECT)
    assert examples[1].text == "What color is the ball on the left?"
    assert examples[1].target == {1: 1.0}
    assert examples[3].target == {3: 0.9}
    assert examples[7].target == {6: 0.6}
    assert examples[7].cluster == 3
    assert examples[7].images[0].name == "COCO_val2014_000000000003.jpg"
    assert examples[7].meta["answer_type"] == "other"
    with pytest.raises(IndexError):
        examples[8]


def test_zero_target_is_kept_and_targets_are_words_without_labels():
    assert VQAv2(FIXTURE, labels=("zebra",)).examples("val2014")[0].target == {}
    for example in VQAv2(FIXTURE).examples("val2014"):
        assert example.target == {
            word: vqa_score(word, example.meta["answers"]) for word in example.target
        }
        assert set(example.target) == set(map(normalize, example.meta["answers"]))


def test_images_lie_directly_in_a_folder(root, tmp_path):
    folder = (root / "val2014").rename(tmp_path / "pictures")
    examples = VQAv2(root, images=folder).examples("val2014")
    assert examples[0].images[0].parent == folder
    for path in folder.iterdir():
        path.rename(root / path.name)
    assert VQAv2(root).examples("val2014")[0].images[0].parent == root


def test_test_split_has_no_annotations(root, tmp_path):
    (root / QUESTIONS).rename(root / "v2_OpenEnded_mscoco_test-dev2015_questions.json")
    (root / "test2015").mkdir()
    for path in (root / "val2014").iterdir():
        path.rename(root / "test2015" / path.name.replace("val2014", "test2015"))
    task = VQAv2(root, labels=LABELS)
    examples = task.examples("test-dev2015")
    assert examples[0].target is None
    task.write_predictions(tmp_path / "out.json", PERFECT, examples)
    with pytest.raises(ValueError, match="question 1000 has no annotation"):
        task.metric(PERFECT, examples)


@pytest.mark.parametrize(
    ("file", "key", "change", "message"),
    [
        (
            ANNOTATIONS,
            "annotations",
            lambda r: r[:5],
            r"3 of 8 questions \(2002, 3000, 3001\) have no annotation",
        ),
        (
            ANNOTATIONS,
            "annotations",
            lambda r: [*r, r[0]],
            r"annotations\.json: question 1000: id 1000 repeats",
        ),
        (
            QUESTIONS,
            "questions",
            lambda r: r + r[:2],
            r"2 of 10 rows are broken.*question 1000: id 1000 repeats",
        ),
        (
            QUESTIONS,
            "questions",
            lambda r: r[0].update(image_id=9),
            r"annotations\.json: 1 of 8 questions \(1000\) have another image_id than in the "
            r"questions",
        ),
        (
            QUESTIONS,
            "questions",
            lambda r: r[0].update(image_id="9"),
            r"questions\.json: question 1000: image_id is '9', not a number; give COCO's",
        ),
        (
            QUESTIONS,
            "questions",
            lambda r: r[0].pop("question"),
            "question 1000: there is no question",
        ),
        (
            QUESTIONS,
            "questions",
            lambda r: r[0].update(question=" "),
            "question 1000: question is ' ', not a text",
        ),
        (
            QUESTIONS,
            "questions",
            lambda r: r[0].update(question=None),
            "question 1000: question is None, not a text",
        ),
        (
            QUESTIONS,
            "questions",
            lambda r: r[3].update(question_id=[]),
            r"questions\[3\]: question_id is \[\], not a",
        ),
        (
            QUESTIONS,
            "questions",
            lambda r: r[3].pop("question_id"),
            r"questions\[3\]: there is no question_id",
        ),
        (
            QUESTIONS,
            "questions",
            lambda r: [7, *r],
            r"questions\[0\]: a JSON object is expected, not int",
        ),
        (
            QUESTIONS,
            "questions",
            lambda r: r[0].update(image=3),
            "question 1000: image is 3, not a text",
        ),
        (
            QUESTIONS,
            "else",
            lambda r: r,
            "is no VQAv2 questions file: there is no list of questions",
        ),
        (
            ANNOTATIONS,
            "annotations",
            lambda r: r[0].update(answers="red"),
            "1000: answers is 'red', not a list",
        ),
        (
            ANNOTATIONS,
            "annotations",
            lambda r: r[0]["answers"][2].update(answer=3),
            "1000: answers has {'answer': 3,",
        ),
        (
            ANNOTATIONS,
            "annotations",
            lambda r: r[0]["answers"][2].update(answer=None),
            "1000: answers has {'answer': N",
        ),
        (
            ANNOTATIONS,
            "annotations",
            lambda r: r[0]["answers"].insert(0, None),
            "1000: answers has None, which is no",
        ),
        (
            ANNOTATIONS,
            "annotations",
            lambda r: r[0].update(answer_type=2),
            "1000: answer_type is 2, not a text",
        ),
        (
            ANNOTATIONS,
            "annotations",
            lambda r: r[0].pop("answers") and None,
            "1000: there are no answers",
        ),
        (
            ANNOTATIONS,
            "annotations",
            lambda r: r[0]["answers"].pop(),
            "1000: it has 9 answers, not 10",
        ),
    ],
)
def test_bad_files(root, file, key, change, message):
    def apply(rows):
        result = change(rows)
        return result if isinstance(result, list) else None

    if key == "else":
        (root / file).write_text('{"answers": []}')
    else:
        edit(root / file, key, apply)
    with pytest.raises(ValueError, match=message):
        VQAv2(root).examples("val2014")
    (check,) = [check for check in check_files("vqav2", root) if check.name == "val2014"]
    assert re.search(message, check.problem)
    assert not check.absent


@pytest.mark.parametrize("file", [QUESTIONS, ANNOTATIONS])
def test_rows_may_have_a_key_answer(root, file):
    key = "questions" if file == QUESTIONS else "annotations"
    edit(root / file, key, lambda rows: [row | {"answer": "red"} for row in rows])
    assert [example.id for example in VQAv2(root).examples("val2014")] == list(PERFECT)


def test_names_of_ok_vqa_and_of_coco_2017(root):
    for path in (root / QUESTIONS, root / ANNOTATIONS):
        path.rename(root / path.name.removeprefix("v2_"))
    (root / "val2014").rename(root / "val2017")
    for path in (root / "val2017").iterdir():
        path.rename(path.with_name(path.name.removeprefix("COCO_val2014_")))
    examples = VQAv2(root).examples("val2014")
    assert examples[0].images[0] == root / "val2017" / "000000000001.png"
    assert build_vocabulary(read_answers(root, ["val2014"]), 2) == ("no",)


def test_questions_that_name_their_images(root):
    def name(rows):
        for row in rows:
            del row["image_id"]
            row["image"] = f"shelf/{row['question_id'] // 1000} or so.webp"

    edit(root / QUESTIONS, "questions", name)
    (root / "shelf").mkdir()
    for number in (1, 2, 3):
        picture = Image.open(next((root / "val2014").glob(f"*{number}.*")))
        picture.save(root / "shelf" / f"{number} or so.webp")
    examples = VQAv2(root).examples("val2014")
    assert examples[7].images[0] == root / "shelf" / "3 or so.webp"
    assert examples[7].cluster == "shelf/3 or so.webp"


def test_missing_images_are_counted(root):
    for path in (root / "val2014").iterdir():
        path.unlink()
    with pytest.raises(
        ValueError, match=r"3 of 3 images \(COCO_val2014_0{11}1, .*set images to their folder"
    ):
        VQAv2(root).examples("val2014")


def test_missing_and_broken_files(root):
    with pytest.raises(
        ValueError, match=f"test2015_questions.json does not exist; .* has {QUESTIONS}"
    ):
        VQAv2(root).examples("test2015")
    with pytest.raises(ValueError, match="nowhere does not exist, set the task's root"):
        VQAv2(root / "nowhere").examples("val2014")
    (root / ANNOTATIONS).write_text('{"annotations": [')
    with pytest.raises(ValueError, match=r"annotations\.json is no JSON"):
        VQAv2(root).examples("val2014")
    (root / ANNOTATIONS).unlink()
    with pytest.raises(ValueError, match=r"annotations\.json does not exist"):
        VQAv2(root).examples("val2014")


# --- metric ---


def test_metric_overall_and_by_type():
    task = VQAv2(FIXTURE, labels=LABELS)
    examples = task.examples("val2014")
    metric = task.metric(PERFECT, examples)
    # "tree": three raw, three "a tree", three "Tree." are one answer to the evaluator; "squares"
    # has two annotators.
    assert metric["accuracy"] == round(100 * 7.6 / 8, 2)
    assert metric["accuracy_low"] <= metric["accuracy"] <= metric["accuracy_high"]
    assert metric["answer_type:number"] == 100
    assert metric["answer_type:other"] == 90
    assert metric["question_type:what are"] == 60
    part = [examples[i] for i in (6, 7)]
    assert task.metric({3000: "four", 3001: "can't tell"}, part)["accuracy"] == 65


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: {k: v for k, v in p.items() if k < 3000},
            r"2 of 8 examples \(3000, 3001\) have no prediction",
        ),
        (lambda p: p | {5: "no"}, r"1 of 9 predictions \(5\) are for no example"),
        (lambda p: p | {1000: 2}, r"1 of 8 predictions \(1000\) are no strings"),
    ],
)
def test_bad_predictions_write_nothing(tmp_path, change, message):
    task = VQAv2(FIXTURE)
    with pytest.raises(ValueError, match=message):
        task.write_predictions(tmp_path / "out.json", change(PERFECT), task.examples("val2014"))
    assert not list(tmp_path.iterdir())


def test_prediction_file(tmp_path):
    task = VQAv2(FIXTURE)
    path = tmp_path / "out.json"
    task.write_predictions(path, dict(reversed(PERFECT.items())), task.examples("val2014"))
    assert json.loads(path.read_text()) == [
        {"question_id": k, "answer": v} for k, v in PERFECT.items()
    ]
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "out.json"
    path.write_text("old")
    monkeypatch.setattr(json, "dump", lambda rows, file: file.write("[") and 1 / 0)
    task = VQAv2(FIXTURE)
    with pytest.raises(ZeroDivisionError):
        task.write_predictions(path, PERFECT, task.examples("val2014"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_interval_is_repeatable_and_knows_clusters():
    scores = [1.0, 0.0] * 100
    alone = bootstrap_interval(scores, range(200))
    assert alone == bootstrap_interval(scores, range(200))
    assert alone[0] == pytest.approx(0.5 - 1.96 * 0.5 / 200**0.5, abs=0.02)
    assert alone[1] == pytest.approx(0.5 + 1.96 * 0.5 / 200**0.5, abs=0.02)
    sorted_scores = sorted(scores)  # 20 pictures, all of whose questions are right or all wrong
    together = bootstrap_interval(sorted_scores, [i // 10 for i in range(200)])
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
    assert bootstrap_interval([1.0, 0.5], [7, 7]) == (0.75, 0.75)


# --- batches ---


@pytest.fixture(scope="module")
def collator():
    task = VQAv2(FIXTURE, labels=LABELS)
    tokenizer = train_tokenizer([example.text for example in task.examples("val2014")], 80)
    return Collator(task, TextTransform(tokenizer), KeepAspect(64, multiple=16))


def test_batch(collator):
    examples = collator.task.examples("val2014")
    batch = collator([examples[1], examples[7]])
    assert batch["pixel_values"].shape == (
        2,
        3,
        64,
        96,
    )  # 64 x 48 -> 80 x 64, and 96 x 24 -> 96 x 16
    assert batch["pixel_mask"].sum((1, 2)).tolist() == [64 * 80, 96 * 16]
    assert batch["labels"].dtype == torch.float32
    assert batch["labels"].tolist() == [
        [0, 1, 0, 0, 0, 0, 0],
        pytest.approx([0, 0, 0, 0, 0, 0, 0.6]),
    ]
    assert collator.task.decode(batch["labels"]) == ["red", "squares"]


def test_decoding_needs_the_models_labels(collator):
    with pytest.raises(ValueError, match="the model has 3129 outputs, the task 7 labels"):
        collator.task.decode(torch.zeros(1, 3129))


def test_batch_without_targets_and_with_bad_samples(collator):
    example = Example(id=5, text="Is it?", images=(b"nothing",), target=None, cluster=1)
    with pytest.raises(BrokenImageError, match="the image of example 5"):
        collator([example])
    picture = collator.task.examples("val2014")[0].images
    assert "labels" not in collator([Example(5, "Is it?", picture, None, 1)])
    with pytest.raises(ValueError, match=r"no text.* 5"):
        collator([Example(5, "", picture, None, 1)])


def test_batch_of_two_images_an_example(collator):
    class Pairs(VQAv2):
        image_count = 2

    first, second = (collator.task.examples("val2014")[i].images[0] for i in (0, 7))
    example = Example(1, "are they?", (first, second), {0: 1.0}, 1)
    batch = Collator(Pairs(FIXTURE, LABELS), collator.text, collator.image)([example] * 3)
    assert batch["pixel_values"].shape == (3, 2, 3, 64, 96)
    assert batch["pixel_mask"].shape == (3, 2, 64, 96)


def test_tasks_by_name():
    assert tasks.get("nlvr") is tasks.NLVR
    assert {"nlvr", "vqav2"} <= set(tasks.list_tasks())
    with pytest.raises(ValueError, match=r"no task is named 'vqa'.* There are nlvr,"):
        tasks.get("vqa")
