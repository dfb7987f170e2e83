"""The built-in pictures and questions: the same everywhere, answerable, balanced; and their
files."""

import dataclasses
import itertools
import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from pumer.cli import main
from pumer.lab import tasks
from pumer.lab.data.images import open_image
from pumer.lab.scenes import drawing as scenes
from pumer.lab.scenes import files as scene_files
from pumer.lab.scenes.drawing import (
    COLOURS,
    SHAPES,
    SIZES,
    draw_scenes,
    patch_offsets,
    patch_pixels,
    patch_targets,
)
from pumer.lab.scenes.files import write_vqav2
from pumer.lab.scenes.questions import ANSWERS, KINDS, ask, referent_targets

PICTURES = 400
PER_PICTURE = 12


@pytest.fixture(scope="module")
def batch():
    return draw_scenes(7, range(PICTURES))


@pytest.fixture(scope="module")
def questions(batch):
    return ask(batch, 7, range(PICTURES), per_picture=PER_PICTURE)


def rows(batch, picked):
    return [getattr(batch, field.name)[picked] for field in dataclasses.fields(batch)]


def objects(batch, picture):
    """The object table of one picture as a list of dicts, most plainly."""
    return [
        {
            "k": k,
            "words": {
                COLOURS[batch.colour[picture, k]],
                SHAPES[batch.shape[picture, k]],
                SIZES[batch.size[picture, k]],
            },
            "colour": COLOURS[batch.colour[picture, k]],
            "shape": SHAPES[batch.shape[picture, k]],
            "size": SIZES[batch.size[picture, k]],
            "x": int(batch.x[picture, k]),
            "y": int(batch.y[picture, k]),
        }
        for k in range(10)
        if batch.present[picture, k]
    ]


# Pictures


def test_a_picture_does_not_depend_on_its_batch(batch):
    picked = [399, 3, 64, 31, 32, 3]
    for one, other in zip(
        rows(draw_scenes(7, picked), slice(None)), rows(batch, picked), strict=True
    ):
        assert torch.equal(one, other)
    assert not torch.equal(draw_scenes(8, [3]).images, batch.images[3:4])


def test_a_picture_stays_the_same_for_ever():
    one = draw_scenes(-5, [2**40])
    assert one.present.sum() == 8
    assert one.x.tolist() == [[38, 60, 29, 71, 41, 12, 78, 66, 44, 36]]
    assert one.colour.tolist() == [[2, 3, 7, 4, 4, 1, 7, 7, 2, 1]]


@pytest.mark.gpu
def test_a_picture_is_the_same_on_a_gpu(batch):
    on_gpu = draw_scenes(7, range(PICTURES), device="cuda")
    for one, other in zip(rows(on_gpu, slice(None)), rows(batch, slice(None)), strict=True):
        assert torch.equal(one.cpu(), other)
    asked = [ask(on_gpu, 7, range(PICTURES)), ask(batch, 7, range(PICTURES))]
    assert asked[0] == asked[1]
    assert torch.equal(
        referent_targets(on_gpu, asked[0], 16).cpu(), referent_targets(batch, asked[1], 16)
    )


def test_shapes_and_types(batch):
    small = draw_scenes(0, torch.tensor([4, 5]), image_size=64)
    assert small.images.shape == (2, 3, 64, 64)
    assert small.images.dtype == torch.uint8
    assert small.owner.shape == (2, 64, 64)
    assert batch.present.sum(1).max() == 10
    assert batch.present.sum(1).min() in (3, 4)  # four, less one hidden
    with pytest.raises(ValueError, match="at least 32"):
        draw_scenes(0, [0], image_size=16)


def test_objects_are_in_the_picture_and_visible(monkeypatch):
    lay, laid = scenes._lay, []

    def spy(stamp_BK, *rest):
        laid.append(stamp_BK)
        return lay(stamp_BK, *rest)

    monkeypatch.setattr(scenes, "_lay", spy)
    visible = []
    for picture in range(150):
        laid.clear()
        one = draw_scenes(1, [picture])
        area = scenes._atlas(1.0, one.images.device)[1][laid[0][0]]
        for k in range(10):
            seen = (one.owner[0] == k).sum() / area[k]
            if one.present[0, k]:
                visible.append(float(seen))
                assert 6 <= one.x[0, k] < 90
                assert 6 <= one.y[0, k] < 90
            else:
                assert seen == 0
    assert min(visible) >= 0.5
    assert np.mean(np.array(visible) < 0.6) < 0.02
    assert np.mean(np.array(visible) < 0.99) > 0.2, "objects should overlap"


CROWD = {"image_size": 192, "objects": (20, 40), "shape_scale": 1.0}


def test_a_crowd_of_shapes_as_large_as_in_small_pictures():
    crowd = draw_scenes(3, range(24), **CROWD)
    assert crowd.present.shape == (24, 40)
    assert 15 <= crowd.present.sum(1).min() <= crowd.present.sum(1).max() <= 40
    assert crowd.present.sum(1).float().mean() > 25
    for picture in range(4):
        owner = crowd.owner[picture]
        for k in crowd.present[picture].nonzero()[:, 0].tolist():
            rows, columns = (owner == k).nonzero(as_tuple=True)
            assert rows.max() - rows.min() < 40  # pixels, at most 2 x 1.25 x 14
            assert abs(float(columns.float().mean()) - float(crowd.x[picture, k])) < 12
    alone = draw_scenes(3, [5], **CROWD)
    assert torch.equal(alone.images[0], crowd.images[5])


@pytest.mark.parametrize("objects", [(20, 40), (64, 64)])
def test_questions_about_a_crowd_are_as_true_as_others(objects):
    style = {"image_size": 384, "objects": objects, "shape_scale": 0.8}
    crowd = draw_scenes(5, range(30), **style)
    asked = ask(crowd, 5, range(30), per_picture=8)
    assert len(asked) == 240
    answers = {"yes": 0, "no": 0}
    for question in asked:
        if question.kind != "existence":
            continue
        answers[question.answer] += 1
        row = question.image_index
        named = question.question.rstrip("?").split()
        fits = [
            k
            for k in range(objects[1])
            if crowd.present[row, k]
            and all(
                word not in (*scenes.COLOURS, *scenes.SHAPES)
                or word
                in (scenes.COLOURS[crowd.colour[row, k]], scenes.SHAPES[crowd.shape[row, k]])
                for word in named
            )
        ]
        assert (question.answer == "yes") == bool(fits), question
    assert min(answers.values()) > 5


@pytest.mark.parametrize(
    ("style", "problem"),
    [
        ({"objects": (0, 4)}, "1 to 64"),
        ({"objects": (5, 4)}, "1 to 64"),
        ({"objects": (4, 65)}, "1 to 64"),
        ({"shape_scale": 0.0}, "shape_scale 0 "),
        ({"shape_scale": -1.0}, "shape_scale -1 "),
        ({"shape_scale": 3.0}, "fits the image's 96"),
    ],
)
def test_what_fits_no_picture_is_refused(style, problem):
    with pytest.raises(ValueError, match=problem):
        draw_scenes(0, [0], **style)
    with pytest.raises(ValueError, match=problem):
        tasks.build({"name": "scenes"} | style)


@pytest.fixture
def album(tmp_path):
    """Twenty plain photographs, the number of each in its red."""
    folder = tmp_path / "album"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (150, 100 + number), (10 * number, 77, 200)).save(
            folder / f"{number:02}.png"
        )
    return folder


def test_photographs_of_train_and_test_are_others(album):
    seen = {}
    for split in ("train", "val", "test"):
        task = tasks.build({"name": "scenes", "questions": 60, "backgrounds": str(album)})
        reds = set()
        for example in task.examples(split)[:]:
            pixels = np.asarray(example.images[0])
            ground = (abs(pixels[..., 1].astype(int) - 77) < 9) & (pixels[..., 2] > 185)
            assert ground.any()
            reds.add(round(float(np.median(pixels[ground][:, 0])) / 10))
        seen[split] = reds
    assert seen["val"] <= {8, 18}
    assert seen["test"] <= {9, 19}
    assert not seen["train"] & {8, 9, 18, 19}
    assert len(seen["train"]) > 10


def test_a_picture_on_photographs_is_the_same_in_every_batch(album):
    task = tasks.build({"name": "scenes", "questions": 9, "backgrounds": str(album)})
    examples = task.examples("val")
    together = [np.asarray(example.images[0]) for example in examples[:]]
    for number in (0, 4, 8):
        assert np.array_equal(np.asarray(examples[number].images[0]), together[number])


def test_an_album_without_photographs_for_a_split(album):
    for path in list(album.iterdir())[3:]:
        path.unlink()
    task = tasks.build({"name": "scenes", "backgrounds": str(album)})
    with pytest.raises(ValueError, match="has 3 photographs, none of them for test"):
        task.examples("test")
    with pytest.raises(ValueError, match="does not exist"):
        tasks.build({"name": "scenes", "backgrounds": "/no/album"}).examples("train")


@pytest.mark.parametrize("texture", range(4))
def test_colours_are_told_apart_by_their_pixels(batch, texture):
    """The median pixel of an object is nearer to its own colour, at some brightness, than to any
    other."""
    rgb = torch.tensor(scenes._RGB).float()
    unit = torch.nn.functional.normalize(rgb, dim=1)
    right = []
    for picture in range(60):
        for k in range(10):
            if batch.present[picture, k] and batch.texture[picture, k] == texture:
                pixels = batch.images[picture][:, batch.owner[picture] == k].float()
                seen = torch.nn.functional.normalize(pixels.median(1).values, dim=0)
                right.append(int((unit @ seen).argmax()) == int(batch.colour[picture, k]))
    assert len(right) > 50
    assert np.mean(right) > 0.98


@pytest.mark.parametrize("patch_size", [8, 16, 32])
def test_patch_targets_by_loop(batch, patch_size):
    colour, shape = patch_targets(batch, patch_size)
    assert colour.dtype == shape.dtype == torch.int64
    per_side = 96 // patch_size
    for picture in range(6):
        for place in range(per_side**2):
            row, column = divmod(place, per_side)
            owner = batch.owner[
                picture,
                row * patch_size : (row + 1) * patch_size,
                column * patch_size : (column + 1) * patch_size,
            ]
            counts = Counter(int(o) for o in owner.flatten() if o >= 0)
            expected = (0, 0)
            if sum(counts.values()) >= patch_size**2 / 4:
                k = min(counts, key=lambda k: (-counts[k], k))
                expected = (int(batch.colour[picture, k]) + 1, int(batch.shape[picture, k]) + 1)
            assert (int(colour[picture, place]), int(shape[picture, place])) == expected
    with pytest.raises(ValueError, match="does not divide"):
        patch_targets(batch, 36)


# Questions


def matching(table, description):
    """Objects that a description fits: every word but articles and "object" is a trait."""
    words = description.split()
    if words[0] in ("a", "an", "the"):
        words = words[1:]
    last = words[-1]
    words[-1] = {"crosses": "cross"}.get(last, last if last == "cross" else last.removesuffix("s"))
    wanted = set(words) - {"object"}
    assert wanted <= {*COLOURS, *SHAPES, *SIZES}
    return [o for o in table if wanted <= o["words"]]


def only(table, description):
    assert description.startswith("the ")
    fitting = matching(table, description)
    assert len(fitting) == 1, f"{description} is ambiguous"
    return fitting[0]


PATTERNS = {
    "existence": r"(?:is there|can you see) (an? .+?)(?: in the picture)?\?",
    "count": r"(?:how many|what number of) (.+?) (?:are there|are in the picture|is there)\?",
    "colour": r"(?:what color is|what is the color of) (the .+)\?|(the .+) has which color\?",
    "shape": r"(?:what shape is|what is the shape of) (the .+)\?|(the .+) has which shape\?",
    "size": r"is (the .+) (?:small or large|large or small)\?|what size is (the .+)\?",
    "position": (
        r"(?:is|which half is) (the .+?)(?: on the| at the| in,) (left or right|top or bottom)\?"
    ),
    "relation": (
        r"is (the .+?) (?:to the )?(left of|right of|above|below|higher up than|lower down than) "
        r"(the .+)\?"
    ),
}


def derive(table, kind, text):
    """The answer and the referents, worked out from the text of a question and the object table."""
    found = [part for part in re.fullmatch(PATTERNS[kind], text).groups() if part]
    if kind == "existence":
        fitting = matching(table, found[0])
        return "yes" if fitting else "no", {o["k"] for o in fitting}
    if kind == "count":
        fitting = matching(table, found[0])
        return str(len(fitting)), {o["k"] for o in fitting}
    one = only(table, found[0])
    if kind == "position":
        axis, before, after = (
            ("x", "left", "right") if "left" in found[1] else ("y", "top", "bottom")
        )
        assert abs(one[axis] - 47.5) > 0.08 * 96
        return before if one[axis] < 47.5 else after, {one["k"]}
    if kind == "relation":
        other = only(table, found[2])
        axis = "x" if found[1] in ("left of", "right of") else "y"
        before = found[1] in ("left of", "above", "higher up than")
        assert abs(one[axis] - other[axis]) >= 0.1 * 96
        return "yes" if (one[axis] < other[axis]) == before else "no", {one["k"], other["k"]}
    assert one[kind] not in found[0].split(), "the question gives its answer away"
    return one[kind], {one["k"]}


def test_answers_by_brute_force(batch, questions):
    tables = [objects(batch, picture) for picture in range(PICTURES)]
    assert len(questions) == PICTURES * PER_PICTURE
    for place, question in enumerate(questions):
        assert question.image_index == place // PER_PICTURE
        answer, referents = derive(tables[question.image_index], question.kind, question.question)
        assert question.answer == answer, question
        assert set(question.referents) == referents
        assert answer in ANSWERS
        assert question.question == question.question.lower()
        assert len(question.question.split()) <= 14


def test_no_word_is_wasted(batch, questions):
    for question in questions:
        if question.kind in ("position", "relation", "colour", "size"):
            table = objects(batch, question.image_index)
            for adjective, shape in re.findall(
                rf"the (\w+) ({'|'.join(SHAPES)})\b", question.question
            ):
                assert len(matching(table, shape)) > 1, f"{adjective} is not needed: {question}"


def test_questions_do_not_depend_on_the_batch_or_their_number(batch, questions):
    picked = [50, 2]
    few = ask(draw_scenes(7, picked), 7, picked, per_picture=3)
    expected = [questions[i * PER_PICTURE + j] for i in picked for j in range(3)]
    assert [dataclasses.replace(q, image_index=0) for q in few] == [
        dataclasses.replace(q, image_index=0) for q in expected
    ]
    texts = [{q.question for q in questions if q.image_index == picture} for picture in range(20)]
    assert np.mean([len(text) for text in texts]) > PER_PICTURE - 0.2
    with pytest.raises(ValueError, match="pass the index"):
        ask(batch, 7, [1, 2])


def test_answers_are_balanced(questions):
    def share(kind):
        answers = Counter(q.answer for q in questions if q.kind == kind)
        return {answer: count / answers.total() for answer, count in answers.items()}

    kinds = Counter(q.kind for q in questions)
    for kind, weight in KINDS.items():
        assert abs(kinds[kind] / len(questions) - weight) < 0.025
    for kind in ("existence", "relation"):
        assert abs(share(kind)["yes"] - 0.5) < 0.06
    for kind, number in {"colour": 8, "shape": 5, "size": 2, "position": 4}.items():
        shares = share(kind)
        assert len(shares) == number
        assert max(shares.values()) < 1.4 / number
        assert min(shares.values()) > 0.6 / number
    counts = share("count")
    assert set(counts) == set("0123456")
    assert max(counts.values()) < 0.28
    assert min(counts.values()) > 0.02
    assert {q.answer for q in questions} == set(ANSWERS)
    assert list(ANSWERS) == sorted(ANSWERS)


def test_missing_things_are_near_misses(batch, questions):
    for question in questions:
        if (
            question.kind == "existence"
            and question.answer == "no"
            and "object" not in question.question
        ):
            words = set(re.sub(r"\W", " ", question.question).split())
            colours, shapes = words & set(COLOURS), words & set(SHAPES)
            table = objects(batch, question.image_index)
            assert not colours or any(o["colour"] in colours or o["shape"] in shapes for o in table)


def test_referent_targets_by_loop(batch, questions):
    some = questions[:60]
    target = referent_targets(batch, some, 16)
    assert target.dtype == torch.bool
    assert target.shape == (60, 36)
    for question, row in zip(some, target, strict=True):
        owner = (
            batch.owner[question.image_index].view(6, 16, 6, 16).transpose(1, 2).reshape(36, 256)
        )
        expected = [sum((patch == k).sum() for k in question.referents) >= 64 for patch in owner]
        for k in question.referents:
            expected[int((owner == k).sum(1).argmax())] = True
        assert row.tolist() == [bool(e) for e in expected]
    assert not referent_targets(batch, [q for q in some if not q.referents], 16).any()


# Files


def test_official_files(tmp_path):
    out = write_vqav2(
        tmp_path / "deep" / "vqa", seed=3, pictures=5, per_picture=4, split="train2014"
    )
    asked = json.loads((out / "v2_OpenEnded_mscoco_train2014_questions.json").read_text())
    annotated = json.loads((out / "v2_mscoco_train2014_annotations.json").read_text())
    assert asked["task_type"] == "Open-Ended"
    assert asked["data_subtype"] == annotated["data_subtype"] == "train2014"
    batch = draw_scenes(3, range(5))
    expected = ask(batch, 3, range(5), per_picture=4)
    assert len(asked["questions"]) == len(annotated["annotations"]) == len(expected) == 20
    for place, (question, annotation, wanted) in enumerate(
        zip(asked["questions"], annotated["annotations"], expected, strict=True)
    ):
        assert question["question"] == wanted.question
        assert question["image_id"] == annotation["image_id"] == wanted.image_index
        assert (
            question["question_id"]
            == annotation["question_id"]
            == wanted.image_index * 1000 + place % 4
        )
        answers = annotation["answers"]
        assert [a["answer_id"] for a in answers] == list(range(1, 11))
        assert (
            {a["answer"] for a in answers}
            == {wanted.answer}
            == {annotation["multiple_choice_answer"]}
        )
        assert {a["answer_confidence"] for a in answers} == {"yes"}
        assert question["question"].startswith(annotation["question_type"])
        by_answer = {"yes": "yes/no", "no": "yes/no", **{str(n): "number" for n in range(7)}}
        assert annotation["answer_type"] == by_answer.get(wanted.answer, "other")
    for picture in range(5):
        image = np.asarray(Image.open(out / "train2014" / f"COCO_train2014_{picture:012d}.png"))
        assert (image == batch.images[picture].permute(1, 2, 0).numpy()).all()
    assert [p.name for p in out.parent.iterdir()] == ["vqa"], "nothing unfinished stays behind"


def test_a_full_folder_is_refused(tmp_path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(ValueError, match="not an empty folder"):
        write_vqav2(tmp_path, seed=0, pictures=1, per_picture=1)
    assert (tmp_path / "mine").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    assert write_vqav2(tmp_path / "empty", seed=0, pictures=1, per_picture=1).is_dir()
    with pytest.raises(ValueError, match="1 to 1000"):
        write_vqav2(tmp_path / "new", seed=0, pictures=1, per_picture=1001)


def test_a_crowd_on_photographs_in_official_files(tmp_path, album):
    main(
        f"data scenes --out {tmp_path / 'out'} --pictures 3 --split val2014 --image_size 192 "
        f"--objects [20,30] --shape_scale 0.9 --backgrounds {album}".split()
    )
    task = tasks.build({"name": "vqav2", "root": str(tmp_path / "out")})
    examples = task.examples("val2014")
    written = [np.asarray(open_image(examples[number].images[0])) for number in range(12)]
    made = tasks.build(
        {
            "name": "scenes",
            "image_size": 192,
            "objects": (20, 30),
            "shape_scale": 0.9,
            "backgrounds": str(album),
        }
    )
    expected = made.make(2, [0, 1, 2], split="val")
    for number, example in enumerate(expected):
        assert np.array_equal(written[4 * number], np.asarray(example.images[0]))
    assert main(f"data scenes --out {tmp_path / 'new'} --backgrounds {album} --split mine".split())
    assert main(f"data scenes --out {tmp_path / 'new'} --task nlvr2 --objects [20,30]".split())
    assert not (tmp_path / "new").exists()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(scene_files, "ask", fail)
    with pytest.raises(KeyboardInterrupt):
        write_vqav2(tmp_path / "new", seed=0, pictures=1, per_picture=1)
    assert not list(tmp_path.iterdir())


def test_patch_offsets_lead_to_the_middle_of_what_a_patch_shows():
    scenes = draw_scenes(5, range(6))
    offsets, (colour, _) = patch_offsets(scenes, 8), patch_targets(scenes, 8)
    main = patch_pixels(scenes, 8).argmax(-1)
    for b, n in itertools.product(range(6), range(144)):
        k = main[b, n]
        way = (
            [scenes.x[b, k] - (n % 12 * 8 + 4), scenes.y[b, k] - (n // 12 * 8 + 4)]
            if colour[b, n]
            else [0, 0]
        )
        assert offsets[b, n].tolist() == way


def test_the_command_says_what_it_wrote_and_adds_a_split(tmp_path, capsys):
    out = tmp_path / "vqa"
    command = [
        "data",
        "scenes",
        "--out",
        str(out),
        "--pictures",
        "3",
        "--per_picture",
        "2",
        "--image_size",
        "32",
    ]
    assert main([*command, "--split", "train2014"]) == 0
    assert f"3 images with 6 questions, train2014, in {out}" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert main([*command, "--split", "val2014", "--seed", "3"]) == 0
    assert f"--task vqav2 --task.root {out} --split val2014" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(path.name for path in out.iterdir()) == sorted(
        name
        for split in ("train2014", "val2014")
        for name in (
            split,
            f"v2_OpenEnded_mscoco_{split}_questions.json",
            f"v2_mscoco_{split}_annotations.json",
        )
    )
    assert main([*command, "--split", "val2014"]) == 2
    assert "already: give another --split" in capsys.readouterr().err
