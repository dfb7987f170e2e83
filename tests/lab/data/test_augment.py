"""RandAugment: strengths, each operation against its definition, drawing."""

import numpy as np
import pytest
import torch
from PIL import Image

from pumer.lab.data.augment import OPERATIONS, STRONGEST, RandAugment, operate

SIZE = (40, 30)  # width, height


@pytest.fixture
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8))


def pixels(image):
    return np.asarray(image).astype(int)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def test_published_strengths():
    expected = {
        "rotate": 9,
        "posterize": 1.2,
        "solarize": 76.8,
        "solarize_add": 33,
        "color": 0.64,
        "contrast": 0.64,
        "brightness": 0.64,
        "sharpness": 0.64,
        "shear_x": 0.09,
        "shear_y": 0.09,
        "translate_x": 30,
        "translate_y": 30,
    }
    augment = RandAugment(2, 9)
    assert {name: augment.value(name) for name in expected} == pytest.approx(expected)
    assert set(OPERATIONS) == {*expected, "auto_contrast", "equalize"}
    assert RandAugment() == augment


def test_operations_by_their_definition(image):
    before = pixels(image)
    np.testing.assert_array_equal(pixels(operate(image, "posterize", 1.2)), before & 128)
    np.testing.assert_array_equal(
        pixels(operate(image, "solarize", 76.8)), np.where(before < 76.8, before, 255 - before)
    )
    added = np.minimum(before + 33, 255)
    np.testing.assert_array_equal(
        pixels(operate(image, "solarize_add", 33.0)), np.where(added < 128, added, 255 - added)
    )
    np.testing.assert_allclose(pixels(operate(image, "brightness", 0.64)), before * 0.64, atol=1)
    grey = pixels(image.convert("L"))[..., None]
    np.testing.assert_allclose(
        pixels(operate(image, "color", 0.64)), 0.64 * before + 0.36 * grey, atol=1
    )
    np.testing.assert_allclose(
        pixels(operate(image, "contrast", 0.64)), 0.64 * before + 0.36 * grey.mean(), atol=1.5
    )
    sharper, blurred = (
        pixels(operate(image, "sharpness", 1.9)),
        pixels(operate(image, "sharpness", 0.1)),
    )
    assert sharper.std() > before.std() > blurred.std()


def test_tables_that_depend_on_the_picture(image):
    dull = image.point(lambda value: 60 + value // 4)
    stretched = pixels(operate(dull, "auto_contrast", 0.3))
    assert (stretched.min(), stretched.max()) == (0, 255)
    assert pixels(operate(dull, "equalize", 0.3)).std() > 3 * pixels(dull).std()


@pytest.mark.parametrize("way", [1, -1])
def test_moves(image, way):
    before = pixels(image)
    right, down = (pixels(operate(image, name, 7 * way)) for name in ("translate_x", "translate_y"))
    if way < 0:
        before, right, down = before[::-1, ::-1], right[::-1, ::-1], down[::-1, ::-1]
    np.testing.assert_array_equal(right[:, :-7], before[:, 7:])
    np.testing.assert_array_equal(down[:-7], before[7:])
    assert not right[:, -7:].any()
    assert not down[-7:].any()


def test_shears_and_turns():
    upright = np.zeros((41, 41, 3), np.uint8)
    upright[:, 20] = 255
    line = Image.fromarray(upright)
    sheared = pixels(operate(line, "shear_x", 0.1))[..., 0].argmax(1)
    assert sheared[0] - sheared[40] == 4
    level = pixels(operate(line.transpose(Image.Transpose.ROTATE_90), "shear_y", 0.1))[
        ..., 0
    ].argmax(0)
    assert level[0] - level[40] == 4
    turned = pixels(operate(line, "rotate", 90))[..., 0]
    assert turned[20].all()
    assert turned.sum() == 255 * 41


def test_the_same_generator_draws_the_same(image):
    augment = RandAugment()
    first = [augment(image, seeded(3)).tobytes(), augment(image, seeded(4)).tobytes()]
    assert first == [augment(image, seeded(3)).tobytes(), augment(image, seeded(4)).tobytes()]
    assert first[0] != first[1]
    torch.manual_seed(5)
    ours = augment(image).tobytes()
    torch.manual_seed(5)
    assert augment(image).tobytes() == ours


def test_all_operations_are_drawn_with_replacement_and_moves_go_both_ways(image, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "pumer.lab.data.augment.operate", lambda image, *call: drawn.append(call) or image
    )
    augment, generator = RandAugment(), seeded(0)
    for _ in range(600):
        augment(image, generator)
    counts = {name: sum(call[0] == name for call in drawn) for name in OPERATIONS}
    assert len(drawn) == 1200
    assert min(counts.values()) > 50
    assert max(counts.values()) < 130
    assert any(one[0] == other[0] for one, other in zip(drawn[::2], drawn[1::2], strict=True))
    signs = {name: {value > 0 for other, value in drawn if other == name} for name in OPERATIONS}
    both = {name for name, found in signs.items() if len(found) == 2}
    assert both == {"rotate", "shear_x", "shear_y", "translate_x", "translate_y"}


def test_size_and_source_stay(image):
    before = image.tobytes()
    for seed in range(20):
        changed = RandAugment(3, STRONGEST)(image, seeded(seed))
        assert (changed.size, changed.mode) == (SIZE, "RGB")
    assert image.tobytes() == before
    assert RandAugment(0)(image).tobytes() == before


@pytest.mark.parametrize("settings", [(-1, 9), (2, -1), (2, STRONGEST + 1)])
def test_settings_out_of_range(settings):
    with pytest.raises(ValueError, match="strength up to 30"):
        RandAugment(*settings)
