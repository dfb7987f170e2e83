"""METER's model: what its paper says, by slow loops; its configuration, files and heads."""

import pytest
import slow
import tiny
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForVisualQuestionAnswering,
)

from pumer.models.meter import MeterConfig, MeterForImagesAndTextClassification

ORDERS = pytest.mark.parametrize("update", ["parallel", "sequential"])
ANSWERING = "MeterForQuestionAnswering"


def forward(model, inputs, **settings):
    with torch.no_grad():
        return model(**inputs, **settings)


def close(one, other, where=...):
    torch.testing.assert_close(one[where], other[where], rtol=0, atol=1e-5)


@ORDERS
@pytest.mark.parametrize("size", [(96, 96), (64, 112)])
def test_the_model_is_that_of_the_paper(update, size):
    model, inputs = tiny.model("MeterModel", update=update), tiny.batch(ANSWERING, size=size)
    pooled = forward(model, inputs).pooler_output
    for row in range(len(pooled)):
        with torch.no_grad():
            expected, _ = slow.meter(model, tiny.alone(inputs, row))
        close(pooled[row], expected)


def test_the_orders_of_update_differ():
    inputs = tiny.batch(ANSWERING)
    one, other = (
        tiny.logits(tiny.model(ANSWERING, update=update), inputs)
        for update in ("parallel", "sequential")
    )
    assert (one - other).abs().max() > 1e-2
    with pytest.raises(ValueError, match="update is 'parallel' or 'sequential', not 'both'"):
        tiny.meter_config(update="both")


@ORDERS
@pytest.mark.parametrize("kind", tiny.METER)
def test_it_is_saved_and_read(tmp_path, kind, update):
    model, inputs = tiny.model(kind, update=update), tiny.batch(kind)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert MeterConfig.from_dict(model.config.to_dict()).to_dict() == model.config.to_dict()
    assert again.config.update == update
    assert (again.config.text_config.hidden_size, again.config.vision_config.hidden_size) == (
        24,
        48,
    )
    assert torch.equal(tiny.logits(again, inputs), tiny.logits(model, inputs))


@pytest.mark.parametrize(
    ("auto", "kind"),
    [
        (AutoModel, "MeterModel"),
        (AutoModelForVisualQuestionAnswering, ANSWERING),
        (AutoModelForMaskedLM, "MeterForMaskedLM"),
    ],
)
def test_the_auto_classes_know_it(tmp_path, auto, kind):
    tiny.model(kind).save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is MeterConfig
    assert type(auto.from_pretrained(tmp_path)).__name__ == kind


@pytest.mark.parametrize("kind", tiny.METER)
def test_the_stock_kernels_agree(kind):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    fused = tiny.logits(model, inputs)
    model.set_attn_implementation("eager")
    where = inputs["attention_mask"].bool() if fused.ndim == 3 else ...
    close(tiny.logits(model, inputs), fused, where)


def test_two_pictures_are_two_passes_with_a_kind_of_their_own():
    kind = "MeterForImagesAndTextClassification"
    model, inputs = tiny.model(kind), tiny.batch(kind)
    pictures = inputs.pop("pixel_values").unbind(1)
    del inputs["pixel_mask"]
    with torch.no_grad():
        pooled = [
            model.meter(**inputs, pixel_values=picture, image_token_type_idx=number).pooler_output
            for number, picture in enumerate(pictures, 1)
        ]
        close(
            tiny.logits(model, inputs | {"pixel_values": torch.stack(pictures, 1)}),
            model.classifier(torch.cat(pooled, 1)),
        )
    with pytest.raises(
        ValueError, match=r"pixel_values is \[batch, 2, 3, height, width\], not \[4, 3, 96, 96\]"
    ):
        model(**inputs, pixel_values=pictures[0])
    with pytest.raises(ValueError, match="2 images need modality_type_vocab_size 3, not 2"):
        MeterForImagesAndTextClassification(tiny.meter_config(num_images=2))


@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        (ANSWERING, torch.rand(4, 7)),
        ("MeterForImagesAndTextClassification", torch.tensor([0, 1, 1, 0])),
        ("MeterForVisualEntailment", torch.tensor([0, 1, 2, 0])),
        ("MeterForMaskedLM", torch.arange(48).view(4, 12)),
    ],
)
def test_labels_give_a_loss(kind, labels):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    output = forward(model, inputs, labels=labels)
    assert torch.equal(output.logits, tiny.logits(model, inputs))
    if kind == ANSWERING:
        expected = nn.functional.binary_cross_entropy_with_logits(output.logits, labels) * 7
    else:
        expected = nn.functional.cross_entropy(output.logits.flatten(0, -2), labels.flatten())
    close(output.loss, expected)
