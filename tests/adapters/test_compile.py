"""Without trimming a forward never waits for the device, and compiles into one graph that serves
every batch."""

import matrix
import pytest
import tiny
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import halves
import pumer

CASES = matrix.on_every_family(official=matrix.OFFICIAL)
FAMILIES = [pytest.param(kind, id=family) for family, kind in tiny.FAMILIES.items()]
EVERY_FAMILY = pytest.mark.parametrize("kind", FAMILIES)
EVERY_REDUCER = pytest.mark.parametrize(("kind", "reducer"), CASES)
COMPILED = {
    "ViLT": ("pumer", "tome", "pool-inside", "random", "official"),
    "METER": ("tome+pumer", "official"),
    "BridgeTower": ("tome+pumer",),
}
"""Graphs of two streams take long to trace. What their layers do with other plans, ViLT's do
too, and `test_fuzz_reducers` compiles the plans of every kind."""
EIGEN = ("svd-prune", "energy")
"""Those with an eigen-decomposition, for which torch waits once on CUDA, as their docstrings
say."""
WAITS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
}
"""Operators whose result, or its shape, the host has to wait for."""


class NoWaiting(TorchDispatchMode):
    """Fails at the first operator that makes the host wait for the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in WAITS, f"{name} waits for the device"
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        assert all(i is None or i.dtype != torch.bool for i in indices), (
            f"{name} with a mask waits for the device"
        )
        return func(*args, **(kwargs or {}))


def test_waiting_is_seen():
    x = torch.arange(3.0)
    for waits in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: bool(x.any()),
        lambda: x.nonzero(),
    ):
        with pytest.raises(AssertionError, match="waits for the device"), NoWaiting():
            waits()


@EVERY_REDUCER
def test_a_forward_never_waits_for_the_device(kind, reducer):
    model, inputs = tiny.model(kind), tiny.batch(kind)
    with torch.no_grad(), pumer.reduced(model, reducer, trim=False), NoWaiting():
        model(**inputs)


@EVERY_REDUCER
def test_a_forward_needs_no_data(kind, reducer):
    """Tensors on the meta device have shapes alone: whatever reads one, `tolist` included, fails
    there."""
    model, inputs = tiny.model(kind).to("meta"), tiny.batch(kind)
    with torch.no_grad(), pumer.reduced(model, reducer, trim=False):
        output = model(**{name: tensor.to("meta") for name, tensor in inputs.items()})
    assert output.logits.shape == (4, 7)


@EVERY_FAMILY
def test_training_never_waits_for_the_device(kind):
    model, inputs = (
        tiny.model(kind, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1).train(),
        tiny.batch(kind),
    )
    pumer.apply(model, matrix.REDUCERS["pumer"], trim=False)
    with NoWaiting():
        model(**inputs).logits.sum().backward()


def shuffled(inputs):
    """A second batch of the same shape with other lengths in it."""
    return {name: tensor.flip(0) for name, tensor in inputs.items()}


def is_compiled(family, name):
    return name in COMPILED[family]


@pytest.mark.parametrize(
    ("kind", "reducer"),
    # A compilation takes seconds.
    halves.sweep(
        [case for case in CASES if is_compiled(*case.id.split("-", 1))],
        ("ViLT-pumer", "METER-tome+pumer"),
    ),
)
def test_one_graph_for_every_batch(kind, reducer):
    torch._dynamo.reset()
    model, inputs = tiny.model(kind), tiny.batch(kind)
    pumer.apply(model, reducer, trim=False)
    counter = CompileCounterWithBackend(
        "aot_eager" if reducer == matrix.REDUCERS["pumer"] else "eager"
    )
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        for batch in (inputs, shuffled(inputs)):
            torch.testing.assert_close(
                compiled(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5
            )
    assert counter.frame_count == 1, "the second batch was compiled anew"


@pytest.mark.parametrize("kind", halves.sweep(FAMILIES, ("ViLT", "METER")))
def test_trimming_is_left_out_of_a_graph(kind):
    """With the default `trim=True` too: the host cannot read lengths inside a graph."""
    torch._dynamo.reset()
    model, inputs = tiny.model(kind), tiny.batch(kind)
    expected = pumer.apply(model, matrix.REDUCERS["uniform"])(**inputs).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("kind", "reducer"), [case for case in CASES if case.id.split("-", 1)[1] not in EIGEN]
)
def test_a_cuda_forward_never_waits_and_can_be_captured(kind, reducer):
    model = tiny.model(kind).cuda()
    inputs = {name: tensor.cuda() for name, tensor in tiny.batch(kind).items()}
    with torch.no_grad(), pumer.reduced(model, reducer, trim=False):
        expected = model(**inputs).logits  # the first call sets up libraries, which may wait
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            model(**inputs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = model(**inputs).logits
        graph.replay()
    torch.testing.assert_close(captured, expected, rtol=0, atol=1e-5)
