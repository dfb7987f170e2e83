"""Scoring a pool of images and texts, timed against the plain loop over its pairs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ViltConfig, ViltForImageAndTextRetrieval

import pumer
from pumer.lab.bench.records import environment
from pumer.lab.bench.timing import alternate
from pumer.lab.data.images import Square
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.score.job import Job
from pumer.lab.score.run import score_pairs
from pumer.presets import read_reducer
from pumer.reducers import Reducer, to_dict

_WORDS = (
    "red",
    "blue",
    "green",
    "small",
    "large",
    "round",
    "square",
    "ball",
    "box",
    "dog",
    "cat",
    "tree",
    "house",
    "left",
    "right",
    "above",
    "of",
    "the",
    "a",
    "in",
)
_REAL = (6, 14)  # fewest and most words: with the tokens at both ends what captions have
_TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def _meter(tiny: bool) -> PreTrainedModel:
    from pumer.models.meter import MeterConfig, MeterForImageAndTextRetrieval

    if not tiny:
        return MeterForImageAndTextRetrieval(MeterConfig())
    text = {**_TINY, "vocab_size": 100, "max_position_embeddings": 60}
    return MeterForImageAndTextRetrieval(
        MeterConfig(
            text_config=text, vision_config={**_TINY, "image_size": 64, "patch_size": 16}, **_TINY
        )
    )


def _vilt(tiny: bool) -> PreTrainedModel:
    small = {**_TINY, "vocab_size": 100, "image_size": 64, "patch_size": 16}
    return ViltForImageAndTextRetrieval(ViltConfig(**small) if tiny else ViltConfig())


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "meter": partial(_meter, False),
    "vilt": partial(_vilt, False),
    "meter-tiny": partial(_meter, True),
    "vilt-tiny": partial(_vilt, True),
}
"""METER-CLIP16-RoBERTa and ViLT-B/32 at 384 pixels; and two to try things out with, of which no
time means anything."""

COLUMNS = (
    "model",
    "reducer",
    "way",
    "images",
    "texts",
    "pairs_timed",
    "image_size",
    "batch_size",
    "runs",
    "seconds",
    "seconds_p20",
    "seconds_p80",
    "pairs_per_second",
    "x_plain",
    "x_unreduced",
    "difference",
    *environment(),
)
"""Columns of what `measure` returns."""


def measure(
    model: str,
    reducers: Sequence[Any],
    images: int = 100,
    texts: int = 500,
    rows: int | None = None,
    plain_pairs: int = 64,
    batch_size: int = 8,
    runs: int = 3,
) -> list[dict[str, Any]]:
    """Pairs per second of the plain loop and of `score_pairs`, unreduced and with every reducer,
    taking turns.

    Decoded images and token ids are the same random ones for all. The plain loop gets its
    images transformed already. `score_pairs` transforms and tokenizes, and where it is timed on
    some rows only, the encoding of all texts is charged to these.

    Args:
        model: a name in `MODELS`.
        reducers: presets, reducers' names, `{"reducer": name, setting: value}`, or reducers.
        images: of the pool.
        texts: of the pool.
        rows: images that are really scored, each with all texts; all of them if not given.
        plain_pairs: pairs that the plain loop is timed on.
        batch_size: pairs at a time, of both.
        runs: of everything.

    Returns:
        A row for each reducer, None the first, and way ("plain" or "once"): `pairs_per_second`;
        `x_plain` against the plain loop of the same model; `x_unreduced` against the unreduced
        plain loop; `difference`, the largest from the plain loop's score of the same pair; and the
        settings.

    Raises:
        ValueError: for unknown names and sizes below 1.
    """
    if model not in MODELS:
        raise ValueError(f"no model to measure is named {model!r}; there are {', '.join(MODELS)}")
    rows = images if rows is None else min(rows, images)
    if min(images, texts, rows, plain_pairs, batch_size) < 1:
        raise ValueError("images, texts, rows, plain_pairs and batch_size are whole numbers from 1")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MODELS[model]().eval()
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    job = _pool(net, rows, texts, batch_size)
    specs: list[Reducer | None] = [None, *map(read_reducer, reducers)]
    plain = min(plain_pairs, rows * texts)

    variants: dict[tuple[int, str], Callable[[], Tensor]] = {}
    for reducer_index, reducer in enumerate(specs):
        variants[reducer_index, "plain"] = partial(
            _under, net, reducer, partial(_plain, job, _inputs(job, plain))
        )
        variants[reducer_index, "once"] = partial(_under, net, reducer, partial(_once, job))
    difference = {}
    for reducer_index in range(len(specs)):
        expected, scores = (
            variants[reducer_index, way]() for way in ("plain", "once")
        )  # and they are warm then
        difference[reducer_index] = (scores.flatten()[:plain] - expected).abs().max().item()
    named = {f"{reducer_index} {way}": call for (reducer_index, way), call in variants.items()}
    timings = alternate(named, runs, warmup=0, device=net.device)

    names = ["" if reducer is None else json.dumps(to_dict(reducer)) for reducer in specs]
    per_second = {
        (reducer_index, way): (plain if way == "plain" else rows * texts)
        / timings[f"{reducer_index} {way}"].median
        for reducer_index, way in variants
    }
    records = [
        {
            "model": model,
            "reducer": names[reducer_index],
            "way": way,
            "images": images,
            "texts": texts,
            "pairs_timed": plain if way == "plain" else rows * texts,
            "image_size": net.config.image_size,
            "batch_size": batch_size,
            "runs": runs,
            "seconds": round(timings[f"{reducer_index} {way}"].median, 4),
            "seconds_p20": round(timings[f"{reducer_index} {way}"].p20, 4),
            "seconds_p80": round(timings[f"{reducer_index} {way}"].p80, 4),
            "pairs_per_second": round(per_second[reducer_index, way], 3),
            "x_plain": round(
                per_second[reducer_index, way] / per_second[reducer_index, "plain"], 3
            ),
            "x_unreduced": round(per_second[reducer_index, way] / per_second[0, "plain"], 3),
            "difference": 0.0 if way == "plain" else difference[reducer_index],
            **environment(net.device),
        }
        for reducer_index, way in variants
    ]
    return records


def _pool(net: PreTrainedModel, images: int, texts: int, batch_size: int) -> Job:
    """Images of noise and texts of random words, the same every time."""
    size, draw = net.config.image_size, random.Random(0)
    noise = np.random.default_rng(0)
    noise_images = [
        Image.fromarray(noise.integers(0, 256, (size, size, 3), dtype=np.uint8))
        for _ in range(images)
    ]
    sentences = [" ".join(draw.choices(_WORDS, k=draw.randint(*_REAL))) for _ in range(texts)]
    return Job(
        net,
        noise_images,
        sentences,
        TextTransform(train_tokenizer(_WORDS, 100), 40),
        Square(size),
        batch_size,
    )


def _inputs(job: Job, count: int) -> list[dict[str, Tensor]]:
    """The first pairs, image by image, in batches for the plain loop."""
    numbers = [divmod(pair, len(job.texts)) for pair in range(count)]
    pixels = {image: job.transform(job.images[image]) for image, _ in numbers}  # type: ignore[arg-type]
    batches = []
    for start in range(0, count, job.batch_size):
        batch_pairs = numbers[start : start + job.batch_size]
        batch = job.tokenize(
            [job.texts[text] for _, text in batch_pairs], [text for _, text in batch_pairs]
        )
        batches.append(
            batch | {"pixel_values": torch.stack([pixels[image] for image, _ in batch_pairs])}
        )
    return batches


def _under(net: PreTrainedModel, reducer: Reducer | None, call: Callable[[], Tensor]) -> Tensor:
    with nullcontext() if reducer is None else pumer.reduced(net, reducer):
        return call()


def _plain(job: Job, batches: Sequence[dict[str, Tensor]]) -> Tensor:
    net = job.model
    with torch.inference_mode():
        batch_scores = [
            net(**{name: value.to(net.device) for name, value in batch.items()}).logits[:, 0]
            for batch in batches
        ]
    return torch.cat(batch_scores).float().cpu()


def _once(job: Job) -> Tensor:
    return score_pairs(
        job.model, job.images, job.texts, job.tokenize, job.transform, batch_size=job.batch_size
    )
