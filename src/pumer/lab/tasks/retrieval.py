"""Retrieval with Karpathy's splits: which caption belongs to a photograph, which photograph to a
caption?

Karpathy and Fei-Fei, "Deep Visual-Semantic Alignments for Generating Image Descriptions", CVPR
2015: splits and captions. Images: Flickr30k (Young et al., TACL 2014), COCO (Lin et al., ECCV
2014).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pumer._files import replacing
from pumer.lab.data.images import ImageSource
from pumer.lab.tasks.base import Example, bootstrap_interval, check_ids, last_argmax
from pumer.lab.tasks.files import FileTask, MissingFileError, read_rows, strings, usable
from pumer.lab.tasks.snli_ve import FLICKR30K

_SOURCE = "cs.stanford.edu/people/karpathy/deepimagesent, caption_datasets.zip"
_IMAGES = {
    "flickr30k": {"train": 29_000, "val": 1_014, "test": 1_000},
    "coco": {"train": 82_783, "restval": 30_504, "val": 5_000, "test": 5_000},
}
_CAPTIONS = {
    "flickr30k": {"train": 145_000, "val": 5_070, "test": 5_000},
    "coco": {"test": 25_010},
}
_COCO = ("train2014", "val2014", "train2017", "val2017")
DATASETS: tuple[Literal["flickr30k", "coco"], ...] = ("flickr30k", "coco")


def ranking_scores(logits_NK: Tensor) -> Tensor:
    """A score for each of N pairs of image and text: the only column [N,1] of a head for ranking,
    or yes against no, of a head for matching [N,2].

    >>> ranking_scores(torch.tensor([[1.0, 3.0]]))
    tensor([2.])
    """
    return logits_NK[:, -1] if logits_NK.shape[1] == 1 else logits_NK[:, 1] - logits_NK[:, 0]


class _Photo(NamedTuple):
    """An image of the official file; `captions` are (sentid, text)."""

    id: int
    key: str
    split: str
    captions: tuple[tuple[int, str], ...]


class _Captions:
    """The captions of a split in order: those of image i are `starts[i]` up to `starts[i + 1]`."""

    def __init__(self, photos: Sequence[_Photo]):
        self.texts = [text for photo in photos for _, text in photo.captions]
        self.ids = [sentid for photo in photos for sentid, _ in photo.captions]
        counts = [len(photo.captions) for photo in photos]
        self.image_of = np.repeat(np.arange(len(photos)), counts)
        self.starts = np.concatenate([[0], np.cumsum(counts)])

    def draw(self, image: int, negatives: int, seed: int) -> tuple[str, tuple[str, ...]]:
        """A caption of the image and `negatives` captions of other images; deterministic."""
        generator = np.random.default_rng((seed, image))
        start, stop = self.starts[image], self.starts[image + 1]
        caption = generator.integers(start, stop)
        others = generator.choice(len(self.texts) - (stop - start), size=negatives, replace=False)
        others[others >= start] += stop - start  # skips the image's own captions
        return self.texts[caption], tuple(self.texts[other] for other in others)


class _Row(NamedTuple):
    number: int
    photo: _Photo
    captions: _Captions


@dataclass(frozen=True, eq=False)
class Pool:
    """The images and captions of a split, to score every pair of.

    `images` are read on access. Caption t belongs to image `image_of[t]`, int64 [T]; most images
    have five captions.
    """

    images: Sequence[ImageSource]
    image_ids: Sequence[int]
    captions: Sequence[str]
    caption_ids: Sequence[int]
    image_of: np.ndarray


@dataclass(frozen=True)
class Retrieval(FileTask):
    """Image-text retrieval in Karpathy's splits: `dataset_flickr30k.json` or `dataset_coco.json`
    under `root`.

    Training takes `examples`, one for each image: one of its captions, and captions of other images
    to rank below it. Which is decided by `seed` and the image's place in the file alone, so that it
    stays the same from epoch to epoch; another seed draws others. Their `metric` is how often the
    right one of those few comes first. What is published takes `pool` and `recalls`: every image
    against every caption. Images: `flickr30k_images/`, or `train2014/` and `val2014/`, or all in
    one folder. Splits: "train", "val", "test", with COCO "restval".

    Args:
        dataset: "flickr30k" or "coco".
        negatives: captions of other images in an example; PuMer's 15.
        restval: whether "train" has the images of "restval" as well, as is the custom.
        seed: of the captions drawn.
    """

    name = "retrieval"
    loss_kind = "rank"
    labels = ("match",)
    dataset: Literal["flickr30k", "coco"] = "flickr30k"
    negatives: int = 15
    restval: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise ValueError(f"dataset is {self.dataset!r}; it is one of {', '.join(DATASETS)}.")
        if self.negatives < 0:
            raise ValueError(f"negatives is {self.negatives}; give a count, for example 15.")

    @property
    def file(self) -> Path:
        """The official file."""
        return Path(self.root) / f"dataset_{self.dataset}.json"

    @property
    def published(self) -> Mapping[str, Mapping[str, int]]:
        captions = _CAPTIONS[self.dataset]
        counts = {
            split: {"images": images} | ({"captions": captions[split]} if split in captions else {})
            for split, images in _IMAGES[self.dataset].items()
        }
        if self.restval and "restval" in counts:
            counts["train"] = {"images": counts["train"]["images"] + counts["restval"]["images"]}
        return counts

    def count(self, rows: Sequence[_Row]) -> dict[str, int]:
        return {"images": len(rows), "captions": sum(len(row.photo.captions) for row in rows)}

    def read(self, split: str) -> Sequence[_Row]:
        """The captions of a split."""
        splits = _IMAGES[self.dataset].keys()
        if split not in splits:
            raise ValueError(f"{self.dataset} has the splits {', '.join(splits)}, not {split!r}.")
        merged = {split, "restval"} if split == "train" and self.restval else {split}
        photos = [photo for photo in self._photos if photo.split in merged]
        if not photos:
            raise ValueError(
                f"{self.file} has no image of the split {split}; is it the whole file?"
            )
        captions = _Captions(photos)
        return [_Row(index, photo, captions) for index, photo in enumerate(photos)]

    @cached_property
    def _photos(self) -> list[_Photo]:
        """All images of the file; read once, as it holds all splits."""
        file = self.file
        if not file.is_file():
            raise MissingFileError(file, f"the files are at {_SOURCE}")
        try:
            content = json.loads(file.read_bytes())
            images = content["images"]
            photos = read_rows(
                ((f"{file}: image {i}", row) for i, row in enumerate(images)), self._parse
            )
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no JSON: {error}; fetch it again.") from error
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{file} has no list of images ({type(error).__name__}: {error})."
            ) from error
        if content.get("dataset") != self.dataset:
            raise ValueError(
                f"{file} is of {content.get('dataset')!r}, not {self.dataset}; rename it."
            )
        owners: dict[int, int] = {}
        for photo in photos:
            for sentid, _ in photo.captions:
                if sentid in owners:
                    raise ValueError(
                        f"{file}: images {owners[sentid]} and {photo.id} both have sentid {sentid}."
                    )
                owners[sentid] = photo.id
        return photos

    def _parse(self, row: Any) -> _Photo:
        filename, split = strings(row, "filename", "split")
        if split not in _IMAGES[self.dataset]:
            raise ValueError(f"split {split!r} is none of {', '.join(_IMAGES[self.dataset])}")
        image, sentences = row.get("imgid"), row.get("sentences")
        if not isinstance(image, int):
            raise ValueError(f"imgid is {image!r}, not a number")
        if not isinstance(sentences, list) or not sentences:
            raise ValueError("there are no sentences")
        captions = []
        for sentence in sentences:
            (raw,) = strings(sentence, "raw")
            if not isinstance(sentence.get("sentid"), int):
                raise ValueError(f"sentid is {sentence.get('sentid')!r}, not a number")
            if sentence.get("imgid") != image:
                raise ValueError(
                    f"sentence {sentence['sentid']} is about image {sentence.get('imgid')}"
                )
            captions.append((sentence["sentid"], raw))
        return _Photo(image, Path(filename).stem, split, tuple(captions))

    def keys(self, row: _Row) -> tuple[str, ...]:
        return (row.photo.key,)

    def places(self, split: str) -> Sequence[str]:
        return FLICKR30K if self.dataset == "flickr30k" else (*_COCO, "")

    def examples(self, split: str) -> Sequence[Example]:
        rows = self.read(split)
        for row in rows:
            others = len(row.captions.texts) - len(row.photo.captions)
            if others < self.negatives:
                raise ValueError(
                    f"{split} has {others} captions of images other than {row.photo.id}; set "
                    "negatives to as many."
                )
        return super().examples(split)

    def example(self, row: _Row, images: Sequence[ImageSource]) -> Example:
        text, negatives = row.captions.draw(row.number, self.negatives, self.seed)
        image = row.photo.id
        return Example(
            id=image, text=text, images=images, target=0, cluster=image, negatives=negatives
        )

    def pool(self, split: str) -> Pool:
        """All images and captions of a split; raises ValueError as `examples` does."""
        store = self.store(split)
        photos = [row.photo for row in usable(self, self.read(split), store)]
        captions = _Captions(photos)
        return Pool(
            images=store.select([photo.key for photo in photos]),
            image_ids=[photo.id for photo in photos],
            captions=captions.texts,
            caption_ids=captions.ids,
            image_of=captions.image_of,
        )

    def decode(self, logits: Tensor) -> list[Any]:
        """Index of the highest-scoring text of each example; logits [B, K].

        Of equal ones the last: the first text is the right one, so a model with constant scores
        gets none right.
        """
        return last_argmax(logits).tolist()

    def score(self, prediction: int, example: Example) -> float:
        return float(prediction == example.target)

    def write_predictions(
        self, path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]
    ) -> None:
        """Write a JSON object per line, `imgid` and the chosen caption; there is no official
        format."""
        check_ids(predictions, examples)
        with replacing(path) as file:
            for example in examples:
                caption = (example.text, *example.negatives)[predictions[example.id]]
                file.write(
                    json.dumps({"imgid": example.id, "caption": caption}, ensure_ascii=False) + "\n"
                )


def recalls(
    scores: np.ndarray | Tensor, image_of: np.ndarray, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, float]:
    """R@k in both directions with 95 % intervals, in percent: `tr_r1`, `tr_r1_low`, `tr_r1_high`,
    ..., `ir_r1`, ...

    Text retrieval (tr): the share of images with one of their captions among the k highest-scoring
    ones. Image retrieval (ir): the share of captions whose image is among the k highest-scoring
    ones. Of equal scores the lower index comes first. The bootstrap resamples images with all their
    captions. A k above the number of candidates is skipped.

    Args:
        scores: of every image with every caption, [I, T].
        image_of: the image of every caption, [T]; every image has at least one caption.
        ks: cutoffs.

    Raises:
        ValueError: for shapes that do not fit, NaN scores, and images without a caption.

    >>> recalls(torch.eye(2), torch.tensor([0, 1]), ks=(1,))["tr_r1"]
    100.0
    """
    scores = torch.as_tensor(scores).detach().cpu()
    owner = torch.as_tensor(image_of).long()
    images, captions = scores.shape
    if owner.shape != (captions,) or not torch.equal(owner.unique(), torch.arange(images)):
        raise ValueError(
            f"scores are for {images} images and {captions} captions; image_of must give one of "
            "those images for each caption, and each image must have one."
        )
    if scores.isnan().any():
        raise ValueError(
            "some scores are NaN; a model in half precision may overflow, try float32."
        )
    image_rank, caption_rank = _ranks(scores, owner)
    result: dict[str, float] = {}
    for way, rank, clusters, candidates in (
        ("tr", image_rank, range(images), captions),
        ("ir", caption_rank, owner.tolist(), images),
    ):
        for k in ks:
            if k <= candidates:
                hits = (rank < k).double()
                low, high = bootstrap_interval(hits.tolist(), clusters)
                values = {"": hits.mean().item(), "_low": low, "_high": high}
                result |= {
                    f"{way}_r{k}{end}": round(100 * value, 2) for end, value in values.items()
                }
    return result


def _ranks(scores_IT: Tensor, image_of_T: Tensor) -> tuple[Tensor, Tensor]:
    """Of every image how many captions come before the first of its own [I], and of every caption
    how many images come before its own [T]; of equal scores the first comes first."""
    images, captions = scores_IT.shape
    own_score_T = scores_IT[image_of_T, torch.arange(captions)]
    image_rank_I = torch.empty(images, dtype=torch.int64)
    caption_rank_T = torch.zeros(captions, dtype=torch.int64)
    for image, row_T in enumerate(scores_IT):  # one by one: all at once would take gigabytes
        tied_T = (row_T == own_score_T) & (image_of_T > image)
        caption_rank_T += (row_T > own_score_T) | tied_T
        # The best of the image's own captions, the first one where several are equal.
        own_captions = (image_of_T == image).nonzero()[:, 0]
        best = own_score_T[own_captions].max()
        first_best = own_captions[own_score_T[own_captions] == best][0]
        image_rank_I[image] = (row_T > best).sum() + (row_T[:first_best] == best).sum()
    return image_rank_I, caption_rank_T


def check_folds(images: int, folds: int) -> None:
    """Raise ValueError unless images divide evenly into folds."""
    if folds < 1 or images < folds or images % folds:
        raise ValueError(f"{images} images do not make {folds} equal folds; COCO's 5,000 make 5.")


def recalls_in_folds(
    scores: np.ndarray | Tensor,
    image_of: np.ndarray,
    folds: int = 5,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """R@k in both directions as the mean over equal folds of images, in percent: `tr_r1`, ...,
    `ir_r1`, ...

    COCO's 5,000 test images in five folds are what papers call COCO 1K. A fold is a run of
    consecutive images with their captions, and is ranked by itself.

    Args:
        scores: of every image with every caption, [I, T].
        image_of: the image of every caption, [T].
        folds: number of folds; it must divide the number of images.
        ks: cutoffs.

    Raises:
        ValueError: for folds of different sizes, and see `recalls`.
    """
    scores = torch.as_tensor(scores)
    images = len(scores)
    check_folds(images, folds)
    size = images // folds
    parts = []
    for start in range(0, images, size):
        captions = ((image_of >= start) & (image_of < start + size)).nonzero()[0]
        parts.append(
            recalls(scores[start : start + size][:, captions], image_of[captions] - start, ks)
        )
    names = [name for name in parts[0] if not name.endswith(("_low", "_high"))]
    return {name: round(sum(part[name] for part in parts) / folds, 2) for name in names}
