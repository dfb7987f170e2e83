"""Settings of the benches: the options of `pumer bench` and its subcommands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from pumer._options import Count

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["sdpa", "eager", "flash_attention_2"]
ReducerSettings = str | dict[str, Any] | None


@dataclass
class BenchSettings:
    """Forwards of stock, fused and reduced models.

    Args:
        model: a model of random weights and true architecture: vilt-b32, meter-base or
            bridgetower-base.
        reducers: presets, reducers' names, or `{"reducer": ..., setting: value}`; the model's
            presets for VQAv2 if not given.
        batch: examples at a time.
        image_size: side of the images in pixels; the model's own if not given.
        text: text tokens, padding included; 8 to 16 of them are real.
        device: "auto" takes a CUDA device if there is one.
        dtype: type of weights and activations.
        compiled: measure under torch.compile.
        pack: measure everything but stock with packed rows too, on images from smooth to busy, so
            that methods which decide by sample decide differently.
        threads: CPU threads; torch's own choice if not given.
        runs: timed forwards of each.
    """

    model: str = "vilt-b32"
    reducers: list[ReducerSettings] | None = None
    batch: Count = 8
    image_size: Count | None = None
    text: Count = 40
    device: Device = "auto"
    dtype: Dtype = "float32"
    compiled: bool = False
    pack: bool = False
    threads: Count | None = None
    runs: Count = 9


@dataclass
class AnswerBenchSettings:
    """Answers of stock and reduced vision-language models.

    Args:
        model: a model of random weights, true architecture and true widths: llava-1.5-7b-shape,
            llava-next-7b-shape, qwen2.5-vl-7b-shape or internvl3-8b-shape.
        reducers: reducers' names, or `{"reducer": ..., setting: value}`; visionzip, fastv and pumer
            if not given.
        layers: of the language model, 2 or more; null for the true number.
        tower_layers: of the vision tower, 2 or more; null for the true number.
        batch: prompts at a time, each with one image.
        text: text tokens of a prompt.
        new_tokens: tokens of the answer.
        device: "auto" takes a CUDA device if there is one.
        dtype: type of weights and activations.
        attention: kernel of the language model and of the vision tower.
        threads: CPU threads; torch's own choice if not given.
        runs: timed answers of each.
    """

    model: str = "llava-1.5-7b-shape"
    reducers: list[ReducerSettings] | None = None
    layers: Count | None = 4
    tower_layers: Count | None = 4
    batch: Count = 1
    text: Count = 64
    new_tokens: Count = 16
    device: Device = "auto"
    dtype: Dtype = "float32"
    attention: Attention = "sdpa"
    threads: Count | None = None
    runs: Count = 5


@dataclass
class TrainingBenchSettings:
    """Training steps, unreduced and reduced, with and without a teacher.

    Args:
        model: a model of random weights and true architecture: vilt-b32, meter-base or
            bridgetower-base.
        reducers: presets, reducers' names, or `{"reducer": ..., setting: value}`; the model's
            presets for VQAv2 if not given.
        batch: examples at a time.
        teachers: `[false]`, `[true]` or both; both if not given.
        text: text tokens, padding included; 8 to 16 of them are real.
        device: "auto" takes a CUDA device if there is one.
        threads: CPU threads; torch's own choice if not given.
        runs: timed steps of each.
    """

    model: str = "vilt-b32"
    reducers: list[ReducerSettings] | None = None
    batch: Count = 4
    teachers: list[bool] | None = None
    text: Count = 40
    device: Device = "auto"
    threads: Count | None = None
    runs: Count = 5


@dataclass
class SweepSettings:
    """One reducer at several batch and image sizes.

    Args:
        model: a model of random weights and true architecture: vilt-b32, meter-base or
            bridgetower-base.
        reducer: a preset's or a reducer's name (`pumer list`), or a file of settings; the model's
            first preset for VQAv2 if not given.
        batches: numbers of examples at a time; 1, 4 and 16 if not given.
        image_sizes: sides of the images in pixels; 192, 384 and 576 if not given.
        device: "auto" takes a CUDA device if there is one.
        dtype: type of weights and activations.
        threads: CPU threads; torch's own choice if not given.
        runs: timed forwards of each.
    """

    model: str = "vilt-b32"
    reducer: ReducerSettings = None
    batches: list[Count] | None = None
    image_sizes: list[Count] | None = None
    device: Device = "auto"
    dtype: Dtype = "float32"
    threads: Count | None = None
    runs: Count = 5


def resolve_device(device: Device) -> tuple[str, bool]:
    """The device that "auto" stands for, and whether this machine has it."""
    has_cuda = torch.cuda.is_available()
    resolved = device if device != "auto" else "cuda" if has_cuda else "cpu"
    return resolved, has_cuda or resolved != "cuda"
