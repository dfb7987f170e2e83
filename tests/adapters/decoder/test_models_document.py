"""docs/models.md says of every image-text-to-text class of transformers what is done with it."""

import models_document
import pytest
import transformers

from pumer.adapters import families
from pumer.adapters.base import adapters
from pumer.adapters.decoder.refused import REFUSED
from pumer.adapters.encoder import refused as joint

PINNED = transformers.__version__.startswith("5.24")
SERVED = {name for adapter in adapters() for name in adapter.classes}


@pytest.mark.skipif(not PINNED, reason="the table is that of the version that is pinned")
def test_the_document_is_true():
    assert models_document.DOCUMENT.read_text(encoding="utf-8") == models_document.table(), (
        "run python tests/adapters/models_document.py"
    )


@pytest.mark.skipif(not PINNED, reason="the classes are those of the version that is pinned")
def test_every_class_is_reduced_and_tested_or_refused():
    reduced = {*models_document.reduced_classes(), *models_document.crossing_classes()}
    classes = set(models_document.CLASSES) | set(models_document.RETRIEVERS)
    assert classes - reduced - set(REFUSED) == set()
    assert not SERVED & set(REFUSED)
    assert set(REFUSED) <= classes
    assert classes & SERVED <= reduced  # no class is served without a model in the matrix


@pytest.mark.parametrize("name", ["UdopForConditionalGeneration", "GitForCausalLM"])
def test_a_refusal_says_why(name):
    model = object.__new__(getattr(transformers, name))
    with pytest.raises(ValueError, match="cannot be reduced") as error:
        families.find(model)
    assert REFUSED[name] in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


@pytest.mark.parametrize("name", ["VisualBertForQuestionAnswering", "LxmertModel"])
def test_a_joint_encoder_is_refused_with_a_reason(name):
    model = object.__new__(getattr(transformers, name))
    with pytest.raises(ValueError, match=r"cannot be reduced\. Its image tokens are a few dozen"):
        families.find(model)
    assert all(hasattr(transformers, name) for name in joint.REFUSED)


def test_a_reason_is_one_sentence_or_two():
    for reason in (*REFUSED.values(), *joint.REFUSED.values()):
        assert reason.endswith(".")
        assert len(reason) < 200
