"""Write easy-VQA in VQAv2's official files.

    pip install easy-vqa
    python examples/easy_vqa_files.py OUT

easy-VQA (github.com/vzhou842/easy-VQA, MIT) has 4,000 generated images of one shape each, with
38,575 questions, to train on. Every fifth of these images, with all of its questions, becomes the
split `val`, the others `train`, so that no image is in both. The package's own test images become
`test`, only if `--test` asks for them.

To train on questions of your own, write these files from what you have: `write_split` shows what
has to be in them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

ANNOTATORS = 10  # VQAv2 asks ten people; who has one answer repeats it
HELD_OUT = 5  # every fifth image is for validation

Row = tuple[str, str, int]
"""Question, answer and the id of the image."""


def write_split(out: Path, split: str, rows: Iterable[Row], images: Mapping[int, str]) -> str:
    """Write questions, annotations and images of a split; returns how many there are."""
    folder = out / split
    folder.mkdir(parents=True)
    questions, annotations, num_asked = [], [], dict[int, int]()
    for question, answer, image_id in rows:
        position = num_asked[image_id] = num_asked.get(image_id, -1) + 1
        if position == 0:
            path = Path(images[image_id])
            shutil.copyfile(path, folder / f"COCO_{split}_{image_id:012d}{path.suffix}")
        ids = {"question_id": image_id * 1000 + position, "image_id": image_id}
        questions.append({**ids, "question": question})
        given = {"answer": answer, "answer_confidence": "yes"}
        annotations.append(
            {
                **ids,
                "question_type": " ".join(question.split()[:2]),
                "answer_type": "yes/no" if answer in ("yes", "no") else "other",
                "multiple_choice_answer": answer,
                "answers": [{**given, "answer_id": i + 1} for i in range(ANNOTATORS)],
            }
        )
    for name, content in (
        (f"v2_mscoco_{split}_annotations.json", {"annotations": annotations}),
        (f"v2_OpenEnded_mscoco_{split}_questions.json", {"questions": questions}),
    ):
        (out / name).write_text(json.dumps(content), encoding="utf-8")
    return f"{split}: {len(num_asked):,} images, {len(questions):,} questions"


def is_held_out(image_id: int) -> bool:
    return image_id % HELD_OUT == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="Write easy-VQA in VQAv2's official files.")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist yet")
    parser.add_argument("--test", action="store_true", help="write the package's test split, too")
    arguments = parser.parse_args()
    try:
        import easy_vqa
    except ImportError:
        parser.error("easy-VQA is not installed: pip install easy-vqa")
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists: give another folder, or delete it first")

    rows = list(zip(*easy_vqa.get_train_questions(), strict=True))
    images = easy_vqa.get_train_image_paths()
    for split in ("train", "val"):
        of_split = [row for row in rows if is_held_out(row[2]) == (split == "val")]
        print(write_split(arguments.out, split, of_split, images))
    if arguments.test:
        rows = list(zip(*easy_vqa.get_test_questions(), strict=True))
        print(write_split(arguments.out, "test", rows, easy_vqa.get_test_image_paths()))


if __name__ == "__main__":
    main()
