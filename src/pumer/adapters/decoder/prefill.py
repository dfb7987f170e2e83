"""The beginning of a call that brings images: where images, question and answers are in the
prompts.

Shape suffixes: B samples, S tokens of the prompts, L tokens of cache and prompts, P crops, I image
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pumer.adapters.decoder import kv_cache
from pumer.adapters.decoder.prompt import (
    ForwardState,
    ImageSpan,
    TokenLayout,
    inside_images,
    join_spans,
    to_device,
)
from pumer.adapters.decoder.spec import DecoderSpec

IGNORED = -100
"""Label of tokens that are not trained on."""
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "seq_idx")
"""Arguments that say where the samples of a packed row end."""


def check_inputs(inputs: dict[str, Any]) -> None:
    """Raise ValueError for a prefill that cannot be reduced."""
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


def padding_mask(mask: Any) -> Any:
    """Which tokens are real, where masks for every type of layer are given: what the last token
    sees."""
    if not isinstance(mask, dict) or "full_attention" not in mask:
        return mask
    mask = mask["full_attention"]
    if mask is None or mask.ndim == 2:
        return mask
    last_BL = mask[:, 0, -1]
    return last_BL if last_BL.dtype == torch.bool else last_BL == 0


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
    """Whether a prompt comes as embeddings alone, into which images may be merged already."""
    embeddings = inputs.get("inputs_embeds")
    if embeddings is None or inputs.get("input_ids") is not None or embeddings.shape[1] < 2:
        return False
    return kv_cache.length(kv_cache.find(inputs)) == 0


def begin_prefill(
    spec: DecoderSpec, trunk: Any, state: ForwardState, image_BS: Tensor, num_features: int
) -> None:
    """Find text and images in the prompts: the one place where the host reads from the device.

    Args:
        spec: of the family.
        trunk: the model without its head.
        state: of the call.
        image_BS: bool, the placeholders.
        num_features: image features in all, one for each placeholder.

    Raises:
        ValueError: for placeholders that do not match the images, and for prompts of which nothing
            would be left.
    """
    batch, state.length = image_BS.shape
    device, inputs = image_BS.device, state.inputs
    mask_BL = inputs.get("attention_mask")
    state.mask_BL = None if mask_BL is None else mask_BL.to(device).bool()
    real_BS = torch.ones_like(image_BS)
    if state.mask_BL is not None:
        real_BS = state.mask_BL[:, -state.length :]
    crops = spec.crop_groups(trunk, image_BS, num_features, inputs)
    lengths = [image.length for image in state.tower_images]
    structure_BS = inside_images(image_BS, lengths, num_features)
    word_BS = real_BS & ~structure_BS & ~spec.non_text_mask(trunk, image_BS, crops, inputs)
    call_kwargs = state.call_kwargs
    if not spec.answers_in_prompt:
        call_kwargs = {"question_mask": call_kwargs.get("question_mask")}
    text_BS, question_BS = _question(call_kwargs, word_BS, image_BS)
    # Real tokens that no reducer sees, but the text does. Where all tokens see each other, nothing
    # may look at the answer.
    hidden_BS = real_BS & ~image_BS & ~text_BS
    if not spec.causal:
        hidden_BS = hidden_BS & ~word_BS

    # Everything that the host has to know, in one transfer.
    per_sample = [mask.sum(1) for mask in (text_BS, image_BS, hidden_BS)]
    joined = [] if crops is None else [crops.joined_P.long()]
    counts = torch.cat([*per_sample, *joined]).tolist()
    num_text, num_placeholders, num_hidden = (
        counts[start * batch : (start + 1) * batch] for start in range(3)
    )
    state.images, state.sample_index = match_images_to_placeholders(
        state.tower_images, num_placeholders
    )
    if crops is not None:
        state.images, state.sample_index = group_crops(
            state.images, state.sample_index, counts[3 * batch :]
        )

    num_patches = [0] * batch
    for image, sample in zip(state.images, state.sample_index, strict=True):
        num_patches[sample] += image.num_patches
    state.num_untouched = [
        state.length - text - patches for text, patches in zip(num_text, num_patches, strict=True)
    ]
    # Placeholders that are no patches, such as the ends of rows, are keys of the text as well.
    state.num_hidden = [
        hidden + placeholders - patches
        for hidden, placeholders, patches in zip(
            num_hidden, num_placeholders, num_patches, strict=True
        )
    ]
    reducer = state.hooks.patch.reducer
    for sample, (patches, text, hidden) in enumerate(
        zip(num_patches, num_text, state.num_hidden, strict=True)
    ):
        if reducer.traits.drops_image and patches and not text + hidden:
            raise ValueError(
                f"prompt {sample} is only an image, of which {reducer.name} leaves no token: add "
                "words to the same call, or choose another reducer"
            )
    patch_BS = patch_mask(image_BS, state.images)
    state.layout = TokenLayout(
        index_BK=torch.arange(state.length, device=device).expand(batch, state.length),
        filled_BK=None,
        text_BK=text_BS,
        image_BK=patch_BS,
        question_BK=question_BS,
        hidden_BK=hidden_BS | image_BS & ~patch_BS,
        sizes_BK=torch.ones(batch, state.length, device=device),
        counts=tuple(zip(num_text, num_patches, strict=True)),
    )
    grids = {image.grid for image in state.images}
    state.entry = (*state.layout.lengths, grids.pop() if len(grids) == 1 else None)


def _question(
    call_kwargs: dict[str, Any], word_BS: Tensor, image_BS: Tensor
) -> tuple[Tensor, Tensor]:
    """Words that a reducer sees, and those of them that are the question; both bool [B,S].

    An answer that is trained on, scored or verified must not guide what is kept: at inference it
    is not there yet. The prompt ends before the first token with a label, and before the last
    `logits_to_keep - 1` ones where these are being scored: that is so in assisted generation, which
    gives a cache, and with trainers of policies, which give `use_cache=False`. A plain
    call that asks for the last logits of a prompt does neither. `question_mask` says outright which
    words are the prompt. The question itself is the text behind the last image, if there is any.
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
        # A call that asks for logits of image tokens too scores no answer.
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


def match_images_to_placeholders(
    images: Sequence[ImageSpan], num_placeholders: Sequence[int]
) -> tuple[list[ImageSpan], list[int]]:
    """The images of a batch in order and the sample of each.

    Beam search and several returned sequences repeat samples, and their images with them.

    Args:
        images: as they went through the vision tower.
        num_placeholders: of every sample.

    Raises:
        ValueError: where placeholders and images do not match.
    """
    have, need = sum(num_placeholders), sum(image.length for image in images)
    copies, remainder = divmod(have, need) if need else (0, 1)
    mismatch = ValueError(
        f"the prompts have {have} image placeholders and the images {need} features: give every "
        "image its own placeholders, all in one prefill (leave prefill_chunk_size unset)"
    )
    if remainder or not copies or len(num_placeholders) % copies:
        raise mismatch
    matched: list[ImageSpan] = []
    sample_index: list[int] = []
    first = 0
    for sample, count in enumerate(num_placeholders):
        if sample % copies == 0:
            last = first
            while last < len(images) and count > sum(image.length for image in images[first:last]):
                last += 1
            sample_images, first = images[first:last], last
        if sum(image.length for image in sample_images) != count:
            raise mismatch
        matched += sample_images
        sample_index += [sample] * len(sample_images)
    return matched, sample_index


def group_crops(
    crops: Sequence[ImageSpan], sample_index: Sequence[int], joined: Sequence[int]
) -> tuple[list[ImageSpan], list[int]]:
    """Images of one or several crops, and the sample of each.

    Args:
        crops: of all images, in order.
        sample_index: sample of every crop.
        joined: whether each belongs to the image of the one before it.
    """
    groups: list[list[int]] = []
    for crop_index, with_last in enumerate(joined):
        if with_last and groups:
            groups[-1].append(crop_index)
        else:
            groups.append([crop_index])
    images = []
    for group in groups:
        images.append(join_spans([crops[crop_index] for crop_index in group]))
    return images, [sample_index[group[0]] for group in groups]


def patch_mask(image_BS: Tensor, images: Sequence[ImageSpan]) -> Tensor:
    """Which placeholders are patches."""
    if all(image.structure is None for image in images):
        return image_BS
    is_patch = [
        torch.ones(image.length, dtype=torch.bool) if image.structure is None else ~image.structure
        for image in images
    ]
    return torch.zeros_like(image_BS).masked_scatter(
        image_BS, to_device(torch.cat(is_patch), image_BS.device)
    )
