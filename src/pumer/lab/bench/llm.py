"""Generative models, stock and reduced: time of prefill, of further tokens and of the answer, cache
and memory.

Stock transformers already runs fused attention here, so there is no "fused" variant; the reducer
"none" shows the adapter's own cost.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from pumer.adapters import find
from pumer.adapters.base import config_of
from pumer.adapters.decoder import kv_cache
from pumer.api import active
from pumer.costs.report import last_forward_macs
from pumer.lab.bench import llm_models, records
from pumer.lab.bench.llm_results import AnswerBench, AnswerRow
from pumer.lab.bench.memory import peak_activations, weight_bytes
from pumer.lab.bench.overhead import PrefillShares, prefill_shares
from pumer.lab.bench.run import (
    STOCK,
    name_reducers,
    twin,
    using_threads,
)
from pumer.lab.bench.settings import AnswerBenchSettings, resolve_device
from pumer.lab.bench.timing import Timing, alternate, wait
from pumer.lab.progress import Progress, no_progress


def bench_llm(
    settings: AnswerBenchSettings,
    *,
    warmup: int = 1,
    memory: bool = True,
    overhead: bool = True,
    progress: Progress = no_progress,
) -> AnswerBench:
    """Measure a stock vision-language model and each reducer: times of an answer, cache, memory,
    overhead.

    Args:
        settings: what to measure, where, and how often.
        warmup: untimed answers of each variant, at least one.
        memory: measure peak activation memory, in a separate prefill.
        overhead: measure the cost of vision tower and selection, in separate prefills.
        progress: called with 1 after every round of answers.

    Returns:
        The rows; without the requested device, rows that say "not measured".

    Raises:
        ValueError: for unknown names and settings that do not fit.
    """
    if settings.new_tokens < 1:
        raise ValueError(f"an answer has 1 token or more, not {settings.new_tokens}")
    config = llm_models.configure(settings.model, settings.layers, settings.tower_layers)
    named = name_reducers(llm_models.default_reducers(config), settings.reducers)
    device, is_there = resolve_device(settings.device)
    columns = _columns(settings, device)
    with using_threads(settings.threads):
        if not is_there:
            missing = (
                AnswerRow(name, note="not measured, no CUDA device") for name in (STOCK, *named)
            )
            return AnswerBench(columns, records.environment(), tuple(missing))
        dtype = getattr(torch, settings.dtype)
        net = llm_models.build(config, device, dtype, settings.attention)
        data = llm_models.inputs(net, settings.batch, settings.text)
        nets = {STOCK: net, **{name: twin(net, reducer) for name, reducer in named.items()}}
        answers = {
            name: Answer(variant, data, settings.new_tokens, device)
            for name, variant in nets.items()
        }
        answer_times = alternate(answers, settings.runs, max(warmup, 1), device, progress)
        watched = answers if memory else {}
        peaks = {name: peak_activations(answer.prefill, device) for name, answer in watched.items()}
        shares = {
            name: prefill_shares(nets[name], answers[name].prefill, device)
            for name in (named if overhead else ())
        }
        rows = _rows(nets, answers, answer_times, peaks, shares)
        return AnswerBench(columns, records.environment(device), rows, weight_bytes(net))


def _columns(settings: AnswerBenchSettings, device: str) -> dict[str, Any]:
    """The settings as the rows have them."""
    return {
        "model": settings.model,
        "layers": settings.layers or "all",
        "tower_layers": settings.tower_layers or "all",
        "batch": settings.batch,
        "text": settings.text,
        "new_tokens": settings.new_tokens,
        "device": device,
        "dtype": settings.dtype,
        "attention": settings.attention,
        "runs": settings.runs,
    }


class Answer:
    """Greedy decoding of a fixed number of tokens, as a call without arguments.

    Args:
        net: the model.
        data: prompts of one length.
        tokens: number of tokens of the answer.
        device: of the model.
    """

    def __init__(self, net: nn.Module, data: dict[str, Tensor], tokens: int, device: str) -> None:
        self.net, self.data, self.tokens, self.device = net, data, tokens, device
        self.prefills: list[float] = []
        """Seconds up to the first token, of every call."""
        self.cache_bytes = 0
        """Of keys and values after the last prefill."""

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """The answers, int64 [B,tokens]."""
        start = time.perf_counter()
        output = self.prefill()
        generated = [output.logits[:, -1].argmax(-1, keepdim=True)]
        wait(self.device)
        self.prefills.append(time.perf_counter() - start)
        self.cache_bytes = sum(
            layer.keys.nbytes + layer.values.nbytes for layer in kv_cache.find(output).layers
        )
        while len(generated) < self.tokens:
            # The prompts have one length, so no mask is needed.
            output = self.net(
                input_ids=generated[-1],
                use_cache=True,
                **{kv_cache.argument(self.net): kv_cache.find(output)},
            )
            generated.append(output.logits[:, -1].argmax(-1, keepdim=True))
        return torch.cat(generated, 1)

    @torch.inference_mode()
    def prefill(self) -> Any:
        """The model's output for the prompts, with logits of the first answer token only."""
        return self.net(**self.data, use_cache=True, logits_to_keep=1)


def _rows(
    nets: dict[str, nn.Module],
    answers: dict[str, Answer],
    wholes: dict[str, Timing],
    peaks: dict[str, int],
    shares: dict[str, PrefillShares],
) -> tuple[AnswerRow, ...]:
    first = {
        name: Timing(tuple(answers[name].prefills[-len(total.seconds) :]))
        for name, total in wholes.items()
    }
    further = {
        name: _further(total, first[name], answers[name].tokens - 1)
        for name, total in wholes.items()
        if answers[name].tokens > 1
    }
    costs = {name: forward_costs(net, answers[name].data) for name, net in nets.items()}
    rows = []
    for name, total in wholes.items():
        (macs, planned), cached = costs[name], answers[name].cache_bytes
        share = shares.get(name)
        x_prefill, ratio = first[STOCK].median / first[name].median, costs[STOCK][0] / macs
        rows.append(
            AnswerRow(
                variant=name,
                prefill=first[name],
                decode=further.get(name),
                whole=total,
                x_prefill=x_prefill,
                x_decode=further[STOCK].median / further[name].median if further else None,
                x_whole=wholes[STOCK].median / total.median,
                macs=macs,
                flops_ratio=ratio,
                flops_share=None if name == STOCK else x_prefill / ratio,
                cache_bytes=cached,
                planned_bytes=planned,
                cache_share=cached / answers[STOCK].cache_bytes,
                peak_bytes=peaks.get(name),
                memory_share=peaks[name] / peaks[STOCK] if peaks else None,
                tower=share.tower if share else None,
                selection=share.selection if share else None,
            )
        )
    return tuple(rows)


def _further(total: Timing, first: Timing, tokens: int) -> Timing:
    """Seconds of each of the tokens after the first."""
    pairs = zip(total.seconds, first.seconds, strict=True)
    return Timing(tuple((seconds - before) / tokens for seconds, before in pairs))


def forward_costs(net: nn.Module, data: dict[str, Tensor]) -> tuple[int, int]:
    """Multiply-accumulates of a prompt, and bytes of keys and values of the batch, in the last
    forward.

    Unlike `pumer.report` this includes the tokens that a family puts between parts of an image.
    """
    adapter, patch, config = find(net), active(net), config_of(net)
    ids = data["input_ids"]
    image = int((ids[0] == config.image_token_id).sum())
    entry = ids.shape[1] - image, image
    lengths, reducer_macs = [entry] * (adapter.depth(net) + 1), 0
    if patch is not None:
        assert patch.entry is not None
        assert patch.planned is not None
        entry_lengths = patch.entry[:2]
        reducer_macs = last_forward_macs(net) - sum(
            adapter.macs(net, patch.planned, entry_lengths).values()
        )
        num_other = ids.shape[1] - sum(entry_lengths)
        lengths = [(text + num_other, image_left) for text, image_left in patch.planned]
    heads = config.get_text_config().num_key_value_heads
    _, channels = adapter.attention_shape(net)
    width = next(net.parameters()).element_size()
    kept = sum(sum(pair) for pair in lengths[:-1])
    return sum(adapter.macs(net, lengths, entry).values()) + reducer_macs, len(
        ids
    ) * kept * 2 * heads * channels * width
