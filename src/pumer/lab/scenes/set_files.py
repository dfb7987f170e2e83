"""Generated images as data sets on disk in the official files of NLVR2, SNLI-VE and Karpathy's
retrieval splits.

Every writer takes the number of images per split and writes all splits, which share no image.
Splits use consecutive indices of the seed, so another size of the first split moves the others.
`out` appears only when everything is written. `progress` shows a bar if stderr is a terminal.
Images are PNG, whatever the official format. All writers return `out` and raise ValueError when it
exists and is not empty, for unknown splits and for splits without images.
"""

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pumer._files import new_folder
from pumer.lab.scenes.captions import describe
from pumer.lab.scenes.drawing import Scenes, draw_scenes
from pumer.lab.scenes.files import batches, save
from pumer.lab.scenes.hypotheses import LABELS, SceneHypothesis, suppose
from pumer.lab.scenes.sets import SceneSet, draw_sets
from pumer.lab.scenes.statements import PAIRS, SceneStatement, state
from pumer.lab.scenes.views import SceneView, dice_of, views

SPLITS = {
    "nlvr2": ("train", "dev", "test1", "test2"),
    "snli-ve": ("train", "dev", "test"),
    "flickr30k": ("train", "val", "test"),
    "coco": ("train", "restval", "val", "test"),
}
_PER_DIRECTORY = 100  # sets of NLVR2's training images
_SIX = 16  # one image in so many has six captions in COCO's flavour, as in COCO


def write_nlvr2(
    out: str | os.PathLike[str],
    seed: int,
    splits: Mapping[str, int],
    image_size: int = 96,
    progress: bool = True,
) -> Path:
    """Write `{split}.json`, JSON objects by line, and `images/train/<directory>/`, `dev/`,
    `test1/`, `test2/`.

    Four images make a set, with four pairs and one sentence; incomplete sets are filled up.
    """
    with new_folder(out) as folder:
        for split, sets in _numbers("nlvr2", splits, 4):
            lines: list[dict[str, Any]] = []
            for numbers in batches(sets, split, progress):
                scenes, said = draw_sets(seed, numbers, 4, state, image_size=image_size)
                for set_index in numbers:
                    lines += _nlvr2_set(folder, split, set_index, seed, scenes, said[set_index])
            _write_lines(folder / f"{split}.json", lines)
    return Path(out)


def _nlvr2_set(
    folder: Path,
    split: str,
    set_index: int,
    seed: int,
    scenes: Scenes,
    scene_set: SceneSet[SceneStatement],
) -> Iterator[dict[str, Any]]:
    directory = set_index // _PER_DIRECTORY
    image_folder = (
        folder / "images" / "train" / str(directory) if split == "train" else folder / split
    )
    image_folder.mkdir(parents=True, exist_ok=True)
    for pair, (sides, label) in enumerate(zip(PAIRS, scene_set.said.labels, strict=True)):
        for side, image_index in enumerate(sides):
            save(
                scenes.images[scene_set.rows[image_index]],
                image_folder / f"{split}-{set_index}-{pair}-img{side}.png",
            )
        left_url, right_url = (f"scenes:{seed}/{set_index}/{image_index}" for image_index in sides)
        extra = (
            {"directory": directory}
            if split == "train"
            else {"extra_validations": {"1": str(label)}}
        )
        yield {
            "identifier": f"{split}-{set_index}-{pair}-0",
            "sentence": scene_set.said.sentence,
            "label": str(label),
            "left_url": left_url,
            "right_url": right_url,
            "writer": "0",
            "validation": {"0": str(label)},
            "synset": scene_set.said.kind,
            "query": f"{scene_set.said.kind}{set_index}",
            **extra,
        }


def write_snli_ve(
    out: str | os.PathLike[str],
    seed: int,
    splits: Mapping[str, int],
    image_size: int = 96,
    progress: bool = True,
) -> Path:
    """Write `snli_ve_{split}.jsonl` and `flickr30k_images/`.

    Three images make a set; incomplete sets are filled up: three hypotheses for each, of all three
    labels.
    """
    with new_folder(out) as folder:
        (folder / "flickr30k_images").mkdir()
        for split, sets in _numbers("snli-ve", splits, 3):
            lines: list[dict[str, Any]] = []
            for numbers in batches(sets, split, progress):
                scenes, said = draw_sets(seed, numbers, 3, suppose, image_size=image_size)
                scene_views = views(scenes)
                for set_index in numbers:
                    for position, row in enumerate(said[set_index].rows):
                        image_id = 3 * set_index + position
                        save(scenes.images[row], folder / "flickr30k_images" / f"{image_id}.png")
                        lines += _snli_ve_lines(
                            image_id, position, scene_views[row], seed, said[set_index].said
                        )
            _write_lines(folder / f"snli_ve_{split}.jsonl", lines)
    return Path(out)


def _snli_ve_lines(
    image_id: int,
    position: int,
    view: SceneView,
    seed: int,
    hypotheses: tuple[SceneHypothesis, ...],
) -> Iterator[dict[str, Any]]:
    caption = describe(view, dice_of(seed, image_id), 1)[0].text
    for hypothesis in hypotheses:
        label = LABELS[hypothesis.labels[position]]
        line: dict[str, Any] = {
            "Flickr30K_ID": str(image_id),
            "annotator_labels": [label],
            "captionID": f"{image_id}.jpg#0",
            "gold_label": label,
            "pairID": f"{image_id}.jpg#0r1{label[0]}",
        }
        for name, text in (("sentence1", caption), ("sentence2", hypothesis.sentence)):
            line |= {
                name: text,
                f"{name}_binary_parse": f"( {text} )",
                f"{name}_parse": f"(ROOT {text})",
            }
        yield dict(sorted(line.items()))


def write_karpathy(
    out: str | os.PathLike[str],
    seed: int,
    splits: Mapping[str, int],
    dataset: Literal["flickr30k", "coco"] = "flickr30k",
    image_size: int = 96,
    progress: bool = True,
) -> Path:
    """Write `dataset_flickr30k.json` with `flickr30k_images/`, or `dataset_coco.json` with
    `train2014/`, `val2014/`.

    Five captions an image; in COCO's flavour some have six.
    """
    images: list[dict[str, Any]] = []
    with new_folder(out) as folder:
        for split, image_indices in _numbers(dataset, splits, 1):
            for numbers in batches(image_indices, split, progress):
                scenes = draw_scenes(seed, numbers, image_size=image_size)
                for image_id, image, view in zip(
                    numbers, scenes.images, views(scenes), strict=True
                ):
                    many = 6 if dataset == "coco" and image_id % _SIX == 0 else 5
                    captions = [
                        caption.text for caption in describe(view, dice_of(seed, image_id), many)
                    ]
                    first = images[-1]["sentids"][-1] + 1 if images else 0
                    images.append(_karpathy_image(image_id, split, dataset, captions, first))
                    path = (
                        folder
                        / images[-1].get("filepath", "flickr30k_images")
                        / images[-1]["filename"]
                    )
                    path.parent.mkdir(exist_ok=True)
                    save(image, path)
        (folder / f"dataset_{dataset}.json").write_text(
            json.dumps({"dataset": dataset, "images": images})
        )
    return Path(out)


def _karpathy_image(
    image_id: int, split: str, dataset: str, captions: list[str], first: int
) -> dict[str, Any]:
    """The entry of an image whose captions are numbered from `first`."""
    entry: dict[str, Any] = {
        "split": split,
        "imgid": image_id,
        "filename": f"{image_id}.png",
        "sentids": list(range(first, first + len(captions))),
        "sentences": [
            {"tokens": re.findall(r"\w+", text), "raw": text, "imgid": image_id, "sentid": sentid}
            for sentid, text in enumerate(captions, first)
        ],
    }
    if dataset == "coco":
        folder = "train2014" if split == "train" else "val2014"
        entry |= {
            "filepath": folder,
            "cocoid": image_id,
            "filename": f"COCO_{folder}_{image_id:012d}.png",
        }
    return entry


def _numbers(dataset: str, splits: Mapping[str, int], size: int) -> list[tuple[str, range]]:
    """For each split the numbers of its sets of `size` images."""
    unknown = [split for split in splits if split not in SPLITS[dataset]]
    if unknown or not splits or min(splits.values()) < 1:
        raise ValueError(
            f"the splits {dict(splits)} do not fit; {dataset} has {', '.join(SPLITS[dataset])}, "
            "each with at least one image."
        )
    ends = list(itertools.accumulate(-(-num_images // size) for num_images in splits.values()))
    return [
        (split, range(start, end))
        for split, start, end in zip(splits, [0, *ends], ends, strict=False)
    ]


def _write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
