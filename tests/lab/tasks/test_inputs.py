"""Inputs of one's own for a model: the same as its processor makes, for every way a model takes
them."""

import numpy as np
import pytest
import tiny
import tiny_llm
import torch
from PIL import Image
from tiny_processor import processor_of
from transformers import AutoProcessor, LlavaForConditionalGeneration

import pumer
from pumer._shipped import model_folder
from pumer.lab.data.images import BrokenImageError, Square
from pumer.lab.data.text import train_tokenizer
from pumer.lab.data.transforms import save_transform
from pumer.lab.tasks.inputs import load_inputs

NAME = "scenes-vilt-pumer"
QUESTIONS = ["is there a red circle?", "how many blue squares are there?"]


def noise(seed, width=96, height=70):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def shipped():
    model = pumer.load(model_folder(NAME)).float()
    return model, load_inputs(NAME, model)


def test_they_are_those_of_the_models_processor(shipped, tmp_path):
    model, inputs = shipped
    images = [noise(0), noise(1, 50, 80)]
    images[1].save(tmp_path / "a.png")
    batch = inputs(QUESTIONS, [images[0], tmp_path / "a.png"])
    processor = AutoProcessor.from_pretrained(model_folder(NAME))
    expected = processor(images=images, text=QUESTIONS, padding=True, return_tensors="pt")
    for name, value in expected.items():
        torch.testing.assert_close(batch[name], value, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        model(**batch).logits, model(**expected).logits, atol=1e-4, rtol=1e-4
    )
    one = inputs(QUESTIONS[0], images[0])
    assert model.config.id2label[model(**one).logits.argmax(-1).item()] in {"yes", "no"}


def test_dtype_is_the_models():
    model = pumer.load(model_folder(NAME), dtype=torch.bfloat16)
    assert load_inputs(NAME, model)(QUESTIONS[0], noise(0))["pixel_values"].dtype == torch.bfloat16


def test_two_images_a_text(tmp_path):
    model = tiny.model("ViltForImagesAndTextClassification", vocab_size=60)
    pumer.save(model, tmp_path / "model")
    train_tokenizer(QUESTIONS, 60).save_pretrained(tmp_path / "model")
    save_transform(Square(96), tmp_path / "model")
    inputs = load_inputs(tmp_path / "model", model)
    batch = inputs(QUESTIONS, [[noise(0), noise(1)], [noise(2), noise(3)]])
    assert batch["pixel_values"].shape == (2, 2, 3, 96, 96)
    assert torch.equal(batch["pixel_values"][1, 0], Square(96)(noise(2)))
    assert model(**batch).logits.shape[0] == 2
    with pytest.raises(
        ValueError, match="texts have 1 images; ViltForImagesAndTextClassification takes 2 each"
    ):
        inputs(QUESTIONS[0], noise(0))


def test_a_decoder_by_its_processor(tmp_path):
    model = tiny_llm.model("llava")
    assert isinstance(model, LlavaForConditionalGeneration)
    model.save_pretrained(tmp_path)
    processor_of("llava").save_pretrained(tmp_path)
    batch = load_inputs(tmp_path, model)(["w4 w5", "w6"], [noise(0), noise(1)])
    assert batch["input_ids"].shape[0] == 2
    assert not batch["attention_mask"][1, 0]  # padded on the left
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[0] == 2


def test_what_cannot_be_made(shipped, tmp_path):
    model, inputs = shipped
    with pytest.raises(ValueError, match="2 texts and 1 images: give each text its image"):
        inputs(QUESTIONS, [noise(0)])
    with pytest.raises(
        ValueError, match="texts have 2 images; ViltForQuestionAnswering takes 1 each"
    ):
        inputs(QUESTIONS[0], [noise(0), noise(1)])
    with pytest.raises(ValueError, match="no text"):
        inputs(" ", noise(0))
    with pytest.raises(BrokenImageError, match=r"none\.jpg"):
        inputs(QUESTIONS[0], tmp_path / "none.jpg")
    with pytest.raises(ValueError, match="is not a model folder"):
        load_inputs(tmp_path, model)
    pumer.save(model, tmp_path / "bare")
    with pytest.raises(ValueError, match="has no"):
        load_inputs(tmp_path / "bare", model)
