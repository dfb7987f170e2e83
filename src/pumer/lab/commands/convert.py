"""`pumer convert`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from rich import box
from rich.table import Table

import pumer
from pumer._files import check_space, new_folder
from pumer._options import Count, NewFolder
from pumer._suggest import some
from pumer._terminal import console
from pumer.hub import Official, load, read_official, save, save_official
from pumer.lab.data.images import KeepAspect, Square
from pumer.lab.data.transforms import Crop, Transform, clip_square, save_transform
from pumer.models.sizes import longest_text, text_of, vision_of

_OURS = "pumer.save"
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


def convert(
    source: str,
    out: NewFolder,
    to: Literal["pumer", "published"] = "pumer",
    image_size: Count | None = None,
    answers: str | None = None,
    kind: str | None = None,
) -> None:
    """Convert a published checkpoint into a model folder, with its tokenizer and image transform,
    or a model folder back.

    Args:
        source: folder of a PuMer checkpoint or of transformers' ViLT or BridgeTower, or an original
            ViLT or METER .ckpt file; or a model folder, to convert back.
        out: folder to write; must not exist or be empty.
        to: "pumer" for the other commands and `pumer.load`; "published" for PuMer's own code.
        image_size: side of the images in pixels, if it is to change.
        answers: file with the answers of question answering (vqa2_label2ans.json,
            vqa2_ans2label.json or vqa_dict.json), if none is beside the weights.
        kind: model class to give a new head, to start its training from a pretrained checkpoint.
    """
    with new_folder(out) as folder:
        read = _read(Path(source), image_size, answers, kind)
        check_space(out, 4 * sum(weight.numel() for weight in read.model.parameters()))
        (save if to == "pumer" else save_official)(read.model, folder)
        tokenizer = _copy(Path(source), _TOKENIZER, folder)
        copied = image_size is None and _copy(Path(source), _PROCESSOR, folder)
        if not copied and read.origin != _OURS:
            save_transform(_transform(read, image_size), folder)
    console().print(_table(read, tokenizer, image_size))


def _read(
    source: Path, image_size: int | None, answers: str | None, class_name: str | None
) -> Official:
    if not (source / "pumer.json").is_file():
        return read_official(source, image_size, answers=answers, kind=class_name)
    if image_size or answers or class_name:
        raise ValueError(
            f"{source} is a model folder already: image_size, answers and kind are for checkpoints"
        )
    return Official(load(source), _OURS, answers=True)


def _copy(source: Path, names: tuple[str, ...], folder: Path) -> list[str]:
    """Copy further files from the source's folder, but not those beside a single checkpoint
    file."""
    present = [name for name in names if source.is_dir() and (source / name).is_file()]
    for name in present:
        shutil.copyfile(source / name, folder / name)
    return present


def _transform(read: Official, image_size: int | None) -> Transform:
    """The image transform of the checkpoint's authors."""
    config = read.model.config
    size, patch_size = image_size or vision_of(config).image_size, vision_of(config).patch_size
    if config.model_type == "bridgetower":
        return Crop(size)
    if config.model_type == "meter":
        return Crop(size) if read.origin == "original" else clip_square(size)
    return Square(size) if read.origin == "pumer" else KeepAspect(size, multiple=patch_size)


def _table(read: Official, tokenizer: list[str], image_size: int | None) -> Table:
    model, patch = read.model, pumer.active(read.model)
    config = model.config
    vision, words = vision_of(config), text_of(config)
    usual = "bert-base-uncased" if config.model_type == "vilt" else "roberta-base"
    rows: dict[str, Any] = {
        "checkpoint": read.origin,
        "class": type(model).__name__,
        "weights": f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.2f} M",
        "images": f"{image_size or vision.image_size} px, patches of {vision.patch_size} px",
        "texts": (f"up to {longest_text(config)} tokens, {words.vocab_size} different ones"),
        "reduction": "none" if patch is None else str(patch.reducer),
        "tokenizer": ", ".join(tokenizer) or f"none: save that of {usual} into the folder",
        "new weights": some(sorted(read.new)),
        "left out": some(sorted(read.left_out)),
        "unknown settings": some(sorted(read.unknown)),
    }
    if type(model).__name__.endswith("ForQuestionAnswering"):
        rows["answers"] = (
            f"{config.num_labels}{'' if read.answers else ' without names: give --answers'}"
        )
    table = Table(show_header=False, box=box.SIMPLE)
    for name, what in rows.items():
        if what:
            table.add_row(name, what)
    return table
