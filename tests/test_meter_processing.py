"""METER's processor, and the image transforms beside its models: with Pillow alone."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

import pumer
import tiny
from pumer.data.images import KeepAspect, Square
from pumer.data.text import train_tokenizer
from pumer.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    Crop,
    build_transform,
    clip_square,
    load_transform,
    save_transform,
)
from pumer.models.meter import MeterProcessor
from pumer.models.meter.processing import square_images

SQUARE = {"height": 96, "width": 96}
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
        inputs = loaded(text=QUESTIONS, images=[picture, picture], padding=True, return_tensors="pt")
        expected = processor(text=QUESTIONS, images=[picture, picture], padding=True, return_tensors="pt")
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


@pytest.mark.parametrize("transform", [clip_square(64), Crop(64), Square(64, mean=CLIP_MEAN, std=CLIP_STD)])
def test_transforms_are_found_again_by_us_and_by_transformers(transform, picture, tmp_path):
    save_transform(transform, tmp_path)
    assert load_transform(tmp_path) == transform
    pixels = AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(pixels, transform(picture), rtol=0, atol=1e-6)
    file = tmp_path / "preprocessor_config.json"
    theirs = json.loads(file.read_text())
    del theirs["pumer_transform"]
    file.write_text(json.dumps(theirs))
    assert load_transform(tmp_path) == transform


def test_the_shorter_side_is_kept_whole(picture):
    assert Crop(35)(picture).shape == (3, 35, 35)
    across = Image.fromarray(np.asarray(picture).transpose(1, 0, 2))
    # Pillow rounds between the two directions.
    torch.testing.assert_close(Crop(35)(across), Crop(35)(picture).transpose(1, 2), rtol=0, atol=0.05)
    assert build_transform({"kind": "crop", "size": 35}) == Crop(35)
    with pytest.raises(ValueError, match="size is 0"):
        Crop(0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, Crop(224)),
        ({"size": 96, "crop_size": 96}, Crop(96)),
        ({"size": SQUARE, "do_center_crop": False, "resample": 2}, Square(96, 2, CLIP_MEAN, CLIP_STD)),
        ({"size": SQUARE, "crop_size": SQUARE}, clip_square(96)),
    ],
)
def test_settings_of_clip(tmp_path, settings, expected):
    config = {"image_processor_type": "CLIPImageProcessor", **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    assert load_transform(tmp_path) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": {"height": 96, "width": 64}}, "only equal squares"),
        ({"size": 96, "crop_size": 64}, "only equal squares"),
        ({"size": 96, "do_resize": False}, "only equal squares"),
        ({"size": 96, "do_center_crop": False}, "keeps the pictures' aspect ratio"),
    ],
)
def test_settings_of_clip_that_no_transform_has(tmp_path, settings, message):
    config = {"feature_extractor_type": "CLIPFeatureExtractor", **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_transform(tmp_path)


def test_a_folder_without_a_transform(tmp_path):
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        load_transform(tmp_path)
    with pytest.raises(ValueError, match="take square or crop"):
        save_transform(KeepAspect(64, mean=CLIP_MEAN), tmp_path)
