"""Write generated images and questions as a VQAv2 data set in the official files."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from pumer._files import check_name, locked, new_folder
from pumer.lab.scenes.backgrounds import photographs
from pumer.lab.scenes.drawing import OBJECTS, Scenes, check_style, draw_scenes
from pumer.lab.scenes.questions import SceneQuestion, ask

_BATCH = 256
_ANSWER_TYPES = {"yes": "yes/no", "no": "yes/no"}


def write_vqav2(
    out: str | os.PathLike[str],
    seed: int,
    pictures: int,
    per_picture: int,
    split: str = "val2014",
    image_size: int = 96,
    progress: bool = True,
    objects: tuple[int, int] = OBJECTS,
    shape_scale: float | None = None,
    backgrounds: str | None = None,
) -> Path:
    """Write images 0 .. `pictures` - 1 of `seed` to the folder `out` in VQAv2's official files;
    returns it.

    `out` is new, or holds other splits written by this function.

    `v2_OpenEnded_mscoco_{split}_questions.json`, `v2_mscoco_{split}_annotations.json` and the
    images `{split}/COCO_{split}_%012d.png`, PNG instead of COCO's JPEG. Image number i is image
    i, its question j is i * 1000 + j, and all ten annotators agree. `out` appears only when
    everything is written. `progress` shows a bar if stderr is a terminal. `objects`, `shape_scale`
    and `backgrounds` as in the task `Scenes`; photographs are those of the split that the name
    begins with. Raises ValueError when `out` exists and is not empty, or for more than 1000
    questions an image.
    """
    if pictures < 1 or not 1 <= per_picture <= 1000:
        raise ValueError(
            f"pictures={pictures}, per_picture={per_picture}: ask for at least one image and 1 "
            "to 1000 questions an image (VQAv2's question ids leave room for no more)."
        )
    check_name(split, "split")
    check_style(image_size, objects, shape_scale)
    behind: tuple[Tensor, ...] = ()
    if backgrounds is not None:
        named = next((name for name in ("train", "val", "test") if split.startswith(name)), None)
        if named is None:
            raise ValueError(
                f"split {split!r}: with backgrounds its name begins with train, val or test, which "
                "have photographs of their own"
            )
        behind = photographs(backgrounds, named, image_size)
    draw = partial(
        draw_scenes,
        seed,
        image_size=image_size,
        objects=objects,
        shape_scale=shape_scale,
        photographs=behind,
    )
    folder = Path(out)
    if not any(folder.glob("v2_OpenEnded_mscoco_*_questions.json")):
        with new_folder(folder) as new:
            _write(new, draw, seed, pictures, per_picture, split, progress)
        return folder
    questions = f"v2_OpenEnded_mscoco_{split}_questions.json"
    names = (split, f"v2_mscoco_{split}_annotations.json", questions)
    staged = folder / f".{split}.new"
    with locked(folder, wait=0.0):
        if (staged / questions).exists():  # a kill came between the last steps of an earlier run
            shutil.rmtree(folder / split, ignore_errors=True)
            (folder / names[1]).unlink(missing_ok=True)
        if existing := [name for name in names if (folder / name).exists()]:
            raise ValueError(
                f"{folder} has {', '.join(existing)} already: give another --split, or delete "
                "them first"
            )
        with new_folder(staged, replace=True) as new:
            _write(new, draw, seed, pictures, per_picture, split, progress)
        for name in names:  # the questions last: with them the split is there
            (staged / name).rename(folder / name)
        staged.rmdir()
    return folder


def batches(numbers: range, what: str, progress: bool) -> Iterable[range]:
    """The numbers in batches; `progress` shows a bar if stderr is a terminal."""
    parts = [numbers[start : start + _BATCH] for start in range(0, len(numbers), _BATCH)]
    return track(
        parts, what, console=Console(stderr=True), disable=not (progress and sys.stderr.isatty())
    )


def save(image: Tensor, path: Path) -> None:
    """Write an image, uint8 [3, S, S], as PNG, which unlike JPEG is lossless."""
    # The noise hardly compresses, so that higher levels cost time and save nothing.
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path, compress_level=1)


def _write(
    folder: Path,
    draw: Callable[[Sequence[int]], Scenes],
    seed: int,
    pictures: int,
    per_picture: int,
    split: str,
    progress: bool,
) -> None:
    questions, annotations = [], []
    (folder / split).mkdir()
    for index in batches(range(pictures), split, progress):
        scenes = draw(index)
        for image_id, image in zip(index, scenes.images, strict=True):
            save(image, folder / split / f"COCO_{split}_{image_id:012d}.png")
        for position, question in enumerate(ask(scenes, seed, index, per_picture=per_picture)):
            image_id = index[question.image_index]
            ids = {"image_id": image_id, "question_id": image_id * 1000 + position % per_picture}
            questions.append({**ids, "question": question.question})
            annotations.append({**ids, **_annotation(question)})
    head = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": split}
    for name, content in (
        (
            f"v2_OpenEnded_mscoco_{split}_questions.json",
            {"task_type": "Open-Ended", "questions": questions},
        ),
        (f"v2_mscoco_{split}_annotations.json", {"annotations": annotations}),
    ):
        (folder / name).write_text(json.dumps({**head, **content}))


def _annotation(question: SceneQuestion) -> dict[str, object]:
    """A question's entry in the annotations file, without its ids."""
    answer = question.answer
    answer_type = "number" if answer.isdigit() else _ANSWER_TYPES.get(answer, "other")
    answer_row = {"answer": answer, "answer_confidence": "yes"}
    return {
        "question_type": " ".join(question.question.split()[:2]),
        "answer_type": answer_type,
        "multiple_choice_answer": answer,
        "answers": [{**answer_row, "answer_id": i} for i in range(1, 11)],
    }
