"""Scoring a pool of images and texts, compared with the plain loop over its pairs."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ViltConfig, ViltForImageAndTextRetrieval

import pumer
from pumer._options import Count
from pumer.lab.bench.records import environment
from pumer.lab.bench.settings import ReducerSettings
from pumer.lab.bench.timing import Timing, alternate
from pumer.lab.data.images import Square
from pumer.lab.data.text import TextTransform, train_tokenizer
from pumer.lab.score.job import Job
from pumer.lab.score.run import score_pairs
from pumer.lab.tasks.retrieval import ranking_scores
from pumer.models.sizes import vision_of
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


def _bridgetower(tiny: bool) -> PreTrainedModel:
    from transformers import BridgeTowerConfig, BridgeTowerForImageAndTextRetrieval

    if not tiny:
        return BridgeTowerForImageAndTextRetrieval(BridgeTowerConfig())
    text = {**_TINY, "num_hidden_layers": 4, "vocab_size": 100, "max_position_embeddings": 60}
    vision = {"hidden_size": 64, "num_hidden_layers": 4, "image_size": 64, "patch_size": 16}
    return BridgeTowerForImageAndTextRetrieval(
        BridgeTowerConfig(text_config=text, vision_config=vision, **_TINY)
    )


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "meter": partial(_meter, False),
    "vilt": partial(_vilt, False),
    "bridgetower": partial(_bridgetower, False),
    "meter-tiny": partial(_meter, True),
    "vilt-tiny": partial(_vilt, True),
    "bridgetower-tiny": partial(_bridgetower, True),
}
"""METER-CLIP16-RoBERTa and ViLT-B/32 at 384 pixels, BridgeTower-base at 288; and one of each to try
things out with, of which no time means anything."""
_PRESETS = {"bridgetower": "meter-retrieval"}
"""Of models that nothing was published for."""

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
"""Columns of what `bench_pairs` returns."""


@dataclass
class PairsBenchSettings:
    """Scoring of a pool against the plain loop over its pairs.

    Args:
        model: a retrieval model of random weights and true architecture: meter, vilt or
            bridgetower.
        reducers: presets, reducers' names, or `{"reducer": ..., setting: value}`; the model's
            retrieval preset if not given.
        images: images of the pool.
        texts: texts of the pool.
        rows: images that are really scored, each with all texts; all of them if not given.
        plain_pairs: pairs that the plain loop is timed on.
        batch_size: pairs at a time, of both.
        runs: timed runs of everything, alternating.
    """

    model: str = "meter"
    reducers: list[ReducerSettings] | None = None
    images: Count = 100
    texts: Count = 500
    rows: Count | None = None
    plain_pairs: Count = 64
    batch_size: Count = 8
    runs: Count = 3


def bench_pairs(settings: PairsBenchSettings) -> list[dict[str, Any]]:
    """Pairs per second of the plain loop and of `score_pairs`, unreduced and with every reducer,
    alternating.

    Decoded images and token ids are the same random ones for all. The plain loop gets its images
    transformed already. `score_pairs` transforms and tokenizes, and where it is timed on some rows
    only, the encoding of all texts is charged to these.

    Returns:
        A row for each reducer, None the first, and way ("plain" or "once"): `pairs_per_second`;
        `x_plain` against the plain loop of the same model; `x_unreduced` against the unreduced
        plain loop; `difference`, the largest from the plain loop's score of the same pair; and the
        settings.

    Raises:
        ValueError: for unknown names and sizes below 1.
    """
    model, images, texts = settings.model, settings.images, settings.texts
    if model not in MODELS:
        raise ValueError(f"no model to measure is named {model!r}; there are {', '.join(MODELS)}")
    rows = images if settings.rows is None else min(settings.rows, images)
    if min(images, texts, rows, settings.plain_pairs, settings.batch_size) < 1:
        raise ValueError("images, texts, rows, plain_pairs and batch_size are whole numbers from 1")
    presets = (
        [_PRESETS.get(model, f"{model}-retrieval")]
        if settings.reducers is None
        else settings.reducers
    )
    reducers: list[Reducer | None] = [
        None,
        *(read_reducer(spec) for spec in presets if spec is not None),
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = MODELS[model]().eval()
    net.to("cuda" if torch.cuda.is_available() else "cpu")
    job = _pool(net, rows, texts, settings.batch_size)
    pairs = {"plain": min(settings.plain_pairs, rows * texts), "once": rows * texts}

    calls = _calls(job, reducers, pairs["plain"])
    difference = {}
    for index in range(len(reducers)):  # which warms the calls up, too
        expected, scores = (calls[index, way]() for way in ("plain", "once"))
        difference[index] = (scores.flatten()[: pairs["plain"]] - expected).abs().max().item()
    named = {f"{index} {way}": call for (index, way), call in calls.items()}
    timings = alternate(named, settings.runs, warmup=0, device=net.device)

    return _records(settings, reducers, pairs, timings, difference, net)


def _records(
    settings: PairsBenchSettings,
    reducers: Sequence[Reducer | None],
    pairs: Mapping[str, int],
    timings: Mapping[str, Timing],
    difference: Mapping[int, float],
    net: PreTrainedModel,
) -> list[dict[str, Any]]:
    """A row for each reducer and way."""
    specs = ["" if reducer is None else json.dumps(to_dict(reducer)) for reducer in reducers]
    plain_rates = [
        pairs["plain"] / timings[f"{index} plain"].median for index in range(len(reducers))
    ]
    records = []
    for index, way in itertools.product(range(len(reducers)), ("plain", "once")):
        timing = timings[f"{index} {way}"]
        rate = pairs[way] / timing.median
        records.append(
            {
                "model": settings.model,
                "reducer": specs[index],
                "way": way,
                "images": settings.images,
                "texts": settings.texts,
                "pairs_timed": pairs[way],
                "image_size": vision_of(net.config).image_size,
                "batch_size": settings.batch_size,
                "runs": settings.runs,
                **_seconds(timing),
                "pairs_per_second": round(rate, 3),
                "x_plain": round(rate / plain_rates[index], 3),
                "x_unreduced": round(rate / plain_rates[0], 3),
                "difference": 0.0 if way == "plain" else difference[index],
                **environment(net.device),
            }
        )
    return records


def _calls(
    job: Job, reducers: Sequence[Reducer | None], plain_pairs: int
) -> dict[tuple[int, str], Callable[[], Tensor]]:
    """The calls to time, by the reducer's index and the way."""
    calls: dict[tuple[int, str], Callable[[], Tensor]] = {}
    for index, reducer in enumerate(reducers):
        plain_loop = partial(_plain, job, _inputs(job, plain_pairs))
        calls[index, "plain"] = partial(_under, job.model, reducer, plain_loop)
        calls[index, "once"] = partial(_under, job.model, reducer, partial(_once, job))
    return calls


def _seconds(timing: Timing) -> dict[str, float]:
    return {
        "seconds": round(timing.median, 4),
        "seconds_p20": round(timing.p20, 4),
        "seconds_p80": round(timing.p80, 4),
    }


def _pool(net: PreTrainedModel, images: int, texts: int, batch_size: int) -> Job:
    """Images of noise and texts of random words, always the same."""
    size, draw = vision_of(net.config).image_size, random.Random(0)
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
            ranking_scores(
                net(**{name: value.to(net.device) for name, value in batch.items()}).logits
            )
            for batch in batches
        ]
    return torch.cat(batch_scores).float().cpu()


def _once(job: Job) -> Tensor:
    return score_pairs(
        job.model, job.images, job.texts, job.tokenize, job.transform, batch_size=job.batch_size
    )
