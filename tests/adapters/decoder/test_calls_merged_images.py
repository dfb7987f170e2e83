"""Models that put images among the words themselves before the module that could be reduced is
called."""

import warnings

import calls
import pytest
import tiny_llm
import torch
import transformers

import pumer
from pumer import DivPrune, FastV, PuMer

REDUCERS = {
    "before": DivPrune(keep=0.25),
    "inside": FastV(keep=0.5, layer=1),
    "merging": PuMer(0.2, 0.3, 0.2, layers=(0, 1)),
}


def colqwen():
    vision = tiny_llm.QWEN_VISION | {"embed_dim": 24, "hidden_size": 32}
    vlm = transformers.Qwen2VLConfig(
        text_config=tiny_llm.QWEN_TEXT | {"bos_token_id": 1},
        vision_config=vision,
        **tiny_llm.QWEN_IDS,
    )
    torch.manual_seed(0)
    config = transformers.ColQwen2Config(vlm_config=vlm, embedding_dim=16)
    ids = torch.tensor([[1, 51, *[tiny_llm.IMAGE] * 24, 52, 7]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 96, 48),
        "image_grid_thw": torch.tensor([[1, 8, 12]]),
    }
    return transformers.ColQwen2ForRetrieval(config).eval(), batch


def colpali():
    vlm = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**tiny_llm.SIGLIP, projection_dim=32),
        text_config=transformers.GemmaConfig(**tiny_llm.TEXT, head_dim=8),
        image_token_id=tiny_llm.IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    torch.manual_seed(0)
    config = transformers.ColPaliConfig(vlm_config=vlm, embedding_dim=16)
    ids = torch.tensor([[*[tiny_llm.IMAGE] * 16, 1, 7, 8]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
        "pixel_values": torch.randn(1, 3, 32, 32),
    }
    model = transformers.ColPaliForRetrieval(config).eval()
    return model, batch


MODELS = {"colqwen": colqwen, "colpali": colpali}


def embeddings(model, batch):
    with torch.no_grad():
        return model(**batch).embeddings


def is_reduced(module):
    """Whether the last call left fewer image tokens than it had."""
    patch = pumer.active(module)
    return bool(patch.lengths) and patch.lengths[-1][1] < patch.entry[1]


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_model_inside_is_reduced_or_it_is_said_that_it_is_not(kind, name):
    model, batch = MODELS[kind]()
    stock = embeddings(model, batch)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        pumer.apply(model.vlm, REDUCERS[name])
        reduced = embeddings(model, batch)
    if is_reduced(model.vlm):
        assert reduced.shape[1] == stock.shape[1] or reduced.shape[1] < stock.shape[1]
        assert reduced.shape != stock.shape or not torch.allclose(reduced, stock, atol=1e-3)
    else:
        assert any("nothing was reduced" in str(warning.message) for warning in said)
        assert torch.equal(reduced, stock)
    pumer.remove(model.vlm)
    assert torch.equal(embeddings(model, batch), stock)


@pytest.mark.parametrize("kind", MODELS)
def test_the_error_of_the_model_around_it_is_honest(kind):
    """It recommends nothing that reduces nothing."""
    model, batch = MODELS[kind]()
    try:
        pumer.apply(model, REDUCERS["before"])
    except ValueError as error:
        if "pass that module instead" in str(error):
            pumer.apply(model.vlm, REDUCERS["before"])
            embeddings(model, batch)
            assert is_reduced(model.vlm)
        else:
            calls.must_say(error, type(model).__name__)
    else:
        embeddings(model, batch)
        assert is_reduced(model)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_embeddings_with_images_in_them_are_said_to_be_unreduced(family):
    """`inputs_embeds` alone: what is an image can no longer be told."""
    model, batch = tiny_llm.model(family), tiny_llm.batch(family)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        pumer.apply(model, REDUCERS["inside"])
        mask = batch["attention_mask"]
        with pytest.warns(UserWarning, match="nothing was reduced"):
            reduced = model(inputs_embeds=embeds, attention_mask=mask).logits
        pumer.remove(model)
        assert torch.equal(reduced, model(inputs_embeds=embeds, attention_mask=mask).logits)


@pytest.mark.parametrize("family", tiny_llm.BUILDERS)
def test_a_prompt_of_words_alone_warns_of_nothing(family, recwarn):
    model, batch = tiny_llm.model(family), tiny_llm.batch(family, ((5,),))
    for reducer in REDUCERS.values():
        with pumer.reduced(model, reducer):
            tiny_llm.logits(model, batch)
            tiny_llm.answer(model, batch)
    assert [str(warning.message) for warning in recwarn if "reduced" in str(warning.message)] == []
