"""METER's published outputs, of the PuMer code and of the original: whole models, gradients, the
training form.

Function by function: test_parity.py.
"""

import json

import pytest
import torch
from safetensors.torch import save_file
from test_parity import FUNCTION, MODEL, folder, inputs_of, loss_of, read, same  # noqa: F401  # folder is a fixture

import pumer
from pumer.models.meter import published

NAMES = {"prune": "prune_r", "merge_image": "merge_r"}


def publish(directory, settings, data, case, **changes):
    """Write a case's model in the layout of a released checkpoint."""
    setting = {NAMES.get(name, name): value for name, value in settings["cases"][case].items()}
    setting.pop("token_counts")
    directory.mkdir()
    content = {**settings["config"], **settings["extra"], **setting, **changes}
    (directory / "config.json").write_text(json.dumps(content))
    weights = {
        name.removeprefix("weights."): tensor
        for name, tensor in data.items()
        if name.startswith("weights.")
    }
    save_file(weights, directory / "model.safetensors")
    return directory


class Watch:
    """What passes through the fusion layers, one entry per picture."""

    def __init__(self, model):
        self.model, self.passes = model, []
        fuse, layers = model.meter.fuse, []
        for layer in model.meter.layers:
            layer.register_forward_hook(lambda module, args, output: layers.append(output))

        def watched(*args, **kwargs):
            layers.clear()
            output = fuse(*args, **kwargs)
            counts = [list(pair) for pair in pumer.active(model).lengths[1:]]
            self.passes.append((counts, output, list(layers)))
            return output

        model.meter.fuse = watched


@pytest.mark.parametrize("name", ["vqa2", "nlvr2", "ve", "irtr"])
def test_whole_model(folder, tmp_path, name):  # noqa: F811
    settings, data = read(folder, f"meter_{name}")
    for case in settings["cases"]:
        model = pumer.load_official(publish(tmp_path / case, settings, data, case))
        watch = Watch(model)
        with torch.no_grad():
            logits = model(**inputs_of(data)).logits
        same(logits, data[f"cases.{case}.logits"], case, MODEL)
        counts = [counts for counts, _, _ in watch.passes]
        assert (counts if len(counts) > 1 else counts[0]) == settings["cases"][case][
            "token_counts"
        ], case
        if f"cases.{case}.cls_feats" in data:
            pooled = torch.cat([output.pooler_output for _, output, _ in watch.passes], 1)
            same(pooled, data[f"cases.{case}.cls_feats"], case, MODEL)
        for number, (_, output, layers) in enumerate(watch.passes, 1):
            check_states(
                output,
                layers,
                data,
                f"cases.{case}." + (f"image{number}." if len(watch.passes) > 1 else ""),
            )
        if f"cases.{case}.loss" in data:
            same(
                loss_of(name, logits, data["inputs.labels"]),
                data[f"cases.{case}.loss"][0],
                case,
                MODEL,
            )


def check_states(output, layers, data, prefix):
    """States and text masks after every layer, where stored, and after the last one."""
    for number, (text, image, axis) in enumerate(layers):
        parts = {"text": text, "image": image, "text_mask": axis.mask_BN[:, : axis.text]}
        for part, found in parts.items():
            if f"{prefix}layer{number}.{part}" in data:
                same(
                    found,
                    data[f"{prefix}layer{number}.{part}"],
                    f"{prefix}layer{number}.{part}",
                    MODEL,
                )
    for part, found in (("final_text", output.text_states), ("final_image", output.image_states)):
        if prefix + part in data:
            same(found, data[prefix + part], prefix + part, MODEL)


@pytest.mark.parametrize("case", ["base", "pumer_p0.2_r0.2_t0.2_l0246"])
def test_encoders(folder, tmp_path, case):  # noqa: F811
    settings, data = read(folder, "meter_vqa2")
    if f"cases.{case}.text_encoder_out" not in data:
        pytest.skip("what the encoders give is not in this part of the reference data")
    model = pumer.load_official(publish(tmp_path / case, settings, data, case))
    inputs, meter = inputs_of(data), model.meter
    with torch.no_grad():
        text, _ = meter.encode_text(inputs["input_ids"], inputs["attention_mask"])
        image = meter.encode_image(inputs["pixel_values"]).states_BID
        same(text, meter.text_projection(data[f"cases.{case}.text_encoder_out"]), case)
        same(image, meter.image_projection(data[f"cases.{case}.image_encoder_out"]), case)


@pytest.mark.parametrize("text", ["padded", "full_text"])
@pytest.mark.parametrize("fused", [False, True])
def test_the_original_meter(folder, tmp_path, text, fused):  # noqa: F811
    """Both streams from the old states; stock, and with the adapter's attention."""
    settings, data = read(folder, "meter_vqa2")
    _, expected = read(folder, "original_models")
    model = pumer.load_official(
        publish(tmp_path / "base", settings, data, "base", update="parallel")
    )
    pumer.remove(model)
    if fused:
        pumer.apply(model, pumer.Unreduced())
    case = f"meter_vqa2.{text}"
    inputs = {
        "input_ids": expected[f"{case}.text_ids"],
        "attention_mask": expected[f"{case}.text_masks"],
    }
    with torch.no_grad():
        trunk = model.meter(**inputs, pixel_values=data["inputs.pixel_values"])
        logits = model.classifier(trunk.pooler_output)
    same(logits, expected[f"{case}.logits"], case, MODEL)
    same(trunk.pooler_output, expected[f"{case}.cls_feats"], case, MODEL)
    same(trunk.image_states, expected[f"{case}.image_feats"], case, MODEL)


def test_gradients(folder, tmp_path):  # noqa: F811
    settings, data = read(folder, "meter_vqa2")
    stored = {
        name.removeprefix("grads."): tensor
        for name, tensor in data.items()
        if name.startswith("grads.")
    }
    cases = [
        case for case in settings["cases"] if any(name.startswith(f"{case}.") for name in stored)
    ]
    assert cases
    for case in cases:
        model = pumer.load_official(publish(tmp_path / case, settings, data, case))
        loss_of("vqa2", model(**inputs_of(data)).logits, data["inputs.labels"]).backward()
        gradients = {
            name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            for name, parameter in model.named_parameters()
        }
        gradients = published.LAYOUT.from_ours(gradients, "vqa_classifier")
        for name, expected in stored.items():
            if name.startswith(f"{case}."):
                same(gradients[name.removeprefix(f"{case}.")], expected, name, FUNCTION)


def test_training_form_of_retrieval(folder, tmp_path):  # noqa: F811
    """Of the two texts of an image the first is its own; every image goes through its tower
    once."""
    settings, data = read(folder, "meter_irtr")
    inputs = inputs_of(data)
    both = {
        name: torch.stack([inputs[name], inputs[name].roll(1, 0)], 1).flatten(0, 1)
        for name in ("input_ids", "attention_mask")
    }
    matches = torch.tensor([1, 0] * len(inputs["pixel_values"]))
    for case in settings["cases"]:
        model = pumer.load_official(publish(tmp_path / case, settings, data, case))
        with torch.no_grad():
            output = model(**both, pixel_values=inputs["pixel_values"], texts_per_image=2)
        same(output.logits, data[f"train5d.{case}.logits"], case, MODEL)
        ranks = torch.nn.functional.cross_entropy(
            output.logits.view(-1, 2), torch.zeros(3, dtype=torch.long)
        )
        same(ranks, data[f"train5d.{case}.rank_loss"][0], case, MODEL)
        matching = torch.nn.functional.cross_entropy(output.itm_logits, matches)
        same(matching, data[f"train5d.{case}.itm_loss"][0], case, MODEL)
