"""A scoring job: a model, images and texts, and their chunks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
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
from pumer.lab.progress import Progress, no_progress
from pumer.lab.score.chunks import Chunks
from pumer.lab.score.pairs import counts_padding, pairs
from pumer.reducers import to_dict

_TEXTS_AT_ONCE = 10_000
_NAMED = 5


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that scores depend on; it can be pickled.

    Official reducers count padded text, so for these every text is padded to the full length,
    whatever `tokenize` says.

    Args:
        model: for image-text retrieval, reduced or not, on its device.
        images: each is scored with each text; a broken one raises before anything is computed.
        texts: none of them empty.
        tokenize: the model's text transform.
        transform: the model's image transform.
        batch_size: texts per image at a time.
        chunk_images: images of a chunk, which are encoded and kept together.
        chunk_texts: texts of a chunk, likewise.

    Raises:
        ValueError: for a model that does not score pairs, no images or texts, and sizes below 1.
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
        """How the matrix of scores is divided."""
        return Chunks(len(self.images), len(self.texts), self.chunk_images, self.chunk_texts)

    def tokens(self, block: slice) -> dict[str, Tensor]:
        """Tokenized texts, int64 [B,T]; raises ValueError for an empty one."""
        texts = self.texts[block]
        return self.tokenize(texts, range(block.start, block.start + len(texts)))

    def check(self) -> str:
        """A digest of all images and texts as the model gets them.

        Opens every image and tokenizes every text, so that errors appear before the work.

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
        """What identifies this job, as plain data; raises as `check` does.

        Without `batch_size`, which changes only the last bits of a score.
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
    """A batch of encoded texts, and their columns in the chunk."""

    columns: Tensor
    encoded: Any


class Scorer:
    """Computes chunks of a job one at a time, and caches the last block of encoded images and of
    texts.

    Memory is bounded by `chunk_images` encoded images and `chunk_texts` encoded texts.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self._images: tuple[slice | None, list[Any]] = (None, [])
        self._texts: tuple[slice | None, list[_Texts]] = (None, [])

    @property
    def model(self) -> Any:
        """The job's model."""
        return self.job.model

    @property
    def device(self) -> torch.device:
        """The device of the model's inputs."""
        return execution_device(self.model)

    @torch.inference_mode()
    def __call__(self, chunk_index: int, progress: Progress = no_progress) -> Tensor:
        """The scores of a chunk, float32 [images, texts] on the CPU; `progress` is called with the
        number of pairs after every image."""
        rows, columns = self.job.chunks[chunk_index]
        self.model.eval()
        if self._images[0] != rows:
            self._images = (
                None,
                [],
            )  # freed first, so that only one block is in memory
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
            progress(count)
        if nan := int(scores.isnan().sum()):
            raise ValueError(NOT_NUMBERS.format(f"{nan} of {scores.numel()} scores of a chunk"))
        return scores.cpu()

    def _encode_images(self, rows: slice) -> list[Any]:
        """Encoded images in their order; those of one size go together, as none is padded."""
        job = self.job
        transformed = [
            job.transform(open_image(image, name=f"image {image_index}"))
            for image_index, image in enumerate(job.images[rows], rows.start)
        ]
        sizes: dict[torch.Size, list[int]] = {}
        for image_index, pixels_3HW in enumerate(transformed):
            sizes.setdefault(pixels_3HW.shape, []).append(image_index)
        encoded: dict[int, Any] = {}
        for indices in sizes.values():
            for start in range(0, len(indices), job.batch_size):
                same_size = indices[start : start + job.batch_size]
                pixels = torch.stack([transformed[image_index] for image_index in same_size])
                pixels = pixels.to(self.device, self.model.dtype)
                encoded |= zip(same_size, pairs(self.model).images(pixels), strict=True)
        return [encoded[image_index] for image_index in range(len(transformed))]

    def _encode_texts(self, columns: slice) -> Iterator[_Texts]:
        """In batches of similar length, to compute little padding."""
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
    """Digest of the weights and of all settings except their origin."""
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
