"""From texts to token ids, and training of small tokenizers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

_VOCABULARIES = (
    *("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model"),
    *("sentencepiece.bpe.model", "tekken.json"),
)
_LAST_CALL = ("max_length", "truncation_strategy", "stride", "pad_to_multiple_of")
"""What transformers makes settings of when it reads a tokenizer that was saved between two
calls."""
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class TextTransform:
    """Tokenize a batch of texts with any Hugging Face tokenizer.

    Pads to the longest text of the batch; `padding="max_length"` pads to `max_length`, as in the
    training of released PuMer models (32 tokens for VQA, 40 elsewhere) and for compiled models.
    Texts over `max_length` tokens, special ones included, are cut. Raises ValueError for a
    tokenizer without a padding token.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int = 40
    padding: Literal["longest", "max_length"] = "longest"

    def __post_init__(self) -> None:
        if self.tokenizer.pad_token is None:
            raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token first.")

    def __call__(self, texts: Sequence[str], ids: Sequence[Any]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and the tokenizer's other tensors, each int64 [B, T].

        `ids` name the texts in errors. Raises ValueError for an empty text.
        """
        _check(texts, ids)
        return dict(
            self.tokenizer(
                list(texts),
                padding=self.padding,
                truncation=True,
                max_length=self.max_length,
                return_tensors="pt",
            )
        )

    def cut(self, texts: Sequence[str], ids: Sequence[Any]) -> list[str]:
        """The texts cut after `max_length` tokens, special ones not counted; raises ValueError for
        an empty text."""
        _check(texts, ids)
        encoding = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            truncation=True,
            max_length=self.max_length,
            return_offsets_mapping=True,
        )
        return [
            text[: places[-1][1]]
            for text, places in zip(texts, encoding["offset_mapping"], strict=True)
        ]


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer in a folder, or of a name on the Hub.

    Raises ValueError for a folder without the tokenizer's vocabulary: transformers makes an empty
    one of that.
    """
    folder = Path(source)
    if folder.is_dir() and not any((folder / name).is_file() for name in _VOCABULARIES):
        raise ValueError(
            f"{folder} has none of the files of a tokenizer ({', '.join(_VOCABULARIES)}): save the "
            f"model's there, with tokenizer.save_pretrained({str(folder)!r})"
        )
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"the tokenizer of {source} cannot be read: {error}") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a tokenizer without the padding and truncation of its last call."""
    plain = copy.deepcopy(tokenizer)
    for name in _LAST_CALL:
        plain.init_kwargs.pop(name, None)
    backend = getattr(plain, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    plain.save_pretrained(folder)


def same_tokenizer(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same tokens for every text."""
    return one is other or _parts(one) == _parts(other)


def _parts(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        json.loads(backend.to_str()) if backend is not None else {"class": type(tokenizer).__name__}
    )
    rules = {
        name: value for name, value in rules.items() if name not in ("padding", "truncation")
    }  # of the last call
    return [rules, tokenizer.get_vocab(), tokenizer.pad_token_id]


def _check(texts: Sequence[str], ids: Sequence[Any]) -> None:
    """Raise ValueError when a text is empty."""
    empty = [name for text, name in zip(texts, ids, strict=True) if not text.strip()]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(texts)} questions have no text; fill in or leave out "
            f"{', '.join(map(str, empty[:5]))}."
        )


def train_tokenizer(sentences: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a lower-case WordPiece tokenizer that behaves like BERT's uncased one.

    [PAD] is token 0, then [UNK], [CLS], [SEP], [MASK]; a text becomes [CLS] text [SEP]. The same
    sentences, in any order, give the same tokenizer. It may hold fewer than `vocab_size` tokens
    when the sentences hold no more. Raises ValueError when `vocab_size` cannot hold the special
    tokens and every character.
    """
    tokenizer = _bert_pipeline(models.WordPiece(unk_token="[UNK]"))
    sentences = list(sentences)
    words = (
        word
        for sentence in sentences
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(
            tokenizer.normalizer.normalize_str(sentence)
        )
    )
    # The trainer numbers characters inside words in the order of a randomly seeded hash map and
    # breaks ties by number, so that two runs differ. Named as special tokens, they are numbered
    # first and in this order.
    inner = sorted({f"##{character}" for word in words for character in word[1:]})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size, special_tokens=[*_SPECIAL, *inner], show_progress=False
    )
    tokenizer.train_from_iterator(sentences, trainer)
    vocabulary = tokenizer.get_vocab()
    if len(vocabulary) > vocab_size:
        raise ValueError(
            f"vocab_size is {vocab_size}, but special tokens and characters are "
            f"{len(vocabulary)}; raise it."
        )
    # A fresh model from the vocabulary: in the trained one those characters would still count as
    # special.
    tokenizer = _bert_pipeline(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    tokenizer.decoder = decoders.WordPiece()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **dict(zip(names, _SPECIAL, strict=True)),
    )


def _bert_pipeline(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer
