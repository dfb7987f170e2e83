"""METER's processor, and the image transforms beside its models: with Pillow alone."""

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from transformers import AutoProcessor

import pumer
from pumer.lab.data.text import train_tokenizer
from pumer.lab.data.transforms import Crop, build_transform, clip_square, load_transform
from pumer.models.meter import MeterProcessor
from pumer.models.meter.processing import square_images

QUESTIONS = ["is the cup red ?", "how many dogs are there ?"]


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 111, 3), dtype=np.uint8))


@pytest.fixture
def processor():
    return MeterProcessor(square_images(96), train_tokenizer(QUESTIONS, 60))


def test_a_saved_processor_comes_back(processor, picture, tmp_path):
    pumer.save(tiny.model("MeterForQuestionAnswering"), tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    for loaded in (
        MeterProcessor.from_pretrained(tmp_path / "model"),
        AutoProcessor.from_pretrained(tmp_path / "model"),
    ):
        assert type(loaded) is MeterProcessor
        inputs = loaded(
            text=QUESTIONS, images=[picture, picture], padding=True, return_tensors="pt"
        )
        expected = processor(
            text=QUESTIONS, images=[picture, picture], padding=True, return_tensors="pt"
        )
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
        assert inputs["pixel_values"].shape == (2, 3, 96, 96)
    assert load_transform(tmp_path / "model") == clip_square(96)


def test_pictures_are_squared_as_by_our_transform(processor, picture):
    pixels = processor.image_processor(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, clip_square(96)(picture), rtol=0, atol=1e-6)


def test_a_model_answers_what_its_processor_gives(processor, picture):
    inputs = processor(text=QUESTIONS, images=[picture, picture], padding=True, return_tensors="pt")
    model = tiny.model("MeterForQuestionAnswering")
    model.resize_token_embeddings(len(processor.tokenizer))
    inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    assert model(**inputs).logits.shape == (2, 7)


# --- transforms beside a model ---


def test_the_shorter_side_is_kept_whole(picture):
    assert Crop(35)(picture).shape == (3, 35, 35)
    across = Image.fromarray(np.asarray(picture).transpose(1, 0, 2))
    # Pillow rounds between the two directions.
    torch.testing.assert_close(
        Crop(35)(across), Crop(35)(picture).transpose(1, 2), rtol=0, atol=0.05
    )
    assert build_transform({"kind": "crop", "size": 35}) == Crop(35)
    with pytest.raises(ValueError, match="size is 0"):
        Crop(0)


def test_a_folder_without_a_transform(tmp_path):
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        load_transform(tmp_path)
