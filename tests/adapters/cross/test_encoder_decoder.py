"""What holds for every family with an encoder of words and image tokens, and a decoder."""

import inspect
from contextlib import ExitStack, contextmanager

import pytest
import tiny_cross
import tiny_joint
import torch
from tiny_cross import changed, generate, logits
from tiny_llm import near

import pumer
from pumer import PuMer, Random, Uniform
from pumer.adapters import find
from pumer.adapters.cross.reader import bind
from pumer.reducers import CDPruner, DivPrune, Energy, FastV

PRUNING = {
    "before": (-1, DivPrune(keep=0.5)),
    "inside": (1, Uniform(prune=0.5, layers=(1,))),
    "by attention": (0, FastV(keep=0.5, layer=1)),
}
MERGING = PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(0, 1))


@pytest.fixture(scope="module", params=tiny_joint.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_cross.model(family, tiny_joint.FAMILIES)


def batch(family, rows=None):
    return tiny_cross.batch(family, rows, tiny_joint.FAMILIES)


@contextmanager
def masked(model, keep_BS, after):
    """A stock model whose encoder hides the other tokens behind a layer, and the decoder too."""
    adapter = find(model)

    def hide(module, args, kwargs):
        kwargs = bind(inspect.signature(module.forward), args, kwargs)
        name = "attention_mask" if "attention_mask" in kwargs and module is not writer else MASK
        mask, keep = kwargs.get(name), keep_BS
        rows = len(kwargs["encoder_hidden_states" if module is writer else "hidden_states"])
        keep = keep.repeat_interleave(rows // len(keep), 0)
        if module is writer:
            return (), kwargs | {name: keep.long() if mask is None else mask * keep}
        keep = keep[:, None, None]
        if mask is not None and mask.is_floating_point():
            return (), kwargs | {name: mask.masked_fill(~keep, torch.finfo(mask.dtype).min)}
        return (), kwargs | {name: keep if mask is None else mask & keep}

    MASK, writer = "encoder_attention_mask", adapter.writer(model)
    with ExitStack() as stack:
        for module in (*adapter.layers(model)[after + 1 :], writer):
            stack.callback(module.register_forward_pre_hook(hide, with_kwargs=True).remove)
        yield


def marks(model, length):
    """Which tokens of the prompts were left in the last call, bool [B,S]."""
    kept_BK = pumer.kept(model)
    marks_BS = torch.zeros(len(kept_BK), length + 1, dtype=torch.bool)
    return marks_BS.scatter(1, kept_BK.where(kept_BK >= 0, length), True)[:, :length]


def test_reducing_nothing_changes_nothing(model, family):
    inputs, before = batch(family), changed(model)
    stock = logits(model, inputs)
    with pumer.reduced(model, Uniform(prune=0, layers=(-1, 1))):
        near(logits(model, inputs), stock)
        assert pumer.report(model).active
    assert torch.equal(logits(model, inputs), stock)  # and nothing is left behind
    assert changed(model) == before


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", PRUNING)
def test_dropping_is_masking(model, family, name, beams):
    inputs, (layer, reducer) = batch(family), PRUNING[name]
    stock = generate(model, inputs, num_beams=beams)
    with pumer.reduced(model, reducer):
        reduced = generate(model, inputs, num_beams=beams)
        assert pumer.report(model).active
        keep_BS = marks(model, inputs["input_ids"].shape[1])
    with masked(model, keep_BS, layer):
        expected = generate(model, inputs, num_beams=beams)
    assert reduced.sequences.tolist() == expected.sequences.tolist()
    for got, wanted in zip(reduced.logits, expected.logits, strict=True):
        near(got, wanted)
    assert (reduced.logits[0] - stock.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize("reducer", [DivPrune(keep=3), MERGING, CDPruner(keep=0.5), Energy()])
def test_a_row_of_a_batch_is_the_sample_alone(model, family, reducer):
    with pumer.reduced(model, reducer):
        together = logits(model, batch(family))
        for row in range(3):
            near(together[row : row + 1], logits(model, batch(family, [row])))


def test_a_sample_without_images_is_left_alone(model, family):
    stock = logits(model, batch(family))
    with pumer.reduced(model, MERGING):
        near(logits(model, batch(family))[2], stock[2])


def test_labels_are_those_of_the_decoder(model, family):
    inputs = batch(family)
    labels = inputs.pop("decoder_input_ids")[:, :2].contiguous()
    with pumer.reduced(model, FastV(keep=0.5, layer=1)), torch.no_grad():
        assert model(**inputs, labels=labels).loss.isfinite()


def test_an_encoded_prompt_is_known_again(model, family):
    """As `encoder_outputs`, outside of `generate`."""
    inputs = batch(family)
    with pumer.reduced(model, Random(prune=0.5)), torch.no_grad():
        first = model(**inputs)
        adapter = find(model)
        encoded = []
        handle = adapter.language(model).register_forward_hook(
            lambda module, args, output: encoded.append(output)
        )
        near(model(**inputs).logits, first.logits)
        handle.remove()
        again = {name: inputs[name] for name in ("attention_mask", "decoder_input_ids")}
        near(model(**again, encoder_outputs=encoded[0]).logits, first.logits)


def test_generate_is_a_loop_without_a_cache(model, family):
    inputs = batch(family, [1])
    with pumer.reduced(model, MERGING):
        cached = generate(model, inputs, max_new_tokens=16).sequences
        assert (
            cached.tolist()
            == generate(model, inputs, max_new_tokens=16, use_cache=False).sequences.tolist()
        )


def test_the_report_counts_what_is_saved(model, family):
    with pumer.reduced(model, Random(prune=0.5)):
        logits(model, batch(family, [0]))
        report = pumer.report(model)
    assert report.active
    assert report.macs < report.base_macs
    assert report.parts["language model"] < report.base_parts["language model"]
