"""Attention backends, attention maps and what is said of the places that are left."""

import calls
import matrix
import oracle_llm
import pytest
import tiny
import tiny_llm
import torch
import transformers
from calls import PLACES, answer, near
from tiny_llm import IMAGE

import pumer
from pumer import DivPrune, FasterVLM, FastV, PruMerge, PuMer, Random, VisionZip

READ_THE_TOWER = {
    "visionzip": VisionZip(keep=0.5),
    "fastervlm": FasterVLM(keep=0.5),
    "prumerge": PruMerge(keep=0.5),
}


# What torch deprecates inside its own flex attention is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

# --- vision towers ---


def with_tower_attention(backend):
    model = tiny_llm.model("llava")
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": backend})
    return model


@pytest.mark.parametrize("name", READ_THE_TOWER)
def test_a_tower_whose_attention_shows_no_queries_is_refused(name):
    model, batch = with_tower_attention("flex_attention"), tiny_llm.batch("llava")
    expected = answer(model, batch)
    with pytest.raises(ValueError, match=r"(?i)vision.*flex_attention|flex_attention.*vision"):
        pumer.apply(model, READ_THE_TOWER[name])
    assert pumer.active(model) is None
    near(answer(model, batch), expected)


@pytest.mark.parametrize("place", PLACES)
def test_that_tower_serves_reducers_that_do_not_read_it(place):
    model, batch = with_tower_attention("flex_attention"), tiny_llm.batch("llava")
    expected = answer(pumer.apply(tiny_llm.model("llava"), PLACES[place]), batch)
    near(answer(pumer.apply(model, PLACES[place]), batch), expected, 1e-3)


def answer_with(model, part, batch):
    """After a change of backend, which may be refused itself."""
    model.set_attn_implementation({part: "flex_attention"})
    return answer(model, batch)


@pytest.mark.parametrize("name", READ_THE_TOWER)
def test_a_tower_backend_that_changes_after_apply(name):
    model, batch = tiny_llm.model("llava"), tiny_llm.batch("llava")
    pumer.apply(model, READ_THE_TOWER[name])
    expected = answer(model, batch)
    with pytest.raises(ValueError, match="flex_attention"):
        answer_with(model, "vision_config", batch)
    model.set_attn_implementation({"vision_config": "eager"})
    near(answer(model, batch), expected)


@pytest.mark.parametrize("reducer", [FastV(keep=0.5, layer=1), PuMer(0.2, 0.3, 0.2, layers=(0,))])
def test_a_language_backend_that_changes_after_apply(reducer):
    model, batch = tiny_llm.model("llava"), tiny_llm.batch("llava")
    pumer.apply(model, reducer)
    expected = answer(model, batch)
    with pytest.raises(ValueError, match="flex_attention"):
        answer_with(model, "text_config", batch)
    model.set_attn_implementation({"text_config": "eager"})
    near(answer(model, batch), expected)
    pumer.remove(model)
    stock = tiny_llm.model("llava", "eager")
    near(answer(model, batch), answer(stock, batch))


# --- sliding windows ---


def with_window(text):
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**tiny_llm.CLIP),
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=16,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def windowed(kind):
    if kind == "mistral":
        return with_window(transformers.MistralConfig(**tiny_llm.TEXT, sliding_window=16))
    text = transformers.Qwen2Config(
        **tiny_llm.TEXT, use_sliding_window=True, sliding_window=16, max_window_layers=1
    )
    return with_window(text)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
@pytest.mark.parametrize("place", PLACES)
def test_a_sliding_window_under_flash_attention_is_refused(kind, place, monkeypatch):
    """It counts the tokens that are left where the model was trained to count positions."""
    model, batch = windowed(kind), tiny_llm.batch("llava", ((7, "i", 6),))
    calls.use_flash(monkeypatch, model.model.language_model)
    stock = answer(model, batch)
    with pytest.raises(ValueError, match="window"):
        pumer.apply(model, PLACES[place])
    near(answer(model, batch), stock)


@pytest.mark.parametrize("kind", ["mistral", "qwen2"])
def test_a_sliding_window_goes_by_positions_elsewhere(kind):
    """Under sdpa, dropping tokens is masking them, window and all."""
    model, batch = windowed(kind), tiny_llm.batch("llava", ((7, "i", 6),))
    with pumer.reduced(model, Random(prune=0.5)):
        marks, reduced = oracle_llm.kept(model, batch), answer(model, batch)
    with oracle_llm.masked(model, marks):
        near(reduced, answer(model, batch))


# --- maps, states and places ---


def outputs(model, batch):
    with torch.no_grad():
        return model(**batch, output_attentions=True, output_hidden_states=True, use_cache=False)


DROPPING = {
    "before": DivPrune(keep=0.25),
    "inside": FastV(keep=0.5, layer=2),
    "twice": Random(prune=0.4, layers=(-1, 1)),
}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "internvl"])
@pytest.mark.parametrize("name", [*DROPPING, "merging"])
def test_maps_and_states_of_a_layer_have_one_length(family, name):
    model = tiny_llm.model(family, "eager")
    batch = tiny_llm.batch(family, ((4, "i", 6), (2, "i", 3)))
    with pumer.reduced(model, (DROPPING | PLACES)[name]):
        out = outputs(model, batch)
    assert len(out.attentions) == tiny_llm.LAYERS
    assert len(out.hidden_states) == tiny_llm.LAYERS + 1
    for maps, states in zip(out.attentions, out.hidden_states, strict=False):
        assert maps.shape[-2] == maps.shape[-1] == states.shape[1]


@pytest.mark.parametrize("name", DROPPING)
def test_kept_places_say_which_column_of_a_map_is_which(name):
    """By them a heat map finds the image: those columns are the stock model's, the dropped ones
    hidden."""
    model, batch = tiny_llm.model("llava", "eager"), tiny_llm.batch("llava", ((3, "i", 5),))
    length = batch["input_ids"].shape[1]
    with pumer.reduced(model, DROPPING[name]):
        out = outputs(model, batch)
        kept = calls.kept_places(model)
        patches = calls.kept_patches(model, batch["input_ids"])
        marks = oracle_llm.kept(model, batch)
    assert kept == marks[tiny_llm.LAYERS - 1][0].nonzero().flatten().tolist()
    assert 0 < len(patches) < 16
    with oracle_llm.masked(model, marks):
        expected = outputs(model, batch).attentions[-1][0]
    maps = out.attentions[-1][0]
    if maps.shape[-1] == length:  # in the length of the prompt, nobody attends to what is gone
        gone = [place for place in range(length) if place not in kept]
        assert not maps[:, :, gone].any()
        maps = maps[:, kept][..., kept]
    near(maps, expected[:, kept][..., kept])
    near(maps.sum(-1), torch.ones(maps.shape[:2]))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", tiny_llm.BUILDERS)
def test_kept_places_of_a_padded_batch(family, side):
    """Ascending, every word that is real, as many patches as the cache holds; -1 fills shorter
    rows."""
    model = tiny_llm.model(family)
    batch = tiny_llm.batch(family, ((4, "i", 6), (2, "i", 3), (5,)), side)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    is_patch = ids == IMAGE
    for reducer in (*DROPPING.values(), pumer.NoVision()):
        with pumer.reduced(model, reducer):
            answer(model, batch)
            kept_BK = pumer.kept(model)
            marks = oracle_llm.kept(model, batch)[tiny_llm.LAYERS - 1] & mask
        assert kept_BK.dtype == torch.int64
        for row, places in enumerate(kept_BK.tolist()):
            real = [place for place in places if place >= 0]
            assert real == sorted(set(real))
            real = [place for place in real if mask[row, place]]
            assert real == marks[row].nonzero().flatten().tolist()
            assert set((mask[row] & ~is_patch[row]).nonzero().flatten().tolist()) <= set(real)


def test_kept_places_of_merged_tokens():
    """Each token that is left has a place of its own, that of one of those it stands for."""
    model, batch = tiny_llm.model("llava"), tiny_llm.batch("llava", ((4, "i", 6),))
    with pumer.reduced(model, PLACES["merging"]):
        answer(model, batch)
        kept = calls.kept_places(model)
        text, image = pumer.active(model).lengths[-1]
        assert len(kept) == len(set(kept))
        assert sum(batch["input_ids"][0, place] == IMAGE for place in kept) == image
        assert len(kept) == text + image


def test_kept_places_after_generate_are_those_of_the_prompt():
    model, batch = tiny_llm.model("llava"), tiny_llm.batch("llava", ((4, "i", 6), (2, "i", 3)))
    with pumer.reduced(model, PLACES["inside"]):
        answer(model, batch)
        prefill = [calls.kept_places(model, row) for row in range(2)]
        calls.generated(model, batch)
        assert [calls.kept_places(model, row) for row in range(2)] == prefill


def test_kept_needs_a_reducer_and_a_call():
    model = tiny_llm.model("llava")
    with pytest.raises(ValueError, match="apply"):
        pumer.kept(model)
    pumer.apply(model, DROPPING["before"])
    with pytest.raises(ValueError, match=r"call|forward"):
        pumer.kept(model)


@pytest.mark.parametrize("name", ["pumer", "tome", "divprune", "uniform", "no-vision", "none"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_kept_places_of_an_encoder(family, name):
    """Text as given, then [CLS] and the patches in raster order; -1 at padding and empty slots."""
    model, batch = calls.model(family), calls.inputs(family, rows=4)
    length = batch["input_ids"].shape[1]
    with pumer.reduced(model, matrix.REDUCERS[name]), pumer.trace(model) as steps:
        answer(model, batch)
        kept_BK = pumer.kept(model)
        text, image = pumer.active(model).lengths[-1]
        rows, columns = pumer.active(model).entry[2]
    assert kept_BK.shape == (4, text + image)
    for row in range(4):
        words = [place for place in kept_BK[row, :text].tolist() if place >= 0]
        patches = [place for place in kept_BK[row, text:].tolist() if place >= 0]
        assert len({*words, *patches}) == len(words) + len(patches)
        real = int(batch["attention_mask"][row].sum())
        assert words[0] == 0
        assert all(place < real for place in words)
        if name not in ("pumer",):
            assert words == list(range(real))
        if name == "no-vision":
            assert patches == []
            continue
        assert patches[0] == length
        assert all(length < place <= length + rows * columns for place in patches[1:])
        if family == "ViLT":  # they lie inside the picture, whose padding is right and below
            mask = batch["pixel_mask"][row, ::16, ::16].bool()
            assert all(mask.flatten()[place - length - 1] for place in patches[1:])
    if name == "none":
        assert steps == []
        assert (kept_BK[:, text:] >= 0).sum() == (
            4 + mask_sum(batch) if family == "ViLT" else 4 * 37
        )


def mask_sum(batch):
    return int(batch["pixel_mask"][:, ::16, ::16].sum())
