"""The table of seams says by a reducer's traits what models of each seam do with it."""

import calls
import cells
import pytest
import seams
import tiny_llm


def acts(reducer, *places):
    """Whether the table has it in one of these places."""
    return any(place(reducer) != seams.NO for place in places)


@pytest.fixture(scope="module")
def vilt():
    return cells.made("ViLT")


@pytest.fixture(scope="module")
def llava():
    return tiny_llm.model("llava")


@pytest.fixture(scope="module")
def fuyu():
    return tiny_llm.model("fuyu")


def runs(model, reducer, family):
    return cells.fitting(model, reducer, cells.batch(family))[1] != cells.REFUSED


@pytest.mark.parametrize("name", cells.REDUCERS)
def test_it_acts_where_the_table_says(name, vilt, llava, fuyu, monkeypatch):
    reducer = cells.REDUCERS[name]
    assert runs(vilt, reducer, "ViLT") == acts(reducer, seams.joint_encoder)
    in_decoders = acts(reducer, seams.before, seams.inside)
    assert runs(llava, reducer, "llava") == (in_decoders or acts(reducer, seams.vision_tower))
    # Without a tower that can be looked into.
    reads = seams.before(reducer) not in (seams.YES, seams.NO)
    assert runs(fuyu, reducer, "fuyu") == (in_decoders and not reads and name != "pooling")
    if acts(reducer, seams.inside_flash):
        calls.use_flash(monkeypatch, llava.model.language_model)
        assert runs(llava, reducer, "llava")
