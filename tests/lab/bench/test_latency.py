"""The latency model: amounts of work, prediction of times it can know."""

import pytest
import torch
from tiny import FAMILIES, batch
from tiny import model as tiny_model

import pumer
from pumer import PuMer, ToMe
from pumer.lab.bench import latency
from pumer.lab.bench.latency import LatencyModel, calibrate, calibration_reducers, fit, work
from pumer.lab.bench.run import FUSED
from pumer.lab.bench.timing import Timing
from pumer.reducers import Compose, Uniform


def reports(family):
    """Reports of a family's tiny model: unreduced and with every calibration reducer."""
    net = tiny_model(FAMILIES[family])
    found = [pumer.report(net)]
    for reducer in calibration_reducers(net).values():
        with pumer.reduced(net, reducer):
            found.append(pumer.report(net))
    return net, found


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_reducers_fit_the_model_and_tell_terms_apart(family):
    _, found = reports(family)
    amounts = [work(report) for report in found]
    assert {name for one in amounts for name, amount in one.items() if amount} == {
        name for name in amounts[0] if family != "ViLT" or "tower" not in name
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_machine_that_is_as_modelled_is_predicted_exactly(family):
    net, found = reports(family)
    costs = {name: 10.0 ** -(3 + place % 4) for place, name in enumerate(work(found[0]))}
    truth = LatencyModel(costs)
    model = fit([work(one) for one in found], [truth.seconds(one) for one in found])
    held_out = [
        Uniform(prune=0.4, layers=(1, 2)),
        PuMer(0.2, 0.3, 0.2, layers=(0, 2)),
        ToMe(r=3, depth=3),
    ]
    for reducer in held_out:
        with pumer.reduced(net, reducer):
            planned = pumer.report(net)
        assert model.seconds(planned) == pytest.approx(truth.seconds(planned), rel=0.05)


def test_work_counts_what_is_there():
    net = tiny_model("MeterForQuestionAnswering")
    with pumer.reduced(net, Compose(ToMe(r=4, depth=2), PuMer(0.25, 0.0, 0.0, layers=(1,)))):
        planned = pumer.report(net, text=10)
    done = work(planned)
    assert planned.tower == (37, 33, 29, 29)
    assert planned.lengths == ((10, 29), (10, 29), (10, 22), (10, 22), (10, 22))
    assert done["tower pairs"] == 37**2 + 33**2 + 29**2
    assert done["tokens"] == 39 + 32 + 32 + 32
    assert done["reducer"] == planned.parts["reducer"]
    assert done["reducer operators"] == planned.reducer_cost.operators > 0
    assert done["reducer traffic"] == planned.reducer_cost.traffic > 0


def test_a_tower_that_was_never_timed_is_refused():
    _, joint = reports("ViLT")
    _, towers = reports("METER")
    model = fit([work(one) for one in joint], [1.0] * len(joint))
    with pytest.raises(ValueError, match="tower"):
        model.seconds(towers[0])


def test_times_are_shares_of_the_unreduced_forward_next_to_them(monkeypatch):
    turns = []

    def slower_and_slower(calls, runs, warmup, device):
        for call in calls.values():
            call()
        turns.append(tuple(calls))
        slow = len(turns)
        shares = {FUSED: 1, "half": 0.5, "third": 1 / 3}
        return {name: Timing(tuple(shares[name] * slow * k for k in (1, 2, 9))) for name in calls}

    monkeypatch.setattr(latency, "alternate", slower_and_slower)
    reducers = {"half": PuMer(layers=(1,)), "third": PuMer(layers=(0,))}
    seconds, planned = latency.measure(tiny_model(), batch(), reducers, runs=3)
    assert turns == [(FUSED, "half"), (FUSED, "third")]
    assert seconds == pytest.approx(
        {FUSED: 3.0, "half": 1.5, "third": 1.0}
    )  # the median of 1, 2, 9, 2, 4, 18
    assert planned["half"].entry == planned[FUSED].entry == planned[FUSED].lengths[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_calibration_runs_and_leaves_the_model_alone(family):
    kind = FAMILIES[family]
    net = tiny_model(kind)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = calibrate(net, batch(kind), runs=1)
    assert min(model.costs.values()) >= 0
    assert max(model.costs.values()) > 0
    assert pumer.active(net) is None
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
