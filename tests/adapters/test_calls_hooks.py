"""Models whose weights accelerate moves about: every answer is that of the same model without
hooks."""

import warnings

import accelerate
import calls
import pytest
import tiny
import tiny_llm
import torch
from calls import PLACES, answer, generated, near

import pumer
from pumer import DynamicViT, SmartTrim

FAMILIES = (*tiny.FAMILIES, *tiny_llm.BUILDERS)
LEARNED = {
    "dynamicvit": DynamicViT(keep=0.5, layers=(0, 2)),
    "smarttrim": SmartTrim(layers=(1,)),
}


# transformers reads parameters outside of the calls that offload hooks bring them in for.
STOCK_REFUSES = {
    (family, how)
    for family in ("idefics3", "BridgeTower")
    for how in ("cpu_offload", "disk_offload")
}
STOCK_REFUSES_TO_GENERATE = {"llava_next", "llava_onevision"}
"""Wholly offloaded models that do not answer unreduced either."""


def offloaded(family, how, folder):
    """A new model of which accelerate holds the weights, in one way or another."""
    model = calls.model(family)
    if how == "cpu_offload":
        return accelerate.cpu_offload(model, execution_device="cpu")
    if how == "disk_offload":
        return accelerate.disk_offload(model, folder, execution_device="cpu")
    # What `device_map="auto"` makes where not everything fits: some parts here, some on disk.
    names = [name for name, _ in model.named_children()]
    device_map = dict.fromkeys(names, "cpu")
    trunk = next(name for name in names if name in ("model", "vilt", "meter", "bridgetower"))
    del device_map[trunk]
    for name, _ in (
        *getattr(model, trunk).named_children(),
        *getattr(model, trunk).named_parameters(recurse=False),
    ):
        device_map[f"{trunk}.{name}"] = "cpu"
    heaviest = {"encoder", "layers", "language_model", "text_model"}
    for name in device_map:
        if name.split(".")[-1] in heaviest:
            device_map[name] = "disk"
    assert set(device_map.values()) == {"cpu", "disk"}
    return accelerate.dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )


def check_same_as_without_hooks(family, reducer, how, folder):
    batch = calls.inputs(family, rows=2)
    plain = pumer.apply(calls.model(family), reducer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that the weights are on "meta", as they are
        model = offloaded(family, how, folder)
        if (family, how) in STOCK_REFUSES:
            with pytest.raises(RuntimeError):
                answer(model, batch)
            return
        pumer.apply(model, reducer)
        near(answer(model, batch), answer(plain, batch))
        before, after = calls.image_lengths(model)
        assert after < before
        assert pumer.active(model).lengths == pumer.active(plain).lengths
        if family in tiny_llm.BUILDERS and not (
            how != "device_map" and family in STOCK_REFUSES_TO_GENERATE
        ):
            assert generated(model, batch) == generated(plain, batch)
        pumer.remove(model)
        near(answer(model, batch), answer(pumer.remove(plain), batch))


@pytest.mark.parametrize("place", PLACES)
def test_llava_offloaded(place, tmp_path):
    check_same_as_without_hooks("llava", PLACES[place], "cpu_offload", tmp_path)


@pytest.mark.parametrize("how", ["cpu_offload", "device_map"])
@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_trained_parts_run_where_their_layer_does(family, name, how, tmp_path):
    if (family, how) in STOCK_REFUSES:
        pytest.skip("the stock model does not run")
    batch, reducer = calls.inputs(family, rows=2), LEARNED[name]
    plain = pumer.apply(calls.model(family), reducer)
    model = pumer.apply(offloaded(family, how, tmp_path), reducer)
    parts = pumer.active(model).parts
    assert {weight.device.type for weight in parts.parameters()} == {"cpu"}
    parts.load_state_dict(pumer.active(plain).parts.state_dict())
    expected = answer(plain, batch)
    near(answer(model, batch), expected)
    assert pumer.active(model).lengths == pumer.active(plain).lengths
    pumer.apply(model, reducer)  # the same parts, trained or not, go on
    assert pumer.active(model).parts is parts
    near(answer(model, batch), expected)


@pytest.mark.parametrize("family", ["ViLT", "METER"])
def test_trained_parts_are_offloaded_with_the_model(family):
    batch, reducer = calls.inputs(family, rows=2), LEARNED["dynamicvit"]
    model = pumer.apply(calls.model(family), reducer)
    expected = answer(model, batch)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert all(weight.is_meta for weight in pumer.active(model).parts.parameters())
    near(answer(model, batch), expected)
    pumer.apply(model, reducer)
    near(answer(model, batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family, place, how, tmp_path):
    if family == "idefics3" and how != "device_map":  # stock Idefics 3 takes "meta" for its device
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            answer(offloaded(family, how, tmp_path), calls.inputs(family, rows=2))
        return
    check_same_as_without_hooks(family, PLACES[place], how, tmp_path)


@pytest.mark.parametrize("family", ["llava", "ViLT", "METER"])
def test_hooks_that_come_after_the_reducer(family, tmp_path):
    """And the reducer goes before they do."""
    batch = calls.inputs(family, rows=2)
    plain = pumer.apply(calls.model(family), PLACES["inside"])
    model = pumer.apply(calls.model(family), PLACES["inside"])
    accelerate.cpu_offload(model, execution_device="cpu")
    near(answer(model, batch), answer(plain, batch))
    try:
        pumer.remove(model)
    except (ValueError, RuntimeError) as error:
        calls.must_say(error, "forward")  # says what is in the way
        near(answer(model, batch), answer(plain, batch))
    else:
        near(answer(model, batch), answer(pumer.remove(plain), batch))
        with torch.no_grad():
            assert model(**batch).logits.device.type == "cpu"


def test_outputs_that_are_rebuilt_on_their_way():
    """Anything may copy a part's output: a hook, a wrapper, a recorder."""
    batch = calls.inputs("llava", rows=2)
    expected = answer(pumer.apply(calls.model("llava"), PLACES["inside"]), batch)
    model = calls.model("llava")

    def rebuilt(module, args, output):
        return type(output)(**dict(output.items())) if hasattr(output, "items") else output

    for module in (*model.modules(),):
        module.register_forward_hook(rebuilt)
    pumer.apply(model, PLACES["inside"])
    near(answer(model, batch), expected)
    words = generated(model, batch)
    assert words == generated(pumer.apply(calls.model("llava"), PLACES["inside"]), batch)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_what_is_known_of_the_tokens_follows_the_states_to_another_device(family, place):
    """The last layers lie elsewhere: on "meta", which no other device's tensors meet."""
    model, batch = calls.model(family), calls.inputs(family, rows=2)
    if family == "BridgeTower":  # with bridges of their own, so that some lie elsewhere
        kind = tiny.FAMILIES[family]
        model = tiny.model(kind, share_cross_modal_transformer_layers=False)
    trunk = model.base_model
    if family == "ViLT":
        ends = [*trunk.encoder.layer[2:], trunk.layernorm, trunk.pooler]
    elif family == "METER":
        ends = [*trunk.layers[2:], trunk.text_pooler, trunk.image_pooler]
    else:
        ends = [trunk.cross_modal_text_pooler, trunk.cross_modal_image_pooler]
        for stream in ("text", "image"):
            ends += getattr(trunk, f"cross_modal_{stream}_layers")[2:]
            ends += getattr(trunk, f"cross_modal_{stream}_transform")[2:]
            ends += getattr(trunk, f"cross_modal_{stream}_link_tower")[1:]
    pumer.apply(model, PLACES[place])
    for part in (*ends, model.classifier):
        part.to("meta")
        accelerate.hooks.add_hook_to_module(
            part, accelerate.hooks.AlignDevicesHook(execution_device="meta")
        )
    with torch.no_grad():
        logits = model(**batch).logits
    assert logits.shape == (2, 7)
    assert logits.device.type == "meta"
    assert pumer.kept(model).device.type == "meta"
