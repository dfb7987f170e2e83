"""Several samples in one row, as padding-free collators make them: each as if alone, or refused at
once."""

import calls
import pytest
import tiny_llm
import torch
from tiny_llm import IMAGE

import pumer
from pumer import CDPruner, DivPrune, FastV, PuMer, Random, SparseVLM

REDUCERS = {
    "random": Random(prune=0.5),
    "divprune": DivPrune(keep=0.5),
    "cdpruner": CDPruner(keep=0.5),
    "fastv": FastV(keep=0.5, layer=1),
    "pumer": PuMer(prune=0.4, merge=0, merge_text=0, layers=(0,)),
    "pumer-merging": PuMer(prune=0.2, merge=0.3, merge_text=0.2, layers=(0, 1)),
    "sparsevlm": SparseVLM(keep=(0.5,), layers=(1,)),
}
WORDS = ((5, 5), (4, 7), (0, 3))
"""Before and after the image of each sample."""


def samples(layout=WORDS):
    generator = torch.Generator().manual_seed(4)
    rows = []
    for before, after in layout:
        words = torch.randint(2, 50, (1, before + after), generator=generator)
        ids = torch.cat([words[:, :before], torch.full((1, 16), IMAGE), words[:, before:]], 1)
        rows.append((ids, torch.randn(1, 3, 32, 32, generator=generator)))
    return rows


def packed(rows, lengths_given=False):
    """One row of all samples, whose boundaries are where positions begin anew."""
    lengths = [ids.shape[1] for ids, _ in rows]
    row = {
        "input_ids": torch.cat([ids for ids, _ in rows], 1),
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "pixel_values": torch.cat([pixels for _, pixels in rows]),
        "use_cache": False,
    }
    if lengths_given:
        starts = torch.tensor([0, *lengths]).cumsum(0).int()
        row |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
        row |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return row, [sum(lengths[: number + 1]) - 1 for number in range(len(lengths))]


def check_each_as_if_alone(model, reducer, **how):
    rows = samples()
    row, ends = packed(rows, **how)
    parts = [model.model.vision_tower, model.model.multi_modal_projector]
    parts += list(model.model.language_model.layers)

    def run():
        with torch.no_grad():
            return model(**row).logits[0, ends]

    def alone():
        with torch.no_grad():
            return torch.cat(
                [
                    model(input_ids=ids, pixel_values=pixels, use_cache=False).logits[:, -1]
                    for ids, pixels in rows
                ]
            )

    calls.near(run(), alone())  # the stock model's own answer, which this is about
    with pumer.reduced(model, reducer):
        expected = alone()
        with calls.counted(parts) as ran:
            try:
                logits = run()
            except ValueError as error:
                calls.must_say(error, "packed")
                assert ran == []  # refused before anything is computed
                calls.near(alone(), expected)  # and it goes on
                return
        before, after = calls.image_lengths(model)
        assert after < before
    calls.near(logits, expected)


@pytest.mark.parametrize("name", REDUCERS)
def test_sdpa(name):
    check_each_as_if_alone(tiny_llm.model("llava"), REDUCERS[name])


@pytest.mark.parametrize("name", REDUCERS)
def test_eager(name):
    check_each_as_if_alone(tiny_llm.model("llava", "eager"), REDUCERS[name])


@pytest.mark.parametrize("lengths_given", [False, True], ids=["positions", "cu_seq_lens"])
@pytest.mark.parametrize("name", REDUCERS)
def test_flash(name, lengths_given, monkeypatch):
    model = tiny_llm.model("llava")
    calls.use_flash(monkeypatch, model.model.language_model)
    check_each_as_if_alone(model, REDUCERS[name], lengths_given=lengths_given)


@pytest.mark.parametrize("name", REDUCERS)
def test_gradients_of_a_packed_row(name):
    """Training is where rows are packed: a loss, or the refusal."""
    model = tiny_llm.model("llava").train()
    row, _ = packed(samples())
    with pumer.reduced(model, REDUCERS[name]):
        try:
            model(**row, labels=row["input_ids"]).loss.backward()
        except ValueError as error:
            calls.must_say(error, "packed")
            return
    gradient = model.model.language_model.layers[-1].mlp.up_proj.weight.grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0


def test_positions_that_do_not_restart_are_one_sample():
    """Given as they would be anyway, they change nothing."""
    model = tiny_llm.model("llava")
    (ids, pixels), *_ = samples()
    positions = torch.arange(ids.shape[1])[None]
    for reducer in REDUCERS.values():
        with pumer.reduced(model, reducer), torch.no_grad():
            without = model(input_ids=ids, pixel_values=pixels).logits
            given = model(input_ids=ids, pixel_values=pixels, position_ids=positions).logits
        calls.near(given, without)
