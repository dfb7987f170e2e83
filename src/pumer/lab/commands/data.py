"""Check data sets, generate scenes, and train tokenizers."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.table import Table

from pumer._files import check_space, replacing
from pumer._options import Count, OutputFile, OutputFolder
from pumer._terminal import console, visible
from pumer.lab.tasks.base import count_of
from pumer.lab.tasks.check import SplitCheck, check_files


def check(
    task: str,
    root: str,
    images: str | None = None,
    decode: bool = False,
    missing: OutputFile | None = None,
) -> None:
    """Count a task's official files and images against the published numbers.

    Exits with 1 if anything of an existing split is missing or wrong, or if no split exists.

    Args:
        task: vqav2, nlvr2, snli-ve or retrieval.
        root: folder of the official files.
        images: folder, LMDB file or Parquet files of the images; below `root` if not given.
        decode: open every image, which takes minutes, and list those that cannot be decoded.
        missing: file to write with the names of all images that are missing or cannot be decoded,
            one per line.
    """

    screen = console()
    checks = check_files(task, root, images, decode, show_progress=True)
    screen.print(_table(checks, f"{task} in {root}", decode))
    for split in checks:
        notes = [split.problem] if split.problem else []
        if split.missing:
            lost = count_of(split.missing, split.counts["images"], "images")
            notes.append(f"{lost} are not in {split.store}")
        for note in notes + list(split.broken.values())[:5]:
            screen.print(f"{split.name}: {note}", style="yellow", markup=False, soft_wrap=True)
    if missing:
        with replacing(missing) as file:
            file.writelines(
                f"{key}\n"
                for key in dict.fromkeys(key for c in checks for key in (*c.missing, *c.broken))
            )
    problems = _problems(checks, task, root)
    if problems:
        print(
            visible(f"pumer data check: {'; '.join(problems)}; the reasons stand above."),
            file=sys.stderr,
        )
        raise SystemExit(1)


def _table(checks: Sequence[SplitCheck], title: str, decode: bool) -> Table:
    """Found and published numbers of every split."""
    table = Table(title=title)
    for column in (
        "split",
        "found",
        "published",
        "images missing",
        *(["undecodable"] if decode else []),
    ):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split in checks:
        names = split.counts or split.published
        counts = [
            f"{split.counts[name]:,} {name}" if split.counts else f"no {name}" for name in names
        ]
        published = [
            f"{split.published[name]:,}" if name in split.published else "?" for name in names
        ]
        images_wrong = [
            f"{len(keys):,}" if split.counts else "-" for keys in (split.missing, split.broken)
        ]
        cells = ["\n".join(counts), "\n".join(published), *images_wrong]
        table.add_row(split.name, *cells[: len(table.columns) - 1])
    return table


def _problems(checks: Sequence[SplitCheck], task: str, root: str) -> list[str]:
    """Why a task's files cannot be used as they are."""
    problems = []
    unreadable = [split.name for split in checks if split.problem and not split.absent]
    if unreadable:
        problems.append(f"the files of {', '.join(unreadable)} cannot be read")
    lacking = [split.name for split in checks if split.missing or split.broken]
    if lacking:
        problems.append(f"images of {', '.join(lacking)} are missing or broken")
    if all(split.absent for split in checks):
        problems.append(f"no split of {task} is in {root}")
    return problems


def scenes(
    out: OutputFolder,
    task: Literal["vqav2", "nlvr2", "snli-ve", "retrieval"] = "vqav2",
    split: str = "val2014",
    pictures: Count = 1000,
    per_picture: Count = 4,
    splits: dict[str, int] | None = None,
    dataset: Literal["flickr30k", "coco"] = "flickr30k",
    seed: int = 2,
    image_size: Count = 96,
    objects: tuple[int, int] | None = None,
    shape_scale: float | None = None,
    backgrounds: str | None = None,
) -> None:
    """Write generated images with questions, sentences or captions in a task's official format.

    Args:
        out: folder to write; new or empty, or for vqav2 one with other generated splits.
        task: whose format.
        split: vqav2: name of the split in file names.
        pictures: number of images; for other tasks than vqav2 that of the first split, the others
            get a tenth of it.
        per_picture: vqav2: questions per image.
        splits: other tasks than vqav2: number of images of each split, instead of all official
            ones.
        dataset: retrieval: whose format.
        seed: the shipped models were trained with 1; any other gives unseen images.
        image_size: side in pixels.
        objects: vqav2: least and most objects in an image, up to 64; 4 to 10 if not given.
        shape_scale: vqav2: size of the shapes, 1 for those of 96-pixel images; they grow with the
            image if not given.
        backgrounds: vqav2: folder, LMDB file or Parquet file of photographs to draw on.
    """
    from pumer.lab.scenes import set_files as scene_set_files
    from pumer.lab.scenes.drawing import OBJECTS
    from pumer.lab.scenes.files import write_vqav2

    check_space(out, 3 * image_size**2 * (sum(splits.values()) if splits else pictures))
    if task == "vqav2":
        write_vqav2(
            out,
            seed=seed,
            pictures=pictures,
            per_picture=per_picture,
            split=split,
            image_size=image_size,
            objects=objects or OBJECTS,
            shape_scale=shape_scale,
            backgrounds=backgrounds,
        )
        print(f"{pictures:,} images with {pictures * per_picture:,} questions, {split}, in {out}")
        print(_next(task, out, split))
        return
    if objects or shape_scale or backgrounds:
        raise ValueError(
            f"objects, shape_scale and backgrounds are for --task vqav2: sentences of {task} are "
            "about few objects"
        )
    names = scene_set_files.SPLITS[dataset if task == "retrieval" else task]
    counts = splits or {
        name: pictures if name == names[0] else max(1, pictures // 10) for name in names
    }
    if task == "nlvr2":
        scene_set_files.write_nlvr2(out, seed, counts, image_size)
    elif task == "snli-ve":
        scene_set_files.write_snli_ve(out, seed, counts, image_size)
    else:
        scene_set_files.write_karpathy(out, seed, counts, dataset, image_size)
    splits_written = ", ".join(f"{name} {count:,}" for name, count in counts.items())
    print(f"{task} in {out}, images by split: {splits_written}")
    print(_next(task, out, names[0]))


def _next(task: str, out: str, split: str) -> str:
    return (
        f"pumer data check {task} {out}\npumer eval --model FOLDER --task {task} --task.root "
        f"{out} --split {split}"
    )


def tokenizer(
    out: OutputFolder,
    questions: Count = 20000,
    sentences: list[str] | None = None,
    vocab_size: Count = 800,
) -> None:
    """Train a lower-case WordPiece tokenizer on scene questions and your own sentences.

    Args:
        out: folder to write.
        questions: number of scene questions to learn from.
        sentences: Parquet files with a column `sentence` or `caption` to learn from as well.
        vocab_size: largest number of tokens.
    """
    from pumer.lab.data.parquet import read_texts
    from pumer.lab.data.text import train_tokenizer
    from pumer.lab.scenes.tasks import Scenes

    extra_texts = [text for path in sentences or [] for text in read_texts(Path(path))]
    asked = Scenes(questions=questions, per_picture=4, image_size=32).examples("train")
    texts = [example.text for example in asked[:]] + extra_texts
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(texts, vocab_size).save_pretrained(folder)
        for written in Path(
            folder
        ).iterdir():  # each whole, beside the files of a model that may be there
            with replacing(Path(out, written.name), "wb") as file:
                file.write(written.read_bytes())
