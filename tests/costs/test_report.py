"""Reports: the FLOPs formula against torch's counter and the published costs; what really ran."""

from dataclasses import dataclass

import matrix
import pytest
import tiny
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViltConfig, ViltForImagesAndTextClassification, ViltForQuestionAnswering

import halves
import pumer
from pumer.costs.reducer import NO_COST, count_reducer_costs
from pumer.costs.report import last_forward_macs
from pumer.models.meter import MeterConfig, MeterForQuestionAnswering
from pumer.reducers import Plan, Reducer


def counted(model, inputs):
    # torch does not count CPUs' fused attention, which BridgeTower's tower always has.
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(**inputs)
    return counter.get_total_flops() / 2


def full_text(kind, rows=1):
    """A batch without padding, so that padded and real lengths agree."""
    inputs = {name: value[:rows] for name, value in tiny.batch(kind).items() if name != "labels"}
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    inputs["pixel_mask"] = torch.ones_like(inputs["pixel_mask"])
    return inputs


@pytest.mark.parametrize("name", matrix.REDUCERS)
def test_the_formula_is_what_torch_counts(name):
    kind = "ViltForQuestionAnswering"
    model = pumer.apply(
        tiny.model(kind), matrix.REDUCERS[name], attention="eager"
    )  # torch does not count CPUs' fused one
    inputs = full_text(kind)
    seen = counted(model, inputs)
    # Interpolating positions is a product per picture that the formula, like every published
    # number, leaves out.
    grid = (
        inputs["pixel_values"].shape[2]
        // tiny.PATCH
        * (inputs["pixel_values"].shape[3] // tiny.PATCH)
    )
    side = 96 // tiny.PATCH
    rows = inputs["pixel_values"].shape[2] // tiny.PATCH
    positions = rows * side * side * 32 + grid * side * 32
    assert seen - positions == pytest.approx(last_forward_macs(model), rel=1e-3)


@pytest.mark.parametrize(
    "kind", halves.sweep(tiny.TWO_STREAMS, (tiny.FAMILIES["METER"], tiny.FAMILIES["BridgeTower"]))
)
@pytest.mark.parametrize("name", ["none", "pumer", "tome", "pool", *matrix.COMPOSED])
def test_the_formula_is_what_torch_counts_of_two_streams(kind, name):
    model, inputs = tiny.model(kind), tiny.batch(kind, padding=0)
    model.set_attn_implementation("eager")
    inputs = {
        key: value[:1] for key, value in inputs.items()
    }  # the longest text, so that nothing is trimmed
    unreduced = counted(model, inputs)
    assert unreduced == pytest.approx(pumer.report(model, text=9).macs, rel=0.01)
    pumer.apply(model, (matrix.REDUCERS | matrix.COMPOSED)[name], attention="eager")
    assert counted(model, inputs) == pytest.approx(last_forward_macs(model), rel=1e-3)
    shown = pumer.report(model, text=9)
    assert shown.active
    assert (shown.macs, shown.base_macs) == (
        last_forward_macs(model),
        pytest.approx(unreduced, rel=1e-3),
    )


def test_a_tower_is_part_of_the_report():
    model, inputs = tiny.model("MeterForQuestionAnswering"), tiny.batch("MeterForQuestionAnswering")
    pumer.apply(model, matrix.COMPOSED["tome+pumer"])
    with torch.no_grad():
        model(**inputs)
    shown = pumer.report(model)
    assert shown.tower == (37, 33, 29, 25)
    assert shown.lengths[0] == (20, 25)
    assert shown.parts["vision tower"] < shown.base_parts["vision tower"]
    assert shown.parts["text encoder"] == shown.base_parts["text encoder"]
    assert shown.to_dict()["tower"] == [37, 33, 29, 25]
    assert "vision tower" in str(shown)
    pumer.active(model).tower[1] = 36
    assert "in the vision tower" in pumer.report(model).state


@pytest.mark.parametrize(
    ("text", "reducer", "gmacs"),
    [
        (40, pumer.PuMer(0.2, 0.2, 0.2, (0, 1, 2, 3), official=True), 65.56),
        (40, pumer.PuMer(0.3, 0.5, 0.2, (0, 1, 2, 3), official=True), 59.93),
        (32, pumer.PuMer(0.2, 0.2, 0.2, (0, 1, 2, 3), official=True), 64.59),
    ],
)
def test_published_costs_of_meter(text, reducer, gmacs):
    with torch.device("meta"):
        model = MeterForQuestionAnswering(MeterConfig(num_labels=3129))
    pumer.apply(model, reducer)
    shown = pumer.report(model, text=text)
    own = shown.parts["reducer"]
    assert (shown.macs - own) / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert shown.base_macs / 1e9 == pytest.approx({40: 93.13, 32: 91.89}[text], rel=0.005)
    assert own < 0.01 * shown.macs
    if gmacs == 65.56:
        assert shown.lengths[1:] == ((32, 347), (26, 209), (21, 125), *[(17, 75)] * 3)


def test_two_pictures_cost_two_passes():
    kind = "ViltForImagesAndTextClassification"
    model = pumer.apply(tiny.model(kind), pumer.PuMer(layers=(0, 2)))
    inputs = full_text(kind)
    with torch.no_grad():
        model(**inputs)
    one = pumer.report(model)
    assert one.forwards_per_example == 2
    assert one.active


@pytest.mark.parametrize(
    ("text", "layers", "gmacs"),
    [(40, (2, 5, 8), 9.20), (32, (2, 5, 8), 8.70), (40, (2, 4, 6, 8), 8.09)],
)
def test_published_costs(text, layers, gmacs):
    with torch.device("meta"):
        model = ViltForQuestionAnswering(ViltConfig(num_labels=3129))
    reducer = pumer.PuMer(0.1, 0.3, 0.2, layers, official=True)
    pumer.apply(model, reducer)
    shown = pumer.report(model, text=text)
    own = shown.parts["reducer"]
    assert (shown.macs - own) / 1e9 == pytest.approx(gmacs, rel=0.01)
    assert shown.base_macs / 1e9 == pytest.approx({40: 16.69, 32: 15.96}[text], rel=0.005)
    assert own < 0.01 * shown.macs


def test_published_token_counts():
    with torch.device("meta"):
        model = ViltForQuestionAnswering(ViltConfig())
    pumer.apply(model, pumer.PuMer(0.1, 0.3, 0.2, (2, 5, 8), official=True))
    lengths = pumer.report(model, text=40).lengths[1:]
    assert lengths == ((40, 145),) * 2 + ((32, 87),) * 3 + ((26, 52),) * 3 + ((21, 31),) * 4


def test_it_says_whether_the_reduction_is_active():
    model = tiny.model()
    assert "nothing reduces this model" in str(pumer.report(model))
    pumer.apply(model, pumer.PuMer(layers=(0, 2)))
    assert "not run yet" in str(pumer.report(model))
    with torch.no_grad():
        model(**full_text("ViltForQuestionAnswering"))
    shown = pumer.report(model)
    assert shown.active
    assert shown.to_dict()["active"] is True
    assert shown.ratio > 1
    pumer.active(model).lengths[-1] = (99, 99)
    assert pumer.report(model).active is False


def test_a_model_of_two_images_and_bad_lengths():
    with torch.device("meta"):
        model = ViltForImagesAndTextClassification(
            ViltConfig(num_images=2, modality_type_vocab_size=3)
        )
    shown = pumer.report(model, text=40)
    assert shown.base_macs / 1e9 == pytest.approx(33.37, rel=0.005)
    with pytest.raises(ValueError, match="at least 1 token"):
        pumer.report(model, text=0)


@dataclass(frozen=True)
class _Looks(Reducer):
    """Keeps all, after it has computed with the states as often as it is told to."""

    products: int = 0
    layers = (1,)

    def plan(self, tokens):
        states = tokens.states_BND
        for _ in range(self.products):
            states @ states.transpose(1, 2)
        return Plan.identity(tokens.mask_BN)


@pytest.mark.parametrize("place", ["cpu", "meta"])
def test_what_a_reducer_takes_is_what_its_operators_do(place):
    (text, image), width = (5, 7), 2 * 4
    count = text + image
    lengths = [(text, image)] * 3
    none, two = (
        count_reducer_costs(_Looks(n), (2, 4), (text, image), lengths, None, place)[1]
        for n in (0, 2)
    )
    assert two.macs - none.macs == 2 * count * count * width
    assert two.operators - none.operators == 2  # turning a matrix around is none
    assert two.traffic - none.traffic == 2 * 4 * (2 * count * width + count * count)
    assert count_reducer_costs(_Looks(2), (2, 4), (text, image), lengths, None, place)[0] == NO_COST


def test_passes_and_towers_count_what_reducers_take():
    kind = "ViltForImagesAndTextClassification"
    once, twice = (
        pumer.report(pumer.apply(tiny.model(name), pumer.PuMer(layers=(0, 2)))).reducer_cost
        for name in ("ViltForQuestionAnswering", kind)
    )
    assert twice == 2 * once
    tower = pumer.Compose(pumer.ToMe(r=4, depth=2), pumer.PuMer(layers=(1,)))
    apart = (tower, pumer.Compose(pumer.ToMe(r=4, depth=2), pumer.Unreduced()))
    both, alone = (
        pumer.report(
            pumer.apply(tiny.model("MeterForQuestionAnswering"), reducer), text=10
        ).reducer_cost
        for reducer in apart
    )
    assert 0 < alone.operators < both.operators
    assert 0 < alone.traffic < both.traffic
    assert alone.macs < both.macs
