"""Image transforms beside a model: ours and transformers' image processors, pixel for pixel."""

import json
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor

from pumer._shipped import SHIPPED, shipped_models
from pumer.lab.data.images import KeepAspect, Square
from pumer.lab.data.transforms import (
    CLIP_MEAN,
    CLIP_STD,
    Crop,
    Stock,
    build_transform,
    clip_square,
    load_transform,
    save_transform,
)

OTHER = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.9, 0.7, 0.5]}


def noise(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write(folder, settings, name="preprocessor_config.json"):
    (folder / name).write_text(json.dumps(settings))
    return folder


def theirs(folder, image):
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    return processor(image, return_tensors="pt")["pixel_values"][0].float()


# --- what transformers has written ---

SIDES = st.sampled_from([32, 35, 48])
BOXES = st.fixed_dictionaries({"height": SIDES, "width": SIDES})
COMMON = {
    "resample": st.sampled_from([0, 1, 2, 3, 4, 5]),
    "image_mean": st.sampled_from([0.5, [0.5, 0.5, 0.5], [0.1, 0.2, 0.3], list(CLIP_MEAN)]),
    "image_std": st.sampled_from([0.5, [0.5, 0.5, 0.5], [0.9, 0.7, 0.5], list(CLIP_STD)]),
    "rescale_factor": st.sampled_from([1 / 255, 0.01]),
    "do_rescale": st.booleans(),
    "do_normalize": st.booleans(),
    "do_convert_rgb": st.booleans(),
}
VILT = st.fixed_dictionaries(
    {
        "image_processor_type": st.sampled_from(["ViltImageProcessor", "ViltImageProcessorFast"]),
        "size": SIDES | st.fixed_dictionaries({"shortest_edge": SIDES}),
    },
    optional=COMMON
    | {
        "size_divisor": st.sampled_from([4, 8]),
        "do_pad": st.booleans(),
        "do_resize": st.booleans(),
    },
)
CROPPED = st.fixed_dictionaries(
    {
        "image_processor_type": st.sampled_from(["CLIPImageProcessor", "ViTImageProcessor"]),
        "size": SIDES | BOXES | st.fixed_dictionaries({"shortest_edge": SIDES}),
        "crop_size": SIDES | BOXES,
        "do_center_crop": st.just(True),
    },
    optional=COMMON | {"do_resize": st.booleans()},
)
FIXED = st.fixed_dictionaries(
    {
        "image_processor_type": st.sampled_from(["CLIPImageProcessor", "ViTImageProcessor"]),
        "size": BOXES | st.lists(SIDES, min_size=2, max_size=2),
        "do_center_crop": st.just(False),
    },
    optional=COMMON,
)


@given(VILT | CROPPED | FIXED, st.integers(20, 90), st.integers(20, 90), st.booleans())
def test_every_field_counts_as_in_transformers(tmp_path_factory, settings, width, height, nested):
    if settings["image_processor_type"].startswith("ViltImage"):
        settings.setdefault("size_divisor", 8)  # a side of 0 fails there
    folder = tmp_path_factory.mktemp("model")
    if nested:
        write(folder, {"image_processor": settings}, "processor_config.json")
    else:
        write(folder, settings)
    image = noise(width, height)
    transform = load_transform(folder)
    torch.testing.assert_close(transform(image), theirs(folder, image), atol=1e-5, rtol=0)
    save_transform(transform, folder)  # and goes on with the model
    (folder / "processor_config.json").unlink(missing_ok=True)
    assert load_transform(folder) == transform
    torch.testing.assert_close(theirs(folder, image), transform(image), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"size": 384, "size_divisor": 32}, KeepAspect(384)),
        (
            {"size": {"shortest_edge": 384, "longest_edge": 500}},
            KeepAspect(384),
        ),  # ViLT's ignores the longer one
        (
            {"size": 64, "resample": 2, **OTHER},
            KeepAspect(64, None, 32, 2, (0.1, 0.2, 0.3), (0.9, 0.7, 0.5)),
        ),
    ],
)
def test_vilts_processor_is_a_transform_of_ours(tmp_path, settings, expected):
    write(tmp_path, {"feature_extractor_type": "ViltFeatureExtractor", **settings})
    assert load_transform(tmp_path) == expected


def test_a_file_without_a_type_goes_by_the_models_configuration(tmp_path):
    write(tmp_path, {"size": 384, "resample": 3})  # as dandelin/vilt-b32-finetuned-vqa has it
    with pytest.raises(ValueError, match="name its image_processor_type"):
        load_transform(tmp_path)
    write(tmp_path, {"model_type": "vilt"}, "config.json")
    assert load_transform(tmp_path) == KeepAspect(384)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"image_processor_type": "ViltImageProcessor", "size": {"height": 9, "width": 9}},
            "the key `shortest_edge`;",
        ),
        (
            {"image_processor_type": "ViltImageProcessor", "size": {"longest_edge": 9}},
            "the key `shortest_edge`;",
        ),
        (
            {"image_processor_type": "ViltImageProcessor", "image_mean": [0.5]},
            "do not fit each other",
        ),
        ({"image_processor_type": "CLIPImageProcessor", "size": "96"}, "Could not convert size"),
        (
            {"image_processor_type": "CLIPImageProcessor", "size": {"edge": 96}},
            "size must have one of",
        ),
        (
            {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False},
            "keeps the images' aspect ratio",
        ),
        ({"image_processor_type": "LlavaNextImageProcessor"}, r"makes \[\(7, 3, 224, 224\)\]"),
        ({"image_processor_type": "MyImageProcessor"}, "Unrecognized image processor"),
    ],
)
def test_what_cannot_be_done_is_refused_when_it_is_read(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_transform(write(tmp_path, settings))
    assert len(str(caught.value)) < 500
    assert str(tmp_path) in str(caught.value)


def test_an_image_too_thin_for_their_processor_is_named(tmp_path):
    write(tmp_path, {"image_processor_type": "ViltImageProcessor", "size": 64, "do_rescale": False})
    with pytest.raises(ValueError, match="cannot take an image of 2000 x 10 pixels"):
        load_transform(tmp_path)(noise(2000, 10))


def test_damaged_settings(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json cannot be read"):
        load_transform(tmp_path)


# --- what we write ---

OURS = [
    Square(64),
    clip_square(64),
    Crop(64),
    Crop(35),
    KeepAspect(64, multiple=16),
    KeepAspect(64, resample=2, multiple=16, mean=CLIP_MEAN, std=CLIP_STD),
]


@pytest.mark.parametrize("transform", OURS, ids=repr)
def test_transformers_makes_the_same_pixels_of_what_we_save(tmp_path, transform):
    save_transform(transform, tmp_path)
    assert load_transform(tmp_path) == transform
    for size in ((111, 70), (70, 113), (64, 64)):
        torch.testing.assert_close(
            theirs(tmp_path, noise(*size)), transform(noise(*size)), atol=1e-6, rtol=0
        )
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del settings["pumer_transform"]
    assert load_transform(write(tmp_path, settings)) == transform


def test_what_transformers_cannot_do_fails_there(tmp_path):
    save_transform(KeepAspect(64, longer=80, multiple=16), tmp_path)
    with pytest.raises(ValueError, match="shortest_edge"):
        theirs(tmp_path, noise(111, 70))


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_models_processor_makes_our_inputs(name):
    image, folder = noise(111, 70), SHIPPED / name
    inputs = AutoProcessor.from_pretrained(folder)(
        images=image, text="is it red?", return_tensors="pt"
    )
    torch.testing.assert_close(
        inputs["pixel_values"][0], load_transform(folder)(image), atol=1e-6, rtol=0
    )


def test_crop_rounds_the_middle_as_torchvision_does_and_clip_down(tmp_path):
    image = noise(67, 64)  # three columns too many: 2 and 1, not 1 and 2
    pixels = Crop(64, mean=(0, 0, 0), std=(1, 1, 1))(image)
    assert torch.equal(
        (pixels * 255).round(), torch.tensor(np.asarray(image)[:, 2:66]).permute(2, 0, 1).float()
    )
    clip = load_transform(
        write(tmp_path, {"image_processor_type": "CLIPImageProcessor", "size": 64, "crop_size": 64})
    )
    assert isinstance(clip, Stock)
    assert not torch.equal(clip(image), Crop(64)(image))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "round", "size": 3}, "is of kind square or crop or keep_aspect"),
        ({"kind": "square"}, "square needs size"),
        ({"kind": "keep_aspect"}, "keep_aspect needs shorter"),
        ({"kind": "square", "size": "big"}, "image transform square: size is 'big'; expected int"),
        ({"kind": "square", "size": True}, "size is True"),
        (
            {"kind": "crop", "size": 96, "mean": 0.5},
            r"mean is 0\.5; expected tuple\[float, float, float\]",
        ),
        ({"kind": "crop", "size": 96, "std": [1, 1, "x"]}, "std is .*expected tuple"),
        (
            {"kind": "crop", "size": 96, "resample": 9},
            r"resample is 9; expected one of 0 \(nearest\)",
        ),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        build_transform(settings)


# --- thin images ---


@pytest.mark.parametrize("size", [(5000, 1), (3, 65000)])
@pytest.mark.parametrize("kind", ["ours", "clip"])
def test_thin_images_take_no_time(tmp_path, size, kind):
    write(tmp_path, {"image_processor_type": "CLIPImageProcessor"})
    transform = Crop(224) if kind == "ours" else load_transform(tmp_path)
    image = noise(*size)
    start = time.perf_counter()
    assert transform(image).shape == (3, 224, 224)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(("width", "height"), [(40, 2), (2, 41), (50, 3), (49, 3)])
def test_the_middle_of_a_thin_image_is_what_it_was(width, height):
    gradient = np.linspace(0, 255, width * height).reshape(height, width).astype(np.uint8)
    image = Image.fromarray(gradient).convert("RGB")
    shorter = min(image.size)
    resized = tuple(32 * side // shorter for side in image.size)
    whole = image.resize(resized, Image.Resampling.BICUBIC)
    left, top = (round((side - 32) / 2) for side in whole.size)
    expected = clip_square(32)(whole.crop((left, top, left + 32, top + 32)))
    torch.testing.assert_close(Crop(32)(image), expected, atol=0.2, rtol=0)
