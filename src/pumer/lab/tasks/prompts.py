"""Tasks for generative models: a question becomes a prompt with an image, the answer is the
generated text.

Shape suffixes: B examples, S tokens, P patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pumer.lab.data.images import ImageTransform, pad_images
from pumer.lab.data.text import TextTransform
from pumer.lab.tasks.base import NO_TEXT, Collator, Example, Task, extra_targets
from pumer.lab.tasks.labels import check_fit, label_names, label_order
from pumer.lab.tasks.vqa_answers import normalize
from pumer.models.sizes import longest_text

IGNORED = -100
"""Label of tokens without a loss."""
MAX_ANSWER = 10
"""Longest answer in tokens."""


def is_generative(model: nn.Module) -> bool:
    """Whether a model generates its answers, as opposed to classifying."""
    able = getattr(model, "can_generate", None)
    return able is not None and bool(able())


@dataclass(frozen=True)
class GenerativeCollator(Collator):
    """Batch a task's examples for a generative model, and decode its answers.

    Raises:
        ValueError: for tasks without answers in words.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task.loss_kind not in ("soft", "none"):
            raise ValueError(
                f"{self.task.name} has no answers in words, which generative models give: use "
                "vqav2 or scenes"
            )

    def read(self, written_BS: Tensor) -> list[str]:
        """Answers from generated tokens, normalized as VQA's official evaluator does."""
        return [
            normalize(text)
            for text in self.text.tokenizer.batch_decode(written_BS, skip_special_tokens=True)
        ]


@dataclass(frozen=True, kw_only=True)
class PromptCollator(GenerativeCollator):
    """Batch examples for a LLaVA with one of our tokenizers and image transforms, for inference or
    training.

    Every example becomes a prompt in the tokenizer's chat template, image first. Questions longer
    than the text transform's `max_length` tokens are cut, the template around them is not. Returns
    `input_ids` and `attention_mask` [B,S], padded on the left, and `pixel_values` [B,3,H,W]. With
    `teach` the answers and their end tokens follow the prompts, and `labels` [B,S] are `IGNORED`
    everywhere else; `patch_labels` are added where examples have them. `blind` works as for every
    task.

    Args:
        image_token: id of the image placeholder token.
        image_tokens: number of placeholder tokens per image.
        teach: append the answers, with labels.

    Raises:
        ValueError: for tasks without answers in words, tokenizers without chat template or end
            token, empty questions, and questions that contain the image token.
    """

    image_token: int
    image_tokens: int
    teach: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text.tokenizer.chat_template is None:
            raise ValueError(
                "the tokenizer has no chat template to put questions into: set "
                "tokenizer.chat_template to the one that the model was trained with, and save it "
                "again"
            )
        if self.text.tokenizer.eos_token_id is None:
            raise ValueError(
                "the tokenizer has no token that ends an answer: set tokenizer.eos_token"
            )

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        names = [example.id for example in examples]
        texts = [NO_TEXT if self.blind == "image" else example.text for example in examples]
        prompts = [
            self.prompt(text, name)
            for text, name in zip(self.text.cut(texts, names), names, strict=True)
        ]
        answers = [self.answer(example) if self.teach else [] for example in examples]
        length = max(
            len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)
        )
        shape = len(examples), length
        ids_BS = torch.full(shape, self.text.tokenizer.pad_token_id)
        mask_BS, labels_BS = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            start = length - len(prompt) - len(answer)
            ids_BS[row, start:] = torch.tensor(prompt + answer)
            mask_BS[row, start:] = 1
            labels_BS[row, length - len(answer) :] = torch.tensor(answer, dtype=torch.int64)
        batch = {"input_ids": ids_BS, "attention_mask": mask_BS}
        batch["pixel_values"], _ = pad_images(self.load_images(examples))
        return batch | {"labels": labels_BS} | extra_targets(examples) if self.teach else batch

    def prompt(self, question: str, name: Any) -> list[int]:
        """Token ids of a question about an image; `name` is for errors."""
        tokenizer = self.text.tokenizer
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        begun = tokenizer.bos_token is not None and text.startswith(
            tokenizer.bos_token
        )  # some templates add it
        ids: list[int] = tokenizer(text, add_special_tokens=not begun)["input_ids"]
        if ids.count(self.image_token) != 1:
            raise ValueError(
                f"the prompt of question {name} has {ids.count(self.image_token)} image tokens, "
                "not 1: a question must not contain one, the chat template must put in one"
            )
        position = ids.index(self.image_token)
        return ids[:position] + [self.image_token] * self.image_tokens + ids[position + 1 :]

    def answer(self, example: Example) -> list[int]:
        """Token ids of an example's best answer, with the end token."""
        words = best_answer(self.task, example)
        ids = self.text.tokenizer(words, add_special_tokens=False)["input_ids"]
        return [*ids, self.text.tokenizer.eos_token_id]


def best_answer(task: Task, example: Example) -> str:
    """The answer with the highest score; raises ValueError if there is none."""
    if not example.target:
        raise ValueError(f"question {example.id} has no answer to learn from: leave it out")
    best = max(example.target, key=example.target.get)
    return best if isinstance(best, str) else task.labels[best]


def collator_for(
    model: Any,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    image: ImageTransform,
    max_length: int | None = None,
) -> Collator:
    """The collator of a task for a model, classifying or generative.

    Args:
        model: with its configuration.
        task: see `vocabulary`.
        tokenizer: the model's.
        image: the model's image transform.
        max_length: longest text in tokens; as in the model's training if not given.

    Raises:
        ValueError: for a model that does not fit the task, see `labels.check_fit` and
            `labels.label_order`; for generative models with an unknown prompt format, and see
            `PromptCollator`.
    """
    longest = (
        model.config.get_text_config().max_position_embeddings
        if is_generative(model)
        else longest_text(model.config)
    )
    transform = TextTransform(tokenizer, max_length or min(longest, tokenizer.model_max_length))
    if not is_generative(model):
        check_fit(model, task)
        order = None if task.loss_kind in ("rank", "none") else label_order(model.config, task)
        return Collator(task, transform, image, order=order)
    return PromptCollator(
        task,
        transform,
        image,
        image_token=model.config.image_token_id,
        image_tokens=image_tokens(model.config),
    )


def vocabulary(model: Any) -> list[str]:
    """The labels of a classifying model; empty for generative ones."""
    return [] if is_generative(model) else label_names(model.config)


def image_tokens(config: Any) -> int:
    """Number of placeholder tokens per image; raises ValueError for families with other prompts."""
    if config.model_type != "llava":
        raise ValueError(
            "without a processor prompts are written for LlavaForConditionalGeneration alone, not "
            f"for {config.model_type}: save the model's processor beside it"
        )
    side = config.vision_config.image_size // config.vision_config.patch_size
    return int(side**2) + (config.vision_feature_select_strategy == "full")
