"""What holds for every family of decoders, in one matrix: the families that the other files do not
go through."""

from functools import partial

import oracle_llm
import pytest
import tiny_llm
import torch
import transformers
from tiny_llm import answer, logits, near

import pumer
from pumer import DivPrune, FoPru, HiPrune, PuMer, Random, SVDPrune, Uniform
from pumer.adapters import find
from pumer.adapters.decoder import kv_cache, prefill
from pumer.reducers import FastV

FAMILIES = [family for family in tiny_llm.FAMILIES if family not in tiny_llm.BUILDERS]
LAYOUT = ((4, "i", 6), (2, "i", 3, "i", 2), (5,))
PRUNING = {
    "random": Random(prune=0.4, layers=(-1, 1)),
    "fastv": FastV(keep=0.5, layer=1),
}
MERGING = PuMer(prune=0.2, merge=0.3, merge_text=0.3, layers=(0, 1))
TOWER = (FoPru(keep=0.5), HiPrune(keep=0.5), SVDPrune(keep=0.5))
"""Those that read attention, that of the middle and the last layer, and features."""
BEFORE = DivPrune(keep=0.5)
"""For families whose tokens leave before the language model alone."""
ROWS = {"hunyuan_vl": [0, 2]}
"""Rows of `LAYOUT` that the stock model answers as if they were alone, where two images in a batch
mislead it."""
ALONE = ("minimax_m3",)
"""Whose stock model is misled by padding at the left: batches of one."""
LOGITS = {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def model(family):
    return tiny_llm.model(family)


@pytest.fixture(scope="module")
def layout(family):
    """The batch that a family is tested with."""
    return LAYOUT[1:2] if family in ALONE else LAYOUT


@pytest.fixture(scope="module")
def rows(family, layout):
    """Its samples that the stock model answers as if they were alone."""
    return ROWS.get(family, range(len(layout)))


@pytest.fixture(scope="module")
def before_only(model):
    return find(model).before_only(model)


def test_reducing_nothing_changes_nothing(model, family, layout, before_only):
    inputs = tiny_llm.batch(family, layout)
    stock, said = logits(model, inputs), answer(model, inputs, max_new_tokens=16)
    with pumer.reduced(model, Uniform(prune=0, layers=(-1,) if before_only else (-1, 1))):
        near(logits(model, inputs), stock)
        assert answer(model, inputs, max_new_tokens=16) == said
    assert torch.equal(logits(model, inputs), stock)  # and nothing is left behind


@pytest.mark.parametrize("name", PRUNING)
def test_dropping_is_masking(model, family, layout, name, before_only):
    inputs = tiny_llm.batch(family, layout)
    if before_only:
        with pytest.raises(ValueError, match="Take a reducer that acts before it") as error:
            pumer.apply(model, PRUNING[name])
        assert before_only in str(error.value)
        return
    with pumer.reduced(model, PRUNING[name]):
        marks = oracle_llm.kept(model, inputs, generating=True)
        reduced = model.generate(**inputs, **(tiny_llm.GREEDY | LOGITS))
        assert pumer.report(model).active
    with oracle_llm.masked(model, marks):
        expected = model.generate(**inputs, **(tiny_llm.GREEDY | LOGITS))
    assert reduced.sequences.tolist() == expected.sequences.tolist()
    for got, wanted in zip(reduced.logits, expected.logits, strict=True):
        near(got, wanted)
    stock = logits(model, inputs)[:2, -1]
    assert (reduced.logits[0][:2] - stock).abs().max() > 1e-2, "the tokens dropped do not matter"
    is_image = inputs["input_ids"] == tiny_llm.IMAGE
    gone = ~marks[max(marks)]
    assert not (gone & ~is_image).any()


def test_dropping_before_is_a_shorter_prompt(model, family, layout, rows, before_only):
    """Of which the stock model, without a cache, says the same."""
    if not before_only:
        pytest.skip("dropping is masking")
    inputs = tiny_llm.batch(family, layout)
    with pumer.reduced(model, BEFORE):
        marks = oracle_llm.kept(model, inputs, generating=True)[0]
        reduced = model.generate(**inputs, **(tiny_llm.GREEDY | LOGITS | {"max_new_tokens": 16}))
        assert pumer.report(model).active
    assert not (~marks & (inputs["input_ids"] != tiny_llm.IMAGE)).any()
    said = reduced.sequences[:, -16:]
    for row in rows:
        alone = tiny_llm.alone(family, layout, row)
        length = alone["input_ids"].shape[1]
        stock = logits(model, alone)[0, -1]
        answered = tiny_llm.continued(family, alone, said[row : row + 1, :-1])
        with oracle_llm.shortened(model, marks[row, -length:]):
            wanted = logits(model, answered, use_cache=False)[0, length - 1 :]
        near(torch.stack(reduced.logits)[:, row], wanted)
        assert torch.equal(tiny_llm.likeliest(wanted), said[row])
        if (alone["input_ids"] == tiny_llm.IMAGE).any():
            changed = (reduced.logits[0][row] - stock).abs().max()
            assert changed > 1e-2, "the tokens dropped do not matter"


def test_a_row_of_a_batch_is_the_sample_alone(model, family, layout, rows, before_only):
    inputs = tiny_llm.batch(family, layout)
    with pumer.reduced(model, BEFORE if before_only else MERGING):
        together, said = logits(model, inputs), answer(model, inputs, max_new_tokens=3)
        for row in rows:
            alone = tiny_llm.alone(family, layout, row)
            length = alone["input_ids"].shape[1]
            near(together[row : row + 1, -length:], logits(model, alone))
            assert answer(model, alone, max_new_tokens=3) == said[row : row + 1]


def test_a_reducer_sees_every_patch_and_no_structure(model, family, layout):
    patches = iter(tiny_llm.patches(family, 3))
    expected = [sum(next(patches) for part in sample if part == "i") for sample in layout]
    with pumer.reduced(model, Random(prune=0.5)), pumer.trace(model) as steps:
        logits(model, tiny_llm.batch(family, layout))
    images = steps[0].prompt.images
    for row, num_patches in enumerate(expected):
        assert sum(count for at, count, _ in images if at == row) == num_patches
    assert all(grid is None or grid[0] * grid[1] == count for _, count, grid in images)


def test_structure_is_no_text(model, family, layout):
    """Ids from 50 on mark images, their rows and their crops; a sample without images counts
    none."""
    inputs = tiny_llm.batch(family, layout)
    with pumer.reduced(model, Random(prune=0.5)):
        logits(model, inputs)
        text, _, _ = pumer.active(model).entry
    ids = inputs["input_ids"][:2]
    assert text == int(((ids != tiny_llm.PAD) & (ids < 50)).sum(1).max())


@pytest.mark.parametrize("reducer", TOWER, ids=lambda reducer: reducer.name)
def test_what_the_tower_knows_of_an_image_is_the_same_in_a_batch(
    model, family, layout, rows, reducer
):
    if not find(model).reads_tower:
        with pytest.raises(ValueError, match="cannot be read"):
            pumer.apply(model, reducer)
        return
    with pumer.reduced(model, reducer):
        together = logits(model, tiny_llm.batch(family, layout))
        for row in rows:
            alone = logits(model, tiny_llm.alone(family, layout, row))
            near(together[row : row + 1, -alone.shape[1] :], alone)


def test_hidden_states_come_in_the_length_of_the_prompt(model, family, before_only):
    inputs = tiny_llm.batch(family, ((4, "i", 6),))
    with torch.no_grad():
        stock = model(**inputs, output_hidden_states=True).hidden_states
        with pumer.reduced(model, BEFORE if before_only else PRUNING["random"]):
            reduced = model(**inputs, output_hidden_states=True).hidden_states
    assert [states.shape for states in reduced] == [states.shape for states in stock]


def test_the_report_counts_what_is_saved(model, family):
    with pumer.reduced(model, Random(prune=0.5)):
        logits(model, tiny_llm.batch(family, ((4, "i", 6),)))
        report = pumer.report(model)
    assert 0 < report.macs < report.base_macs
    assert report.cache_bytes < report.base_cache_bytes


def test_llama_4_scales_queries_by_the_positions_of_the_prompt():
    """Which it counts by what is there: from 8192 on they tell; here from 4 on."""
    model = tiny_llm.model("llama4")
    for layer in model.language_model.model.layers:
        layer.self_attn.floor_scale = 4
    inputs = tiny_llm.batch("llama4", LAYOUT[1:2])
    with pumer.reduced(model, PRUNING["random"]):
        marks, reduced = oracle_llm.kept(model, inputs), logits(model, inputs)
    with oracle_llm.masked(model, marks):
        near(reduced[:, -1], logits(model, inputs)[:, -1])


def test_facts_of_patches_are_in_the_order_of_the_prompt():
    """Where the tower has them by windows: as with one window for all."""
    model, inputs = tiny_llm.model("muse_glimmer"), tiny_llm.batch("muse_glimmer", LAYOUT)
    kept = []
    for window_size in (model.model.vision_tower.window_size, 1000):
        model.model.vision_tower.window_size = window_size
        with pumer.reduced(model, pumer.HiPrune(keep=0.5)), pumer.trace(model) as steps:
            logits(model, inputs)
        kept.append(steps[0].prompt.slot_BS)
    assert torch.equal(*kept)


@pytest.mark.parametrize("name", ["gemma3n", "granite4_vision"])
def test_layers_that_are_computed_again_get_what_they_had(name):
    """Streams side by side, and features that are added between layers."""
    model, inputs = tiny_llm.model(name).train(), tiny_llm.batch(name, LAYOUT)
    gradients = []
    with pumer.reduced(model, PRUNING["random"]):
        for again in (False, True):
            if again:
                model.activation_checkpointing_enable()
            model.zero_grad()
            model(**inputs, use_cache=False).logits.square().mean().backward()
            gradients.append(find(model).language(model).layers[0].mlp.up_proj.weight.grad)
    near(*gradients)


@pytest.mark.parametrize("name", ["gemma4", "granite_docling", "molmo2", "step3p7"])
def test_beams_are_given_what_their_sample_is(name, monkeypatch):
    model, inputs = tiny_llm.model(name), tiny_llm.batch(name, LAYOUT[:2])
    begin, counts = prefill.begin_prefill, []

    def begin_and_note(spec, trunk, state, *arguments):
        begin(spec, trunk, state, *arguments)
        counts.append(state.layout.counts)

    monkeypatch.setattr(prefill, "begin_prefill", begin_and_note)
    with pumer.reduced(model, PRUNING["random"]):
        logits(model, inputs)
        model.generate(**inputs, **(tiny_llm.GREEDY | {"num_beams": 2}))
    alone, beams = counts
    assert beams == (alone[0], alone[0], alone[1], alone[1])


def test_crops_may_become_four_times_as_many_tokens():
    """Where Granite Docling is asked for the fine way."""
    model, inputs = tiny_llm.model("granite_docling"), tiny_llm.batch("granite_docling", LAYOUT[:1])
    ids, fine = inputs["input_ids"][0].tolist(), torch.ones_like(inputs["pixel_attention_mask"])
    ids = [token for each in ids for token in [each] * (4 if each == tiny_llm.IMAGE else 1)]
    more = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids)).long()}
    inputs |= more | {"tile_fine_mask": fine}
    with pumer.reduced(model, pumer.HiPrune(keep=0.5)), pumer.trace(model) as steps:
        logits(model, inputs)
    assert steps[0].prompt.images == ((0, 16, (4, 4)),)


def test_sizes_are_those_of_the_pixels_where_nothing_else_is_said():
    """To Pixtral's tower under LLaVA."""
    model, inputs = tiny_llm.model("pixtral"), tiny_llm.batch("pixtral", LAYOUT[:1])
    del inputs["image_sizes"]
    with pumer.reduced(model, pumer.HiPrune(keep=0.5)), pumer.trace(model) as steps:
        logits(model, inputs)
    assert steps[0].prompt.images == ((0, 6, (2, 3)),)


def test_a_cache_that_keeps_the_prompt_apart_is_for_one_prompt():
    """Unlimited-OCR's, whose layers are found by their type when a cache is made."""
    model, inputs = tiny_llm.model("unlimited_ocr"), tiny_llm.batch("unlimited_ocr", LAYOUT[:1])
    make = partial(transformers.DynamicCache, config=model.config)
    stock = type(make().layers[0])
    with pumer.reduced(model, PRUNING["random"]), torch.no_grad():
        cache = kv_cache.find(model(**inputs, use_cache=True))
        assert type(make().layers[0]) is stock
        beams = {**tiny_llm.GREEDY, "num_beams": 2}
        assert model.generate(**inputs, **beams).shape[1] == inputs["input_ids"].shape[1] + 6
        again = {**inputs, "attention_mask": torch.cat([inputs["attention_mask"]] * 2, 1)}
        with pytest.raises(ValueError, match="a cache of its own"):
            model(**again, **{tiny_llm.CACHE: cache})
        with pytest.raises(ValueError, match="cannot go back"):
            cache.layers[1].crop(-1)
        cache.layers[1].reset()
    assert type(cache.layers[1]) is stock


def test_reductions_come_before_layers_whose_keys_others_read():
    model = tiny_llm.model("gemma4")
    with pytest.raises(ValueError, match="give layers 1 to 2"):
        pumer.apply(model, FastV(keep=0.5, layer=3))
    pumer.remove(pumer.apply(model, FastV(keep=0.5, layer=2)))
