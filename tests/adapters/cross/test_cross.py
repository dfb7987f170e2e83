"""What holds for every family that reads images by cross-attention, in one matrix."""

import copy
import inspect
from contextlib import ExitStack, contextmanager

import pytest
import tiny_cross
import tiny_resamplers  # noqa: F401  # each registers its families
import tiny_writers  # noqa: F401
import torch
import transformers
from tiny_cross import changed, generate, logits
from tiny_llm import near

import pumer
from pumer import Random, Uniform
from pumer.adapters import find
from pumer.adapters.cross.reader import Readers, bind
from pumer.adapters.rebind import METHODS
from pumer.reducers import DivPrune, Energy, FastV
from pumer.reducers.plan import tokens_at

PRUNING = {"random": Random(prune=0.5), "divprune": DivPrune(keep=0.4), "three": DivPrune(keep=3)}
OF_TOWER = [pumer.FasterVLM(keep=0.5, saliency="received"), pumer.HiPrune(keep=0.5, alpha=0.5)]


@pytest.fixture(scope="module", params=tiny_cross.FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_cross.model(family)


@contextmanager
def masked(model, kept_BK):
    """A stock model whose readers are told by their masks that other tokens are not there."""
    assert pumer.active(model) is None
    spec = find(model)

    def hide(reader, args, kwargs):
        kwargs = bind(inspect.signature(reader.forward), args, kwargs)
        states = kwargs.get(spec.memory)
        if not spec.heeds_mask:  # nothing can be hidden: it gets the others alone
            kwargs.pop(spec.mask, None)
            return (), kwargs | {spec.memory: tokens_at(states, kept_BK)}
        mask = kwargs.get(spec.mask)
        if states is None and mask is None:
            return (), kwargs
        rows = len(mask if states is None else states)
        length = mask.shape[-1] if states is None else states.numel() // states.shape[-1] // rows
        if spec.wide_mask and mask is not None:  # the memory may not be in rows of samples yet
            rows, length = mask.shape[0], mask.shape[-1]
        keep = torch.zeros(len(kept_BK), length + 1, dtype=torch.bool)
        keep = keep.scatter(1, kept_BK.where(kept_BK >= 0, length), True)[:, :length]
        keep = keep.repeat_interleave(rows // len(keep), 0)  # beams
        if mask is None and spec.wide_mask:
            mask = torch.ones(rows, 1, 1, length, dtype=torch.bool)
        elif mask is None:
            mask = torch.ones(rows, length, dtype=torch.long)
        gone = ~keep[:, None, None] if spec.wide_mask else ~keep
        nothing = 0
        if mask.is_floating_point() and spec.wide_mask:
            nothing = torch.finfo(mask.dtype).min
        return (), kwargs | {spec.mask: mask.masked_fill(gone, nothing)}

    with ExitStack() as stack:
        for reader in spec.readers(model):
            stack.callback(reader.register_forward_pre_hook(hide, with_kwargs=True).remove)
        yield


def test_reducing_nothing_changes_nothing(model, family):
    inputs, before = tiny_cross.batch(family), changed(model)
    stock = logits(model, inputs)
    with pumer.reduced(model, Uniform(prune=0)):
        near(logits(model, inputs), stock)
        assert pumer.report(model).active
    with pumer.reduced(model, Random(prune=0.5)):
        assert (logits(model, inputs) - stock).abs().max() > 1e-2, "the tokens do not matter"
    assert torch.equal(logits(model, inputs), stock)  # and nothing is left behind
    assert changed(model) == before


@pytest.mark.parametrize("name", PRUNING)
def test_dropping_is_masking(model, family, name):
    inputs = tiny_cross.batch(family)
    with pumer.reduced(model, PRUNING[name]):
        reduced = generate(model, inputs)
        kept = pumer.kept(model)
        assert pumer.report(model).active
    with masked(model, kept):
        expected = generate(model, inputs)
    assert reduced.sequences.tolist() == expected.sequences.tolist()
    for got, wanted in zip(reduced.logits, expected.logits, strict=True):
        near(got, wanted)


def test_beams_and_a_number_of_tokens_that_images_choose(model, family):
    if not find(model).heeds_mask:
        with pytest.raises(ValueError, match="heeds no mask"):
            pumer.apply(model, Energy())
        return
    inputs = tiny_cross.batch(family)
    with pumer.reduced(model, Energy(tau=0.9, least=0.2, most=0.8)):
        reduced = generate(model, inputs, num_beams=2)
        logits(model, inputs)
        kept = pumer.kept(model)
    with masked(model, kept):
        expected = generate(model, inputs, num_beams=2)
    assert reduced.sequences.tolist() == expected.sequences.tolist()


@pytest.mark.parametrize("reducer", [*PRUNING.values(), *OF_TOWER], ids=lambda one: one.name)
def test_a_row_of_a_batch_is_the_sample_alone(model, family, reducer):
    if reducer in OF_TOWER and not find(model).reads_tower:
        with pytest.raises(ValueError, match="cannot be read"):
            pumer.apply(model, reducer)
        return
    with pumer.reduced(model, reducer):
        together = logits(model, tiny_cross.batch(family))
        for row, sample in enumerate(tiny_cross.FAMILIES[family].layout):
            if "i" in sample:
                alone = logits(model, tiny_cross.batch(family, [row]))
                near(together[row : row + 1, -alone.shape[1] :], alone)


def test_generate_is_a_loop_without_a_cache(model, family):
    inputs = tiny_cross.batch(family, [0])
    with pumer.reduced(model, Random(prune=0.5)):
        cached = generate(model, inputs, max_new_tokens=16).sequences
        assert (
            cached.tolist()
            == generate(model, inputs, max_new_tokens=16, use_cache=False).sequences.tolist()
        )


def test_the_report_counts_what_is_saved(model, family):
    with pumer.reduced(model, Random(prune=0.5)):
        logits(model, tiny_cross.batch(family, [0]))
        report = pumer.report(model)
    assert report.active
    assert 0 < report.macs < report.base_macs
    if find(model).decodes:
        assert report.cache_bytes < report.base_cache_bytes
        assert report.decode_macs < report.base_decode_macs


@pytest.mark.parametrize(
    ("reducer", "reason"),
    [
        (FastV(), "before the first layer"),
        (pumer.PuMer(), "before the first layer"),
        (pumer.CDPruner(), "guided by the words"),
        (pumer.MMTok(), "guided by the words"),
        (pumer.NoVision(), "keep some tokens"),
        (pumer.Compose(pumer.ToMe(), DivPrune()), "no vision tower that can be reduced"),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_what_cannot_act_is_refused(model, reducer, reason):
    with pytest.raises(ValueError, match=reason) as error:
        pumer.apply(model, reducer)
    assert pumer.active(model) is None
    assert len(str(error.value).splitlines()) <= 5


@pytest.mark.parametrize("name", ["mllama", "trocr"])
def test_a_cache_of_fixed_length_is_refused(name):
    model, inputs = tiny_cross.model(name), tiny_cross.batch(name)
    with (
        pumer.reduced(model, DivPrune(keep=0.5)),
        pytest.raises(ValueError, match="leave cache_implementation unset"),
    ):
        generate(model, inputs, cache_implementation="static")


@pytest.mark.parametrize("name", ["mllama", "blip2", "donut"])
def test_a_copy_is_reduced_and_no_memory_stays(name):
    model, inputs = tiny_cross.model(name), tiny_cross.batch(name)
    with pumer.reduced(model, DivPrune(keep=0.5)):
        expected = logits(model, inputs)
        again = copy.deepcopy(model)
        near(logits(again, inputs), expected)
        assert pumer.active(again) is not pumer.active(model)
        (reader, *_) = find(model).readers(model)
        (readers,) = {
            value
            for method in vars(reader)[METHODS].values()
            for value in method.bound
            if isinstance(value, Readers)
        }
        assert not readers.remaining._remaining


def test_mllama_takes_all_images_in_one_prefill():
    model, inputs = tiny_cross.model("mllama"), tiny_cross.batch("mllama", [0])
    with pumer.reduced(model, DivPrune(keep=0.5)), torch.no_grad():
        cache = model(**inputs, use_cache=True).cache
        longer = inputs | {"attention_mask": torch.ones(1, 2 * inputs["input_ids"].shape[1])}
        with pytest.raises(ValueError, match="all images of a conversation in one prefill"):
            model(**longer, cache=cache)


def test_a_tower_that_did_not_run_is_asked_for():
    pix2struct = tiny_cross.model("pix2struct")
    inputs = tiny_cross.batch("pix2struct")
    with torch.no_grad():
        encoded = pix2struct.encoder(inputs.pop("flattened_patches"), inputs["attention_mask"])
    with (
        pumer.reduced(pix2struct, OF_TOWER[0]),
        pytest.raises(ValueError, match="did not run in this call"),
    ):
        pix2struct(**inputs, encoder_outputs=encoded)


def test_idefics_without_a_resampler_is_refused():
    model = tiny_cross.model("idefics")
    model.config.use_resampler = False
    with pytest.raises(ValueError, match="use_resampler=False"):
        pumer.apply(model, DivPrune(keep=0.5))


def matching(name, family, **more):
    """A model of the same family without a language model's head, and inputs for it."""
    config, inputs = tiny_cross.model(family).config, tiny_cross.batch(family)
    torch.manual_seed(0)
    model = getattr(transformers, name)(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25, generator=generator)
    return model, inputs | more


@pytest.mark.parametrize(
    ("name", "family", "more", "output"),
    [
        ("MllamaModel", "mllama", {}, "last_hidden_state"),
        ("Idefics2Model", "idefics2", {}, "last_hidden_state"),
        ("IdeficsModel", "idefics", {}, "last_hidden_state"),
        ("Kosmos2Model", "kosmos2", {}, "last_hidden_state"),
        ("Kosmos2_5Model", "kosmos2_5", {}, "last_hidden_state"),
        ("BlipForImageTextRetrieval", "blip", {}, "itm_score"),
        ("BlipForQuestionAnswering", "blip", {"decoder_input_ids": torch.ones(2, 1).long()}, 0),
        ("Blip2Model", "blip2", {}, "logits"),
        ("Blip2ForImageTextRetrieval", "blip2", {}, "logits_per_image"),
        ("InstructBlipModel", "instructblip", {}, 0),
    ],
)
def test_other_classes_of_a_family(name, family, more, output):
    model, inputs = matching(name, family, **more)

    def run():
        with torch.no_grad():
            given = model(**inputs)
        return given[output] if output else given.to_tuple()[output]

    stock = run()
    with pumer.reduced(model, DivPrune(keep=0.4)):
        run()
        patch = pumer.active(model)
        assert pumer.report(model).active
        assert patch.lengths[0][1] < patch.entry[1]
    with pumer.reduced(model, Uniform(prune=0)):
        again = run()
    if isinstance(stock, torch.Tensor):
        near(again, stock)
