"""Evaluate a model with one reducer: accuracy, speed, FLOPs, memory, tokens.

Shape suffixes: B batch, N tokens, K slots.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import pumer
from pumer._shipped import model_folder
from pumer.adapters.step import ReductionStep
from pumer.costs.report import last_forward_parts
from pumer.costs.result import GIGA, IMAGE_PARTS, TOWERS
from pumer.hub import is_stock, load, load_stock
from pumer.lab.bench.memory import peak_activations
from pumer.lab.bench.overhead import overhead_share, prefill_shares
from pumer.lab.bench.timing import alternate
from pumer.lab.data.images import KeepAspect
from pumer.lab.data.transforms import Stock
from pumer.lab.evaluate import evaluate, model_inputs, paired
from pumer.lab.study.results import pack_scores
from pumer.lab.tasks import build
from pumer.lab.tasks.base import Collator, Example
from pumer.lab.tasks.processors import ProcessorCollator, saved_collator
from pumer.lab.tasks.prompts import is_generative, vocabulary
from pumer.models.sizes import vision_of
from pumer.reducers import EMBEDDINGS, from_dict


@dataclass(frozen=True)
class EvalModel:
    """A model to evaluate.

    Args:
        model: with an active reducer, `Unreduced` for none.
        collator: the task's, with the model's transforms.
        batches: inputs that it is timed on.
    """

    model: PreTrainedModel
    collator: Collator
    batches: tuple[dict[str, Any], ...] = ()

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    def on(self, examples: Sequence[Example], batch_size: int) -> EvalModel:
        """A copy that is timed on these examples."""
        batches = []
        for start in range(0, len(examples), batch_size):
            batch = self.collator(examples[start : start + batch_size])
            inputs = paired(
                self.model, model_inputs(batch, self.device), batch.get("texts_per_image", 1)
            )
            # For generative models the prefill is measured, up to the first token of the answer.
            batches.append(inputs | {"logits_to_keep": 1} if is_generative(self.model) else inputs)
        return replace(self, batches=tuple(batches))

    def run(self) -> None:
        """One forward of every batch."""
        with torch.inference_mode():
            for batch in self.batches:
                self.model(**batch)


def load_eval_model(
    folder: str,
    task: dict[str, Any],
    reducer: dict[str, Any] | None = None,
    image_size: int | None = None,
    device: str | torch.device = "cpu",
) -> EvalModel:
    """Load a saved model with its collator for a task.

    Args:
        folder: of the model, or a shipped one's name.
        task: `name` and settings.
        reducer: name and settings; the one that the model was saved with if not given.
        image_size: side of the images in pixels; the one that the model was saved with if not
            given.
        device: for the model, which is in float32.

    Raises:
        ValueError: for a reducer that does not fit the model.
    """
    path = model_folder(folder)
    # Shipped in half precision, which CPUs are slow at.
    read = load_stock if is_stock(str(path)) else load
    model = read(str(path), torch.float32, device)
    patch = pumer.active(model)
    saved = pumer.Unreduced() if patch is None else patch.reducer
    pumer.apply(model, saved if reducer is None else from_dict(reducer))
    collator = saved_collator(str(path), model, build(task, vocabulary(model)))
    return EvalModel(model.eval(), sized(collator, image_size))


def sized(collator: Collator, image_size: int | None) -> Collator:
    """The collator with another image size; unchanged for None.

    Raises ValueError for the collator of a processor, and for a size that its image transform
    cannot have.
    """
    if image_size is None:
        return collator
    if isinstance(collator, ProcessorCollator) or isinstance(collator.image, Stock):
        raise ValueError(
            "image_size is for models with an image transform: a processor's is in its own files"
        )
    transform: Any = collator.image
    side = "shorter" if isinstance(transform, KeepAspect) else "size"
    return replace(collator, image=replace(transform, **{side: image_size}))


def score(one: EvalModel, examples: Sequence[Example], batch_size: int) -> dict[str, Any]:
    """Columns on accuracy."""
    result = evaluate(one.model, examples, one.collator, batch_size=batch_size)
    metric = {
        name: result.metric.pop(name) for name in ("accuracy", "accuracy_low", "accuracy_high")
    }
    bare = [replace(example, images=()) for example in examples]
    right = [one.collator.task.score(result.predictions[example.id], example) for example in bare]
    return {
        "examples": result.examples,
        **metric,
        "details": json.dumps(result.metric),
        "scores": pack_scores(right, [example.cluster for example in bare]),
    }


def cost(one: EvalModel, base: EvalModel, count: int) -> dict[str, Any]:
    """Columns on FLOPs, memory and tokens, also of the unreduced model; the batches hold `count`
    examples."""
    total_macs, towers = macs(one, count)
    mean, spread = _tokens(one)
    text, image = mean[1:].mean(0)
    return {
        "gflops": round(2 * total_macs / GIGA, 5),
        "gflops_towers": round(2 * towers / GIGA, 5),
        "unreduced_gflops": round(2 * macs(base, count)[0] / GIGA, 5),
        "peak_bytes": _peak(one),
        "unreduced_peak_bytes": _peak(base),
        "average_text": round(float(text), 2),
        "average_image": round(float(image), 2),
        "image_spread": round(float(spread[1:, 1].mean()), 2),
        "tokens": json.dumps(mean.round(2).tolist()),
        "tokens_spread": json.dumps(spread.round(2).tolist()),
    }


def speed(one: EvalModel, base: EvalModel, count: int, runs: int) -> dict[str, Any]:
    """Columns on speed; runs alternate with the unreduced model.

    Args:
        one: what is timed.
        base: the unreduced model.
        count: examples in the batches of either.
        runs: timed ones.
    """
    times = alternate({"base": base.run, "one": one.run}, runs, device=one.device)
    mine = times["one"]
    gains = [slow / fast for slow, fast in zip(times["base"].seconds, mine.seconds, strict=True)]
    return {
        "examples": count,
        "runs": runs,
        "examples_per_s": round(count / mine.median, 2),
        **{
            name: round(getattr(mine, name.removesuffix("_s")), 5)
            for name in ("median_s", "p20_s", "p80_s")
        },
        "x_unreduced": round(statistics.median(gains), 4),
        "x_low": round(float(np.quantile(gains, 0.2)), 4),
        "x_high": round(float(np.quantile(gains, 0.8)), 4),
        "overhead": round(_overhead(one), 4),
    }


def _overhead(eval_model: EvalModel) -> float:
    """Share of the time spent on choosing and reducing tokens."""
    share = overhead_share(eval_model.model, eval_model.run, eval_model.device, runs=3)
    return (
        share + prefill_shares(eval_model.model, eval_model.run, eval_model.device).selection
        if is_generative(eval_model.model)
        else share
    )


def _peak(eval_model: EvalModel) -> int:
    """Peak activation bytes of the first batch."""

    def call() -> Any:
        with torch.inference_mode():
            return eval_model.model(**eval_model.batches[0])

    return peak_activations(call, eval_model.device)


def macs(one: EvalModel, count: int) -> tuple[int, int]:
    """Mean multiply-accumulates per example, padding included, and the towers' part of them."""
    total_macs = towers = 0
    for batch in one.batches:
        with torch.inference_mode():
            one.model(**batch)
        rows = len(batch["input_ids"])
        once = rows // batch.get(
            "texts_per_image", 1
        )  # which only models take that see each image once
        parts = {
            name: value * (once if name in IMAGE_PARTS else rows)
            for name, value in last_forward_parts(one.model).items()
        }
        total_macs += sum(parts.values())
        towers += sum(parts.get(name, 0) for name in TOWERS)
    return round(total_macs / count), round(towers / count)


def _tokens(eval_model: EvalModel) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of (text, image) tokens over the rows: [layers + 1, 2] each.

    Before the first layer and after every one, without padding.
    """
    counts: defaultdict[int, list[Tensor]] = defaultdict(list)
    depth = 0
    for batch in eval_model.batches:
        with pumer.trace(eval_model.model) as steps, torch.inference_mode():
            eval_model.model(**batch)
        patch = pumer.active(eval_model.model)
        assert patch is not None
        depth = len(patch.lengths) - 1
        several = batch["pixel_values"].ndim == 5 and not is_generative(eval_model.model)
        passes = batch["pixel_values"].shape[1] if several else 1
        steps_by_layer = {
            layer: [step for step in steps if step.layer == layer]
            for layer in range(EMBEDDINGS, depth)
        }
        now = [_entry(eval_model.model, batch, image_index) for image_index in range(passes)]
        for layer in range(EMBEDDINGS, depth):
            now = [_left(step) for step in steps_by_layer[layer]] or now
            counts[layer] += now
    layers = [torch.cat(counts[layer]).double() for layer in range(EMBEDDINGS, depth)]
    mean = torch.stack([layer.mean(0) for layer in layers])
    spread = torch.stack([layer.std(0, correction=0) for layer in layers])
    return mean.cpu().numpy(), spread.cpu().numpy()


def _entry(model: Any, batch: dict[str, Any], image_index: int) -> Tensor:
    """(text, image) tokens of every row at the entry, of its image with this number: int64 [B,
    2]."""
    text = batch["attention_mask"].sum(1)
    if is_generative(model):  # a prompt, which holds both
        image = (batch["input_ids"] == model.config.image_token_id).sum(1)
        return torch.stack([text - image, image], dim=1)
    mask, patch_size = batch["pixel_mask"], vision_of(model.config).patch_size
    mask = mask if mask.ndim == 3 else mask[:, image_index]
    patches = mask[:, ::patch_size, ::patch_size].flatten(1).sum(1) + 1
    return torch.stack([text, patches.repeat_interleave(len(text) // len(patches))], dim=1)


def _left(step: ReductionStep) -> Tensor:
    """(text, image) tokens that a reduction left in every row: int64 [B, 2]."""
    plan, slots = step.plan, step.plan.slots
    filled = []
    for part in (plan.slot_BN[:, : step.text], plan.slot_BN[:, step.text :]):
        used = torch.zeros(len(part), slots + 1, dtype=torch.bool, device=part.device)
        used.scatter_(1, torch.where(part < 0, slots, part), True)
        filled.append((used[:, :slots] & (plan.mask_BK > 0)).sum(1))
    return torch.stack(filled, dim=1)
