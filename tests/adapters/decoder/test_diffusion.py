"""Diffusion Gemma: the prompt is read by one language model, blocks are written by another."""

from contextlib import ExitStack, contextmanager

import oracle_llm
import pytest
import tiny_llm
import tiny_streams
import torch
from tiny_llm import near

import pumer
from pumer.reducers import FastV, Random, Uniform

pytestmark = pytest.mark.filterwarnings(  # by what its generate imports of torch
    "ignore:.*torch.jit.script_method:DeprecationWarning"
)
LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2), (5,))
PRUNING = {"random": Random(prune=0.4, layers=(-1, 1)), "fastv": FastV(keep=0.5, layer=1)}
SETTINGS = {"max_denoising_steps": 3, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llm.with_large_weights(tiny_streams.diffusion_gemma())


def inputs_of(layout, side="left"):
    return tiny_llm.batch("gemma4", layout, side)


def canvas(model, inputs):
    """What it would write over one block, and the cache."""
    block = torch.arange(2, 7).expand(len(inputs["input_ids"]), -1)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1).bool()
    with torch.no_grad():
        output = model(**inputs, decoder_input_ids=block, decoder_attention_mask=mask)
    return output.logits, output.cache


def written(model, inputs, new=15):
    torch.manual_seed(5)
    return model.generate(**inputs, max_new_tokens=new, **SETTINGS).sequences


@contextmanager
def masked(model, cache):
    """Hide tokens that a reduced cache lacks from both language models."""
    marks = {}
    for index, layer in enumerate(cache.layers):
        held = getattr(layer, "_pumer_layout", None)
        if held is None:
            continue
        filled = torch.ones_like(held.position_BK) if held.filled_BK is None else held.filled_BK
        mark = torch.zeros(len(filled), held.covered, dtype=torch.int64)
        marks[index] = mark.scatter_add(1, held.position_BK, filled.long()).bool()

    def hide(keep):
        def before(layer, args, kwargs):
            batch, queries, _ = args[0].shape
            past = kwargs["cache"].get_seq_length()
            held = kwargs["cache"].layers[layer.self_attn.layer_idx]
            _, offset = held.get_mask_sizes(queries)
            visible = torch.nn.functional.pad(keep, (0, past + queries - keep.shape[1]), value=True)
            visible = visible[:, None, None, offset:]
            mask = kwargs["attention_mask"]
            mask = visible.expand(batch, 1, queries, -1) if mask is None else mask & visible
            return args, kwargs | {"attention_mask": mask}

        return before

    with oracle_llm.masked(model, marks), ExitStack() as stack:
        for index, keep in marks.items():
            layer = model.model.decoder.layers[index]
            hook = layer.register_forward_pre_hook(hide(keep), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def test_reducing_nothing_changes_nothing(model):
    inputs = inputs_of(LAYOUT)
    stock, said = canvas(model, inputs)[0], written(model, inputs)
    with pumer.reduced(model, Uniform(prune=0, layers=(-1, 1))):
        near(canvas(model, inputs)[0], stock)
        assert torch.equal(written(model, inputs), said)
    assert torch.equal(canvas(model, inputs)[0], stock)


@pytest.mark.parametrize("name", PRUNING)
@pytest.mark.parametrize("layout", [LAYOUT, LAYOUT[:1]], ids=["padded", "alone"])
def test_dropping_is_masking(model, name, layout):
    inputs = inputs_of(layout)
    stock = canvas(model, inputs)[0]
    with pumer.reduced(model, PRUNING[name]):
        reduced, cache = canvas(model, inputs)
        assert pumer.report(model).active
        said = written(model, inputs, 5)
    with masked(model, cache):
        near(reduced, canvas(model, inputs)[0])
        assert torch.equal(said, written(model, inputs, 5))
    assert not torch.equal(said, written(model, inputs, 5))
    assert (reduced - stock)[0].abs().max() > 1e-2


def test_a_row_of_a_batch_is_the_sample_alone(model):
    merging = pumer.PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(0, 1))
    with pumer.reduced(model, merging):
        together = canvas(model, inputs_of(LAYOUT))[0]
        for row in range(3):
            alone = tiny_llm.alone("gemma4", LAYOUT, row)
            near(together[row : row + 1], canvas(model, alone)[0])


def test_blocks_are_written_behind_a_reduced_prompt(model):
    inputs = inputs_of(LAYOUT)
    with pumer.reduced(model, PRUNING["random"]):
        said = written(model, inputs)
        length = inputs["input_ids"].shape[1]
        assert said.shape == (3, length + 15)
        for row in (0, 1):
            alone = tiny_llm.alone("gemma4", LAYOUT, row)
            assert written(model, alone).shape[1] == alone["input_ids"].shape[1] + 15
