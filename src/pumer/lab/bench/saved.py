"""A saved model on real inputs: stock, fused and reduced, alternating in one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from pumer.api import remove
from pumer.costs.report import last_forward_macs
from pumer.costs.result import GIGA, align
from pumer.lab.bench.llm import Answer
from pumer.lab.bench.llm_results import MEBI
from pumer.lab.bench.memory import peak_activations, weight_bytes
from pumer.lab.bench.run import STOCK, forward, using_threads, variants
from pumer.lab.bench.timing import Timing, alternate
from pumer.lab.progress import Progress, no_progress
from pumer.reducers import Reducer


@dataclass(frozen=True)
class SavedRow:
    """One variant of a model.

    Args:
        variant: "stock", "fused" or a reducer's name.
        timing: of a batch: a forward, or an answer.
        first: of a batch up to the first token of the answer; None for models that classify.
        peak_bytes: of activations, without weights.
        macs: multiply-accumulates per example of a forward; None for stock, where they equal fused.
        cache_bytes: of keys and values after the prompts; 0 without a cache.
    """

    variant: str
    timing: Timing
    first: Timing | None
    peak_bytes: int
    macs: int | None
    cache_bytes: int


@dataclass(frozen=True)
class SavedBench:
    """Results of `bench_saved`; `str` is a table."""

    batch: int
    weight_bytes: int
    rows: tuple[SavedRow, ...]

    def __str__(self) -> str:
        stock = self.rows[0].timing.median
        answers = self.rows[0].first is not None
        head = ["", "ms a batch (20-80 %)", "x stock", "examples/s", "peak MiB", "GFLOPs"]
        lines = [[*head, "ms to 1st token", "cache MiB"] if answers else head]
        for row in self.rows:
            ms = [1000 * seconds for seconds in (row.timing.median, row.timing.p20, row.timing.p80)]
            cells = [
                row.variant,
                f"{ms[0]:.1f} ({ms[1]:.1f}-{ms[2]:.1f})",
                f"{stock / row.timing.median:.2f}",
                f"{self.batch / row.timing.median:.1f}",
                f"{row.peak_bytes / MEBI:.1f}",
                "" if row.macs is None else f"{2 * row.macs / GIGA:.2f}",
            ]
            if row.first is not None:
                cells += [f"{1000 * row.first.median:.1f}", f"{row.cache_bytes / MEBI:.2f}"]
            lines.append(cells)
        weights = (
            f"batches of {self.batch}; weights {self.weight_bytes / MEBI:.1f} MiB, the same for all"
        )
        return "\n".join([*align(lines, left=1), "", weights])


def bench_saved(
    net: nn.Module,
    data: Mapping[str, Tensor],
    reducers: Mapping[str, Reducer],
    *,
    new_tokens: int | None = None,
    runs: int = 9,
    threads: int | None = None,
    progress: Progress = no_progress,
) -> SavedBench:
    """Time a model and measure its memory with each reducer, stock and fused.

    Args:
        net: the model; its own reduction is removed.
        data: its inputs; prompts of one length for generative models.
        reducers: by their names in the rows.
        new_tokens: length of timed answers; None times forwards.
        runs: timed calls of each.
        threads: CPU threads; torch's own choice if not given.
        progress: called with 1 after every round.
    """
    device = next(net.parameters()).device.type
    inputs = dict(data)
    with using_threads(threads):
        nets = variants(remove(net), dict(reducers))
        answers = (
            {name: Answer(variant, inputs, new_tokens, device) for name, variant in nets.items()}
            if new_tokens
            else {}
        )
        calls: dict[str, Callable[[], object]] = {
            name: answers[name] if answers else forward(variant, inputs)
            for name, variant in nets.items()
        }
        timings = alternate(calls, runs, 1, device, progress)
        rows = []
        for name, variant in nets.items():
            once = answers[name].prefill if answers else calls[name]
            peak = peak_activations(once, device)
            first = Timing(tuple(answers[name].prefills[-runs:])) if answers else None
            rows.append(
                SavedRow(
                    name,
                    timings[name],
                    first,
                    peak,
                    None if name == STOCK else last_forward_macs(variant),
                    answers[name].cache_bytes if answers else 0,
                )
            )
        return SavedBench(len(inputs["input_ids"]), weight_bytes(net), tuple(rows))
