"""Memory is linear in the words: no tensor of words x patches x heads is made by choosing."""

import calls
import pytest
import tiny
import torch
import transformers
from calls import Largest
from tiny_llm import CLIP, IMAGE, TEXT

import pumer
from pumer import DART, CDPruner, FastV, PuMer, PyramidDrop, SparseVLM, ToMe

REDUCERS = {
    "fastv": FastV(keep=0.5, layer=1),
    "pumer": PuMer(0.5, 0, 0, layers=(0,)),
    "pumer-merging": PuMer(0.3, 0.3, 0.3, layers=(0,)),
    "sparsevlm": SparseVLM(keep=(0.5,), layers=(0,)),
    "cdpruner": CDPruner(keep=0.5),
    "dart": DART(keep=0.5, layer=1),
    "pyramiddrop": PyramidDrop(keep=(0.5,), layers=(0,)),
}


BLOCK = 8 * 2**20
"""Bytes that a block of scores may take however small the model is."""


def largest(model, batch, **more):
    """Bytes of the largest tensor that a forward makes."""
    with torch.no_grad(), Largest() as seen:
        model(**batch, **more)
    return seen.size


@pytest.fixture(scope="module")
def llava():
    wide = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**CLIP | {"image_size": 192}),
        text_config=transformers.LlamaConfig(**TEXT | wide | {"max_position_embeddings": 9999}),
        image_token_id=IMAGE,
    )
    torch.manual_seed(0)
    return transformers.LlavaForConditionalGeneration(config).eval()


def prompt(words):
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(2, 50, (1, words), generator=generator)
    return {
        "input_ids": torch.cat([torch.full((1, 576), IMAGE), text], 1),
        "pixel_values": torch.randn(1, 3, 192, 192, generator=generator),
        "use_cache": False,
        "logits_to_keep": 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", REDUCERS)
def test_3000_words_take_no_larger_tensor_than_the_stock_model(llava, name):
    batch = prompt(3000)
    stock = largest(llava, batch)
    with pumer.reduced(llava, REDUCERS[name]):
        reduced = largest(llava, batch)
        before, after = calls.image_lengths(llava)
    assert after < before == 576
    assert reduced <= stock + BLOCK, f"{reduced / 2**20:.0f} MiB against {stock / 2**20:.0f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pumer", "sparsevlm"])
def test_8000_words(llava, name):
    batch = prompt(8000)
    with pumer.reduced(llava, REDUCERS[name]):
        reduced = largest(llava, batch)
    stock = largest(llava, batch)
    assert reduced <= stock + BLOCK, f"{reduced / 2**20:.0f} MiB against {stock / 2**20:.0f}"


ENCODER_REDUCERS = {
    "pumer": PuMer(0.5, 0, 0, layers=(0,)),
    "pumer-qk": PuMer(0.4, 0.2, 0, layers=(0,), score="qk"),
    "sparsevlm": SparseVLM(keep=(0.5,), layers=(0,)),
    "cdpruner": CDPruner(keep=0.5),
    "fastv": FastV(keep=0.5, layer=1),
    "tome": ToMe(r=100, depth=2),
    "dart": DART(keep=0.5, layer=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODER_REDUCERS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_encoders_with_3000_words(family, name):
    """Against themselves with fused attention and nothing reduced: what choosing adds is what is
    asked."""
    batch = encoder_batch(family, 3000)
    model = encoder(family, 3000)
    with pumer.reduced(model, pumer.Unreduced()):
        fused = largest(model, batch)
    with pumer.reduced(model, ENCODER_REDUCERS[name]):
        reduced = largest(model, batch)
    assert reduced <= fused + BLOCK, f"{reduced / 2**20:.1f} MiB against {fused / 2**20:.1f}"


def encoder(family, words):
    if family == "ViLT":
        return tiny.model(tiny.FAMILIES[family], image_size=384, max_position_embeddings=words)
    if family == "BridgeTower":
        config = tiny.bridgetower_config()
        text = config.text_config.to_dict() | {"max_position_embeddings": words + 2}
        vision = config.vision_config.to_dict() | {"image_size": 384}
        return tiny.model(tiny.FAMILIES[family], text_config=text, vision_config=vision)
    text = tiny.meter_config().text_config.to_dict() | {"max_position_embeddings": words + 2}
    vision = tiny.meter_config().vision_config.to_dict() | {"image_size": 384}
    return tiny.model(tiny.FAMILIES[family], text_config=text, vision_config=vision)


def encoder_batch(family, words):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 50, (1, words), generator=generator)
    pixels = torch.randn(1, 3, 384, 384, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "pixel_mask": torch.ones(1, 384, 384, dtype=torch.long),
    }
