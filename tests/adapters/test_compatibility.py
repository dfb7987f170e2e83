"""Every reducer on every family: it works as the document says, or is refused with a reason."""

import cells
import oracle_llm
import pytest
import tiny_llm
import torch

import halves
import pumer

LAYOUTS = {
    "single": ((4, "i", 6),),
    "two images": ((3, "i", 2, "i", 5),),
    "padded": ((4, "i", 6), (2, "i", 3, "i", 2), (5,)),
}
SETTINGS = {
    "max_new_tokens": 16,
    "do_sample": False,
    "return_dict_in_generate": True,
    "output_logits": True,
}
MODELS: dict[str, torch.nn.Module] = {}


def model_of(family):
    if family not in MODELS:
        MODELS.clear()
        MODELS[family] = cells.made(family)
    return MODELS[family]


def cases(reducers, families):
    return [
        pytest.param(family, name, id=f"{family}-{name}")
        for family in families
        for name in reducers
    ]


def test_the_document_is_true():
    assert cells.DOCUMENT.read_text(encoding="utf-8") == cells.table(), (
        "run python tests/adapters/cells.py"
    )


@pytest.mark.parametrize(
    ("family", "name"),
    halves.sweep(
        cases(cells.REDUCERS, cells.FAMILIES),
        # One family of each kind with every reducer; which reducers suit the others says the
        # document, which is held true every time.
        lambda id: id.startswith(("llava-", "qwen2_5_vl-", "internvl-", "qwen3_5-")),
    ),
)
def test_it_runs_or_says_why_not(family, name):
    model = model_of(family)
    reducer, word, reason = cells.fitting(model, cells.REDUCERS[name], cells.batch(family))
    assert pumer.active(model) is None
    if word == cells.REFUSED:
        assert len(reason) > 20
        return
    with pumer.reduced(model, reducer), torch.no_grad():
        logits = model(**cells.batch(family)).logits
        assert logits.isfinite().all()
        assert pumer.report(model).active


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("family", "name"), cases(cells.PRUNING, tiny_llm.BUILDERS))
def test_dropping_is_masking(family, name, layout):
    model, inputs = model_of(family), tiny_llm.batch(family, LAYOUTS[layout])
    reducer, word, _ = cells.fitting(model, cells.PRUNING[name], inputs)
    if word == cells.REFUSED:
        pytest.skip("refused, as the document says")
    with pumer.reduced(model, reducer):
        marks = oracle_llm.kept(model, inputs, generating=True)
        reduced = model.generate(**inputs, **SETTINGS)
    with oracle_llm.masked(model, marks):
        expected = model.generate(**inputs, **SETTINGS)
    assert reduced.sequences.tolist() == expected.sequences.tolist()
    for got, wanted in zip(reduced.logits, expected.logits, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
