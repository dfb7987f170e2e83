"""VQA answers: official normalization and score, soft targets, vocabularies.

Reproduces the official evaluator (github.com/GT-Vision-Lab/VQA) exactly, quirks included, because
published numbers depend on them. Goyal et al., "Making the V in VQA Matter", CVPR 2017.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pumer._files import replacing
from pumer.lab.tasks.base import Example, check_ids, count_of

ANNOTATORS = 10

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # no colon and no apostrophe: the evaluator leaves both
_NUMBER_WITH_COMMA = re.compile(r"\d,\d")
# The evaluator means to spare periods after a digit too, but mistypes the pattern for it.
_PERIOD = re.compile(r"\.(?!\d)")
# The evaluator passes a flag of value 32 where the number of replacements belongs.
_MAX_PERIODS = 32
_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = {"a", "an", "the"}
_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't
    hadn't've hasn't haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am
    might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't shan't she'd've
    should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll
    what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
    why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've
"""
# A contraction is recognised with exactly one of its apostrophes missing: "couldnt've" and
# "couldn'tve".
_RESTORED = {
    word[: apostrophe.start()] + word[apostrophe.end() :]: word
    for word in _CONTRACTIONS.split()
    for apostrophe in re.finditer("'", word)
}
_RESTORED["somebody'd"] = "somebodyd"  # the wrong way round in the evaluator


@lru_cache(maxsize=100_000)  # a few thousand answers make up nearly all of VQAv2
def normalize(answer: str) -> str:
    """An answer as the official evaluator compares it: lower case, no punctuation or articles,
    numbers in digits.

    The vocabularies of ViLT, METER and PuMer hold answers in this form.

    >>> normalize("Two dogs.")
    '2 dogs'
    """
    text = answer
    delete_all = _NUMBER_WITH_COMMA.search(answer) is not None
    for mark in _PUNCTUATION:
        beside_blank = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if delete_all or beside_blank else " ")
    text = _PERIOD.sub("", text, count=_MAX_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_RESTORED.get(word, word) for word in words if word not in _ARTICLES)


def vqa_score(prediction: str, answers: Sequence[str]) -> float:
    """The official score of an answer given the annotators' answers, from 0 to 1.

    If all annotators gave the same string nothing is normalized, so "The dog" is wrong for "dog".

    >>> vqa_score("red", ["red"] * 3 + ["blue"] * 7)
    0.9
    """
    prediction, *answers = (
        text.replace("\n", " ").replace("\t", " ").strip() for text in (prediction, *answers)
    )
    if len(set(answers)) > 1:
        prediction, *answers = (normalize(text) for text in (prediction, *answers))
    return leave_one_out(answers.count(prediction), len(answers))


def leave_one_out(matching: int, annotators: int = ANNOTATORS) -> float:
    """The score of an answer given by `matching` annotators: of ten 0, 0.3, 0.6, 0.9, then 1.

    The mean over annotators of min(1, n / 3), where n counts the others who gave the answer.

    >>> leave_one_out(3)
    0.9
    """
    thirds = matching * min(3, matching - 1) + (annotators - matching) * min(3, matching)
    return thirds / (3 * annotators)


def soft_targets(answers: Iterable[str], index: Mapping[str, int]) -> dict[int, float]:
    """The score of every annotator's answer that is in a vocabulary (string -> index).

    Strings are compared unchanged, as in ViLT, METER and PuMer; other answers are dropped.
    """
    return {
        index[answer]: leave_one_out(n) for answer, n in Counter(answers).items() if answer in index
    }


def scores_in_words(answers: Sequence[str]) -> dict[str, float]:
    """The official score of every normalised answer, the most frequent first."""
    frequent = [answer for answer, _ in Counter(map(normalize, answers)).most_common()]
    return {answer: vqa_score(answer, answers) for answer in frequent}


def build_vocabulary(
    answers: Iterable[str], min_count: int = 9, order: Literal["sorted", "first"] = "sorted"
) -> tuple[str, ...]:
    """The normalized answers that are the `multiple_choice_answer` of at least `min_count`
    questions.

    `order`: "sorted" as in PuMer, or "first" by first appearance (train, then val) as in ViLT and
    METER; heads trained with one order are meaningless in the other. All of VQAv2 train and val
    gives 3129 answers. Raises ValueError if no answer is frequent enough.

    >>> build_vocabulary(["Yes", "yes", "no"], min_count=2)
    ('yes',)
    """
    counts = Counter(map(normalize, answers))
    labels = [answer for answer, count in counts.items() if count >= min_count]
    if not labels:
        raise ValueError(
            f"none of {len(counts)} answers has {min_count} questions; lower min_count."
        )
    return tuple(sorted(labels) if order == "sorted" else labels)


def vocabulary_of(id2label: Mapping[int, str]) -> tuple[str, ...]:
    """The answers of a model's VQA head, from `config.id2label`; raises ValueError if it does not
    name them."""
    if sorted(id2label) != list(range(len(id2label))) or id2label.get(0) == "LABEL_0":
        raise ValueError(
            "the model's config.id2label names no answers; set it to the answers its head was "
            "trained on."
        )
    return tuple(id2label[i] for i in range(len(id2label)))


def write_answers(
    path: str | Path, predictions: Mapping[Any, Any], examples: Sequence[Example]
) -> None:
    """Write the JSON list that EvalAI takes, with every question once, atomically.

    Raises:
        ValueError: for missing or unknown ids, and for predictions that are not strings.
    """
    rows = [
        {"question_id": key, "answer": predictions[key]} for key in check_ids(predictions, examples)
    ]
    invalid_ids = [row["question_id"] for row in rows if not isinstance(row["answer"], str)]
    if invalid_ids:
        raise ValueError(
            f"{count_of(invalid_ids, len(rows), 'predictions')} are no strings; give the "
            "answers' words."
        )
    with replacing(path) as file:
        json.dump(rows, file)
