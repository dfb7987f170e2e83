"""Costs of language models that keep states, choose keys or have experts, against what torch
counts."""

import pytest
import tiny_llm
import torch
from torch.utils.flop_counter import FlopCounterMode

import pumer
from pumer import DivPrune
from pumer.adapters import find
from pumer.adapters.decoder.costs import expert_weights, experts_per_token, linear_weights
from pumer.adapters.decoder.recurrent import state_macs, step_macs

LENGTH = 23
EXPERTS = (
    "qwen3_5_moe",
    "nemotron_omni",
    "mistral_large4",
    "minimax_m3",
    "dots3_note",
    "qwen3_vl_moe",
    "glm4v_moe",
)


def counted(model):
    """What torch counts of a language model's products and convolutions, multiply-accumulates."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        find(model).language(model)(inputs_embeds=torch.randn(1, LENGTH, 32), use_cache=False)
    ops = {str(op): flops // 2 for op, flops in counter.get_flop_counts()["Global"].items()}
    products = ops.get("aten.mm", 0) + ops.get("aten.addmm", 0)
    return products, ops.get("aten.convolution", 0)


@pytest.mark.parametrize("family", ["qwen3_5", "lfm2_vl", "lfm3_vl", *EXPERTS])
def test_weights_and_convolutions_are_those_that_torch_counts(family):
    model = tiny_llm.model(family)
    if family in EXPERTS:
        model.set_experts_implementation("eager")  # torch counts no grouped products
    adapter, top_k = find(model), experts_per_token(model.config.get_text_config())
    layers = adapter.layers(model)
    linear = sum(linear_weights(layer) + expert_weights(layer, top_k) for layer in layers)
    products, convolutions = counted(model)
    routers = LENGTH * sum(
        weight.numel()
        for layer in layers
        for name, weight in layer.named_parameters()
        if name.endswith(".gate.weight")
    )
    assert products == LENGTH * linear + routers
    # torch counts the places that a convolution gives behind the last token, too
    expected = sum(
        (LENGTH + part.kernel_size[0] - 1) * part.weight.numel()
        for layer in layers
        for part in layer.modules()
        if isinstance(part, torch.nn.Conv1d)
    )
    assert convolutions == expected
    states = sum(state_macs(layer) - sum(map(step_macs, layer.modules())) for layer in layers)
    assert states == sum(
        part.weight.numel()
        for layer in layers
        for part in layer.modules()
        if isinstance(part, torch.nn.Conv1d)
    )


TOWERS = [
    "qwen3_5",
    "lfm3_vl",
    "minicpm_v4_6",
    "minicpm_ocr",
    "dots3_note",
    "inkling",
    "inkling2",
    "nemotron_omni",
    "minimax_m3",
    "hy_v4_vl",
    "mistral_large4",
    "glm5_next",
    "glm4v",
]


@pytest.mark.parametrize("family", TOWERS)
def test_towers_cost_what_torch_counts(family):
    """But for routers, and tokens that are no patches."""
    model = tiny_llm.model(family, "eager")
    if family == "dots3_note":
        model.set_experts_implementation("eager")
    adapter, (inputs, _) = find(model), tiny_llm.images(family, 1)[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        adapter.trunk(model).get_image_features(**inputs)
    macs = sum(adapter.vision_macs(model, tiny_llm.patches(family, 1)[0]))
    assert macs == pytest.approx(counter.get_total_flops() // 2, rel=5e-3)


@pytest.mark.parametrize(
    ("family", "macs"),
    [
        ("qwen3_5", 3 * 3 * 4 * 6 * 8),  # 3 layers, 4 heads with a state of 6 x 8
        ("glm5_next", 2 * 3 * 2 * 8 * 8),
        ("nemotron_omni", 2 * 4 * 8 * 6),
        ("lfm2_vl", 0),
    ],
)
def test_a_token_steps_through_every_number_of_a_state(family, macs):
    """The delta rule recalls, writes and reads it, Mamba writes and reads it."""
    layers = find(tiny_llm.model(family)).layers(tiny_llm.model(family))
    assert sum(step_macs(part) for layer in layers for part in layer.modules()) == macs


def test_layers_that_are_looped_are_counted_as_often(monkeypatch):
    model = tiny_llm.model("inkling2_loop")
    adapter, lengths = find(model), [(4, 8)] * 7
    macs = [sum(layer) for layer in adapter.layer_macs(model, lengths)]
    with monkeypatch.context() as patch:
        patch.setattr(type(adapter), "passes", lambda *_: [1] * 6)
        once = [sum(layer) for layer in adapter.layer_macs(model, lengths)]
    assert macs == [times * each for times, each in zip([1, 1, 2, 2, 1, 1], once, strict=True)]
    channels = adapter.cache_channels(model)
    assert channels == [32, 32, 64, 64, 32, 32]


def test_a_state_costs_as_much_whatever_came_before():
    """Only layers with keys save in decoding, and in the cache."""
    model = tiny_llm.model("qwen3_5")
    with pumer.reduced(model, DivPrune(keep=0.5)):
        report = pumer.report(model, text=10, image=40)
    adapter = find(model)
    assert adapter.cache_channels(model) == [0, 0, 2 * 2 * 8, 0]
    assert report.base_cache_bytes - report.cache_bytes == 4 * 2 * 2 * 8 * 20
    assert report.base_decode_macs - report.decode_macs == 2 * 4 * 8 * 20
