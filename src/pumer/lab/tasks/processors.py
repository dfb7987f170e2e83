"""Questions for models with a processor: all of transformers' decoders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor

from pumer.lab.data.text import TextTransform, load_tokenizer
from pumer.lab.data.transforms import has_transform, load_transform
from pumer.lab.tasks.base import NO_TEXT, Collator, Example, Task
from pumer.lab.tasks.prompts import GenerativeCollator, collator_for, is_generative
from pumer.models.llava import IMAGE

Conversation = Sequence[Mapping[str, Any]]
"""Messages of one chat: `role`, and `content` of parts with `type` "image", or "text" and the
`text`."""
SHORT = "Answer the question using a single word or phrase."
"""The instruction after a question in LLaVA 1.5's training and evaluation."""


@dataclass(frozen=True, kw_only=True)
class ProcessorCollator(GenerativeCollator):
    """Batch a task's examples with a model's processor: everything that `generate` takes.

    Every example becomes a chat of one message: its images, the question, and `instruction` on its
    own line. Prompts are padded on the left. `blind` works as for every task.

    Args:
        processor: as `read_processor` returns it.
        instruction: how to answer.
        dtype: of the model, for floating-point inputs.

    Raises:
        ValueError: for tasks without answers in words, and for empty questions.
    """

    processor: Any
    instruction: str = SHORT
    dtype: torch.dtype = torch.float32

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        names = [example.id for example in examples]
        texts = [NO_TEXT if self.blind == "image" else example.text for example in examples]
        prompts = [
            write(
                self.processor,
                [{"role": "user", "content": [*self._images(example), self._text(text)]}],
            )
            for example, text in zip(examples, self.text.cut(texts, names), strict=True)
        ]
        loaded: list[Any] = self.load_images(examples)
        first, images = 0, []
        for example in examples:
            images.append(loaded[first : first + len(example.images)])
            first += len(example.images)
        batch = encode(self.processor, prompts, images)
        return {name: x.to(self.dtype) if x.is_floating_point() else x for name, x in batch.items()}

    def _images(self, example: Example) -> list[dict[str, str]]:
        return [{"type": "image"} for _ in example.images]

    def _text(self, text: str) -> dict[str, str]:
        return {"type": "text", "text": f"{text}\n{self.instruction}" if self.instruction else text}


def saved_collator(source: str, model: Any, task: Task) -> Collator:
    """The collator of a task for a saved model, with its tokenizer and its image transform or
    processor.

    Args:
        source: the model's folder; for generative models also a name on the Hub.
        model: with its configuration.
        task: see `prompts.vocabulary`.

    Raises:
        ValueError: like the collators, and if there is neither transform nor processor.
    """
    if is_generative(model) and not has_transform(source):
        return processor_collator(model, task, read_processor(source))
    return collator_for(model, task, load_tokenizer(source), load_transform(source))


def processor_collator(model: Any, task: Task, processor: Any) -> ProcessorCollator:
    """The collator of a task for a model with its processor; raises ValueError like
    `ProcessorCollator`."""
    longest = min(
        model.config.get_text_config().max_position_embeddings, processor.tokenizer.model_max_length
    )
    text = TextTransform(processor.tokenizer, longest)
    return ProcessorCollator(task, text, _as_it_is, processor=processor, dtype=model.dtype)


def read_processor(source: str, **settings: Any) -> Any:
    """The processor in a folder or on the Hub, set to pad prompts on the left."""
    try:
        processor = AutoProcessor.from_pretrained(source, **{"trust_remote_code": False} | settings)
    except OSError:
        processor = None
    if not hasattr(
        processor, "tokenizer"
    ):  # of a folder with a part of a processor transformers takes that part
        raise ValueError(
            f"{source} has no processor: save the model's with "
            f"processor.save_pretrained({source!r})"
        )
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def save_processor(config: Any, folder: str | Path) -> None:
    """Write `processor_config.json` for a LLaVA, so that AutoProcessor loads its tokenizer and
    image transform.

    Other families need none.

    Args:
        config: the model's.
        folder: of the model, with both in it.
    """
    if config.model_type != "llava":
        return
    settings = {
        "processor_class": "LlavaProcessor",
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": 1,  # CLIP's [CLS]
        "image_token": IMAGE,
    }
    Path(folder, "processor_config.json").write_text(
        json.dumps(settings, indent=2) + "\n", encoding="utf-8"
    )


def write(processor: Any, messages: Conversation) -> str:
    """A chat in the model's template, with the generation prompt; without a template, its images
    and then its texts."""
    template = processor.chat_template or processor.tokenizer.chat_template
    if template is not None:
        text: str = processor.apply_chat_template(
            messages, template, tokenize=False, add_generation_prompt=True
        )
        return text
    parts = [part for message in messages for part in message["content"]]
    words = "\n".join(part["text"] for part in parts if part["type"] == "text")
    return str(processor.image_token) * sum(part["type"] == "image" for part in parts) + words


def encode(processor: Any, prompts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> Any:
    """A batch of prompts with their images as model inputs; either all prompts have images or none
    has."""
    bos = processor.tokenizer.bos_token
    begun = bos is not None and prompts[0].startswith(bos)
    batch = processor(
        text=list(prompts),
        images=[list(prompt_images) for prompt_images in images] if any(images) else None,
        padding=True,
        return_tensors="pt",
        **({"add_special_tokens": False} if begun else {}),  # some templates add the first token
    )
    batch.pop("labels", None)  # PaliGemma's processor always returns some
    return batch


def _as_it_is(image: Image.Image) -> Any:
    """Identity: the processor transforms images."""
    return image
