"""The beginning of a call that brings images: where images, question and answers lie in the
prompts.

Shape suffixes: B samples, S tokens of the prompts, L tokens of cache and prompts, P crops.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder import vision as before_llm
from pumer.adapters.decoder.prompt import Axis, ForwardState
from pumer.adapters.decoder.spec import DecoderSpec

IGNORED = -100
"""Label of tokens that are not learned."""
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
"""Arguments by which others say where the samples of a packed row end."""


def check_inputs(inputs: dict[str, Any]) -> None:
    """Raise ValueError for a prefill that cannot be reduced."""
    kv_cache.check(kv_cache.find(inputs))
    mask = inputs.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        raise ValueError(
            "a reduced model takes a two-dimensional attention_mask, 1 for tokens and 0 for padding"
        )
    restarts = _restarts(inputs.get("position_ids"), mask)
    if restarts or any(inputs.get(name) is not None for name in PACKED):
        raise ValueError(
            "several samples are packed into one row, whose images cannot be reduced as if each "
            "was alone: give every sample a row of its own, padded, or take the reducer off "
            "(pumer.remove) for packed batches"
        )


def _restarts(position_ids: Tensor | None, mask: Tensor | None) -> bool:
    """Whether positions begin again behind a real token, as those of a packed row do; the host
    waits to know."""
    if position_ids is None or position_ids.shape[-1] < 2:
        return False
    # Of several kinds of positions (time, row, column) those of an image go back too, but not all
    # to zero.
    zero_BS = position_ids == 0 if position_ids.ndim == 2 else (position_ids == 0).all(0)
    back_BS = zero_BS[:, 1:]
    if position_ids.ndim == 2:
        back_BS = back_BS | (position_ids[:, 1:] <= position_ids[:, :-1])
    if mask is not None:
        real_BS = mask[:, -position_ids.shape[-1] :].to(position_ids.device).bool()
        back_BS = back_BS & real_BS[:, 1:] & real_BS[:, :-1]
    return bool(back_BS.any())


def may_be_merged(inputs: dict[str, Any]) -> bool:
    """Whether a prompt is given in such a way that images may be in it already, which nobody can
    tell."""
    embeddings = inputs.get("inputs_embeds")
    if embeddings is None or inputs.get("input_ids") is not None or embeddings.shape[1] < 2:
        return False
    return kv_cache.length(kv_cache.find(inputs)) == 0


def begin(
    spec: DecoderSpec, trunk: Any, state: ForwardState, image_BS: Tensor, features: int
) -> None:
    """Take in the prompts, whose placeholders are marked: the one place where the host reads from
    the device.

    Args:
        spec: of the family.
        trunk: the model without its head.
        state: of the call.
        image_BS: bool, the placeholders.
        features: how many of them the images fill.

    Raises:
        ValueError: for placeholders that do not match the images.
    """
    batch, state.length = image_BS.shape
    device, inputs = image_BS.device, state.inputs
    mask_BL = inputs.get("attention_mask")
    state.mask_BL = None if mask_BL is None else mask_BL.to(device).bool()
    real_BS = torch.ones_like(image_BS)
    if state.mask_BL is not None:
        real_BS = state.mask_BL[:, -state.length :]
    crops = spec.tiles(trunk, image_BS, features, inputs)
    word_BS = real_BS & ~spec.no_text(trunk, image_BS, crops, inputs)
    text_BS, question_BS = _question(state.call_kwargs, word_BS, image_BS)
    # Real tokens that no reducer is shown. Where all tokens see each other, answers are seen by
    # none.
    hidden_BS = real_BS & ~image_BS & ~text_BS
    if not spec.causal:
        hidden_BS = hidden_BS & ~word_BS

    per_sample = [mask.sum(1) for mask in (text_BS, image_BS, hidden_BS)]
    joined = [] if crops is None else [crops.joined_P.long()]
    counts = torch.cat([*per_sample, *joined]).tolist()
    texts, images, hidden = (counts[start * batch : (start + 1) * batch] for start in range(3))
    state.pictures, state.owners = before_llm.assign(state.images, images)
    if crops is not None:
        state.pictures, state.owners = before_llm.join(
            state.pictures, state.owners, counts[3 * batch :]
        )

    patches = [0] * batch
    for picture, sample in zip(state.pictures, state.owners, strict=True):
        patches[sample] += picture.patches
    state.rest = [state.length - text - patch for text, patch in zip(texts, patches, strict=True)]
    # Placeholders that are no patches, such as the ends of rows, are keys of the text as well.
    state.hidden = [
        other + image - patch for other, image, patch in zip(hidden, images, patches, strict=True)
    ]
    patch_BS = before_llm.patches(image_BS, state.pictures)
    state.axis = Axis(
        index_BK=torch.arange(state.length, device=device).expand(batch, state.length),
        filled_BK=None,
        text_BK=text_BS,
        image_BK=patch_BS,
        question_BK=question_BS,
        hidden_BK=hidden_BS | image_BS & ~patch_BS,
        sizes_BK=torch.ones(batch, state.length, device=device),
        counts=tuple(zip(texts, patches, strict=True)),
    )
    grids = {picture.grid for picture in state.pictures}
    state.entry = (*state.axis.lengths, grids.pop() if len(grids) == 1 else None)


def _question(
    call_kwargs: dict[str, Any], word_BS: Tensor, image_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Words that a reducer is shown, and those of them that are the question; both bool [B,S].

    What is being learned, scored or checked must not guide what is kept: it was not there when the
    answer was written. The prompt ends before the first token with a label, and before the last
    `logits_to_keep - 1` ones where these are being scored: that is so in assisted generation, which
    gives a cache, and with trainers of policies, which give `use_cache=False`. Who asks for the
    last logits of a prompt does neither. `question_mask` says outright which words are the prompt.
    The question itself is what stands behind the last image, if anything does.
    """
    length = word_BS.shape[1]
    prompt_BS = word_BS
    labels, scored = call_kwargs.get("labels"), call_kwargs.get("logits_to_keep")
    asked_BL = call_kwargs.get("question_mask")
    if asked_BL is not None:
        prompt_BS = prompt_BS & _of_tokens(asked_BL, word_BS)
    if labels is not None:
        learned_BS = labels.to(word_BS.device) != IGNORED
        prompt_BS = prompt_BS & (learned_BS.cumsum(1) == 0)
    scoring = kv_cache.find(call_kwargs) is not None or call_kwargs.get("use_cache") is False
    if scoring and isinstance(scored, int) and 1 < scored <= length:
        tail_S = torch.arange(length, device=word_BS.device) > length - scored
        # Who wants the logits of images too scores no answer.
        tail_BS = tail_S & ~(image_BS & tail_S).any(1, keepdim=True)
        prompt_BS = prompt_BS & ~tail_BS
    if prompt_BS is not word_BS:
        prompt_BS = torch.where(prompt_BS.any(1, keepdim=True), prompt_BS, word_BS)
    prompt_BS = prompt_BS & image_BS.any(1, keepdim=True)  # a prompt without images is left alone
    behind_BS = prompt_BS & (image_BS.flip(1).cumsum(1).flip(1) == 0)
    return prompt_BS, torch.where(behind_BS.any(1, keepdim=True), behind_BS, prompt_BS)


def _of_tokens(mask: Tensor, word_BS: Tensor) -> Tensor:
    """The part of a mask that is of these tokens; what is before it is of those in the cache."""
    batch, length = word_BS.shape
    if mask.ndim != 2 or len(mask) != batch or mask.shape[1] < length:
        raise ValueError(
            f"question_mask is [{batch},{length}] for these prompts, 1 for words of the question "
            f"and 0 for others, not {list(mask.shape)}"
        )
    return mask[:, -length:].to(word_BS.device).bool()
