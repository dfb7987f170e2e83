"""One scoring job: a model, images and texts, and how they are cut into chunks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pumer._files import sha256
from pumer.adapters.forward import execution_device
from pumer.api import active
from pumer.lab.data.images import BrokenImageError, ImageSource, ImageTransform, open_image
from pumer.lab.data.text import TextTransform
from pumer.lab.evaluate import NOT_NUMBERS
from pumer.lab.score.chunks import Chunks
from pumer.lab.score.pairs import counts_padding, pairs
from pumer.reducers import to_dict

_TEXTS_AT_ONCE = 10_000
_NAMED = 5


@dataclass(frozen=True, eq=False)
class Job:
    """All that scores depend on; it can be sent to other processes.

    A published reducer counts padded text, so for one every text is padded to the full length,
    whatever `tokenize` says.

    Args:
        model: for image-text retrieval, reduced or not, on its device.
        images: of which each is scored with each text; a broken one is an error before anything is
            computed.
        texts: none of them empty.
        tokenize: the model's text transform.
        transform: the model's image transform.
        batch_size: texts that meet an image at a time.
        chunk_images: images of a chunk, which are encoded and kept together.
        chunk_texts: texts of a chunk, likewise.

    Raises:
        ValueError: for a model that scores no pairs, no image or text at all, and sizes below 1.
    """

    model: Any
    images: Sequence[ImageSource]
    texts: Sequence[str]
    tokenize: TextTransform
    transform: ImageTransform
    batch_size: int = 64
    chunk_images: int = 32
    chunk_texts: int = 512

    def __post_init__(self) -> None:
        pairs(self.model)
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give at least 1")
        if counts_padding(self.model):
            object.__setattr__(self, "tokenize", replace(self.tokenize, padding="max_length"))
        _ = self.chunks

    @property
    def chunks(self) -> Chunks:
        """How the matrix of scores is cut up."""
        return Chunks(len(self.images), len(self.texts), self.chunk_images, self.chunk_texts)

    def tokens(self, block: slice) -> dict[str, Tensor]:
        """Some of the texts as the tokenizer gives them, int64 [B,T]; raises ValueError for an
        empty one."""
        texts = self.texts[block]
        return self.tokenize(texts, range(block.start, block.start + len(texts)))

    def check(self) -> str:
        """A digest of all images and texts as the model gets them.

        Opens every image and tokenizes every text, so that what is wrong with them shows before the
        work and not in the midst of it.

        Raises:
            BrokenImageError: naming the images that cannot be read.
            ValueError: for empty texts.
        """
        return sha256(self._contents())

    def _contents(self) -> Iterator[bytes]:
        for start in range(0, len(self.texts), _TEXTS_AT_ONCE):
            ids = self.tokens(slice(start, start + _TEXTS_AT_ONCE))["input_ids"]
            yield repr(ids.shape).encode() + ids.numpy().tobytes()
        broken = []
        for image_index, image in enumerate(self.images):
            try:
                opened = open_image(image, name=f"image {image_index}")
            except BrokenImageError as error:
                broken.append(str(error))
                continue
            yield repr(opened.size).encode() + opened.tobytes()
            if image_index == 0:
                yield self.transform(opened).numpy().tobytes()
        if broken:
            raise BrokenImageError(
                f"{len(broken)} of {len(self.images)} images are broken; replace or leave them out "
                f'(tasks do with skip: "broken"). {" ".join(broken[:_NAMED])}'
            )

    def fingerprint(self) -> dict[str, Any]:
        """What tells this job from another one, as plain data; raises as `check` does.

        `batch_size` is not in it: it changes no more than the last bits of a score.
        """
        patch = active(self.model)
        return {
            "images": len(self.images),
            "texts": len(self.texts),
            "chunk_images": self.chunk_images,
            "chunk_texts": self.chunk_texts,
            "model": _model_digest(self.model),
            "reducer": None if patch is None else to_dict(patch.reducer),
            "pool": self.check(),
        }


class _Texts(NamedTuple):
    """A batch of texts, encoded, and which columns of the chunk they are."""

    columns: Tensor
    encoded: Any


class Scorer:
    """Computes chunks of a job, one at a time, and remembers the images and the texts it encoded
    last.

    So it holds `chunk_images` encoded images and `chunk_texts` encoded texts, however many there
    are in all.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._images: tuple[slice | None, list[Any]] = (None, [])
        self._texts: tuple[slice | None, list[_Texts]] = (None, [])

    @property
    def model(self) -> Any:
        """The job's."""
        return self.job.model

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return execution_device(self.model)

    @torch.inference_mode()
    def __call__(self, number: int, advance: Callable[[int], None] = lambda pairs: None) -> Tensor:
        """The scores of a chunk, float32 [images, texts] on the CPU; `advance` is told of pairs
        that are done."""
        rows, columns = self.job.chunks[number]
        self.model.eval()
        if self._images[0] != rows:
            self._images = (
                None,
                [],
            )  # before the next ones are made, so that there is one block in memory
            self._images = (rows, self._encode_images(rows))
        if self._texts[0] != columns:
            self._texts = (None, [])
            self._texts = (columns, list(self._encode_texts(columns)))
        score = pairs(self.model).score
        count = columns.stop - columns.start
        scores = torch.empty(len(self._images[1]), count, device=self.device)
        for row, image in zip(scores, self._images[1], strict=True):
            for texts in self._texts[1]:
                row[texts.columns] = score(image, texts.encoded).float()
            advance(count)
        if nan := int(scores.isnan().sum()):
            raise ValueError(NOT_NUMBERS.format(f"{nan} of {scores.numel()} scores of a chunk"))
        return scores.cpu()

    def _encode_images(self, rows: slice) -> list[Any]:
        """In their order; pictures of one size together, as none is padded."""
        job = self.job
        pictures = [
            job.transform(open_image(image, name=f"image {image_index}"))
            for image_index, image in enumerate(job.images[rows], rows.start)
        ]
        sizes: dict[torch.Size, list[int]] = {}
        for picture_index, picture in enumerate(pictures):
            sizes.setdefault(picture.shape, []).append(picture_index)
        encoded: dict[int, Any] = {}
        for places in sizes.values():
            for start in range(0, len(places), job.batch_size):
                some = places[start : start + job.batch_size]
                pixels = torch.stack([pictures[picture_index] for picture_index in some])
                pixels = pixels.to(self.device, self.model.dtype)
                encoded |= zip(some, pairs(self.model).images(pixels), strict=True)
        return [encoded[picture_index] for picture_index in range(len(pictures))]

    def _encode_texts(self, columns: slice) -> Iterator[_Texts]:
        """In batches of texts of about one length, so that little is computed for padding."""
        job, inputs = self.job, self.job.tokens(columns)
        lengths = inputs["attention_mask"].sum(1)
        for some in lengths.argsort(stable=True).split(job.batch_size):
            longest = (
                inputs["input_ids"].shape[1]
                if counts_padding(self.model)
                else int(lengths[some].max())
            )
            batch = {name: value[some, :longest].to(self.device) for name, value in inputs.items()}
            yield _Texts(some.to(self.device), pairs(self.model).texts(batch))


def _model_digest(model: Any) -> str:
    """Of the weights and of all settings but those that say where they came from."""
    config = model.config.to_dict()
    settings = {
        name: value
        for name, value in config.items()
        if name not in ("_name_or_path", "transformers_version")
    }
    start = json.dumps([type(model).__name__, settings], sort_keys=True, default=str).encode()
    weights = (
        part
        for name, tensor in model.state_dict().items()
        for part in (name.encode(), tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    )
    return sha256(itertools.chain([start], weights))
