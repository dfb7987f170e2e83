"""Tokenizing batches, and tokenizers trained on the spot."""

import pytest
import torch
from transformers import AutoTokenizer

from pumer.lab.data.text import TextTransform, train_tokenizer

SENTENCES = [
    "There is a box with a blue circle and a blue triangle.",
    "There are two yellow squares touching the wall",
    "Is the café's cat black-and-white?",
    "How many boxes have three items of three different colours?",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(SENTENCES, 120)


def test_special_tokens_come_first(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3, 4]) == [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
    ]
    assert set(tokenizer.all_special_ids) == {0, 1, 2, 3, 4}
    assert tokenizer.pad_token_id == 0


def test_behaves_like_berts(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("There is a BLUE cafe")["input_ids"])
    assert tokens[0] == "[CLS]"
    assert tokens[-1] == "[SEP]"
    assert "there" in tokens
    assert "blue" in tokens
    assert (
        tokenizer.decode(tokenizer("two blue boxes")["input_ids"], skip_special_tokens=True)
        == "two blue boxes"
    )
    pair = tokenizer("a box", "a wall")
    assert 1 in pair["token_type_ids"]
    assert tokenizer("雪")["input_ids"] == [2, 1, 3]


def test_characters_inside_words_are_no_special_tokens(tokenizer):
    assert "##e" in tokenizer.get_vocab()
    assert tokenizer.decode(tokenizer("bluee")["input_ids"], skip_special_tokens=True) == "bluee"


def test_same_sentences_give_the_same_tokenizer():
    vocabularies = [
        train_tokenizer(order, 90).get_vocab() for order in [SENTENCES, SENTENCES[::-1]] * 3
    ]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert len(vocabularies[0]) == 90


def test_ids_have_no_gaps(tokenizer):
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_saved_and_loaded(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert dict(loaded(SENTENCES[2])) == dict(tokenizer(SENTENCES[2]))
    assert (loaded.pad_token_id, loaded.mask_token_id) == (0, 4)


def test_vocabulary_too_small():
    with pytest.raises(ValueError, match="vocab_size is 10"):
        train_tokenizer(SENTENCES, 10)


def test_padded_to_the_longest(tokenizer):
    batch = TextTransform(tokenizer)(["two boxes", "a box"], [1, 2])
    assert batch.keys() == {"input_ids", "token_type_ids", "attention_mask"}
    lengths = batch["attention_mask"].sum(1)
    assert batch["input_ids"].shape == (2, lengths.max())
    assert all(values.dtype == torch.int64 for values in batch.values())


def test_padded_to_a_fixed_length(tokenizer):
    batch = TextTransform(tokenizer, max_length=16, padding="max_length")(
        ["two boxes", "a box"], [1, 2]
    )
    assert batch["input_ids"].shape == (2, 16)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 0).all()


def test_long_texts_are_cut(tokenizer):
    batch = TextTransform(tokenizer, max_length=8)([" ".join(SENTENCES)], [1])
    assert batch["input_ids"].shape == (1, 8)
    assert batch["input_ids"][0, -1] == tokenizer.sep_token_id


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_empty_question_is_named(tokenizer, empty):
    with pytest.raises(ValueError, match=r"1 of 2 questions have no text.*4711"):
        TextTransform(tokenizer)(["a box", empty], [1, 4711])


def test_tokenizer_without_padding():
    tokenizer = train_tokenizer(SENTENCES, 120)
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad_token"):
        TextTransform(tokenizer)
