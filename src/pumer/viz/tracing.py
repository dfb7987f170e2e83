"""Run a reduced model and follow its tokens: `token_map` and `token_maps`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pumer.adapters import ReductionStep
from pumer.adapters.decoder.prompt import PromptStep
from pumer.api import trace
from pumer.viz.maps import LayerMap, TokenMap


def token_map(model: nn.Module, inputs: Mapping[str, Tensor], words: Sequence[str]) -> TokenMap:
    """Run a reduced model on one image and text, and return where every token went.

    Args:
        model: patched with a reducer.
        inputs: of a batch of one, without padding.
        words: the text's tokens, as many as `input_ids` has.

    Raises:
        ValueError: for a larger batch, for several images, and for a model that nothing reduces or
            that has reduced nothing.
    """
    maps = token_maps(model, inputs, words)
    if len(maps) > 1:
        raise ValueError(
            f"{len(maps)} images went through the model: token_maps gives a map of each"
        )
    return maps[0]


@torch.inference_mode()
def token_maps(
    model: nn.Module, inputs: Mapping[str, Tensor], words: Sequence[str]
) -> tuple[TokenMap, ...]:
    """A `token_map` of every image of a prompt; arguments and errors are the same."""
    if len(inputs["input_ids"]) != 1:
        raise ValueError("a token map is of one image and one text: pass a batch of one")
    if len(words) != inputs["input_ids"].shape[1]:
        raise ValueError(
            f"there are {len(words)} words for {inputs['input_ids'].shape[1]} tokens: give one "
            "for each"
        )
    with trace(model) as steps:
        model(**inputs)
    if steps and steps[0].prompt is not None:
        return _prompt_maps(steps, words)
    if not steps or steps[0].patch_BN is None or steps[0].grid is None:
        raise ValueError(
            "nothing was reduced, so there is nothing to show: apply a reducer that reduces"
        )
    if len({step.layer for step in steps}) < len(steps):
        raise ValueError("two images went through the model: a token map is of one")
    return (_encoder_map(steps, words),)


def _encoder_map(steps: Sequence[ReductionStep], words: Sequence[str]) -> TokenMap:
    text, patches = steps[0].text, steps[0].patch_BN[0].tolist()
    assert steps[0].grid is not None
    rows, columns = steps[0].grid
    layers, plan = [], None
    for step in steps:
        plan = step.plan if plan is None else plan.then(step.plan)
        layers.append(_layer_map(step.layer, plan.slot_BN[0].tolist(), patches, text))
    return TokenMap(rows, columns, tuple(words), tuple(layers))


def _prompt_maps(steps: Sequence[ReductionStep], words: Sequence[str]) -> tuple[TokenMap, ...]:
    """A map of every image in a decoder's prompt; all have the same words."""
    first: PromptStep = steps[0].prompt
    assert first.image_BS is not None
    patches = [position for position, is_patch in enumerate(first.image_BS[0].tolist()) if is_patch]
    placeholders = {words[position] for position in patches}
    # Placeholders side by side, rows' ends among them, are one chip.
    chips: list[list[int]] = []
    for word_index, word in enumerate(words):
        if word in placeholders and chips and words[chips[-1][0]] in placeholders:
            chips[-1].append(word_index)
        else:
            chips.append([word_index])
    labels = tuple(words[chip[0]] + (f" x {len(chip)}" if len(chip) > 1 else "") for chip in chips)
    maps, start = [], 0
    for _, count, grid in first.images:
        image_patches = patches[start : start + count]
        start += count
        columns = grid[1] if grid else math.ceil(math.sqrt(count))
        layers = tuple(
            _prompt_layer(step, image_patches, chips, words, placeholders) for step in steps
        )
        rows = grid[0] if grid else math.ceil(count / columns)
        maps.append(TokenMap(rows, columns, labels, layers, decoder=True, raster=grid is not None))
    return tuple(maps)


def _prompt_layer(
    step: ReductionStep,
    patches: Sequence[int],
    chips: Sequence[Sequence[int]],
    words: Sequence[str],
    placeholders: set[str],
) -> LayerMap:
    """What one reduction left of an image, whose patches stand at these places, and of the
    words."""
    slots = step.prompt.slot_BS[0].tolist()
    image = _groups({patch: slots[position] for patch, position in enumerate(patches)})
    # A placeholder's chip stays: the panel above says what is left of it.
    text = {
        chip_index: slots[chip[0]] if words[chip[0]] not in placeholders else ("image", chip_index)
        for chip_index, chip in enumerate(chips)
    }
    groups = _groups(text)
    return LayerMap(
        step.layer,
        tuple(group[0] for group in image if len(group) == 1),
        tuple(group for group in image if len(group) > 1),
        tuple(patch for patch, position in enumerate(patches) if slots[position] < 0),
        tuple(groups),
        tuple(chip_index for chip_index, slot in text.items() if slot == -1),
    )


def _groups(slots: Mapping[int, Any]) -> list[tuple[int, ...]]:
    """Tokens that share a slot, in the order of their first; those that are gone are left out."""
    groups: dict[Any, list[int]] = {}
    for token, slot in slots.items():
        if slot != -1:
            groups.setdefault(slot, []).append(token)
    return sorted(tuple(group) for group in groups.values())


def _layer_map(layer: int, slots: list[int], patches: list[int], text: int) -> LayerMap:
    members: dict[int, list[int]] = {}
    words: dict[int, list[int]] = {}
    dropped, text_dropped = [], []
    for source, (slot, patch) in enumerate(zip(slots, patches, strict=True)):
        if source < text:
            words.setdefault(slot, []).append(source) if slot >= 0 else text_dropped.append(source)
        elif patch >= 0:
            members.setdefault(slot, []).append(patch) if slot >= 0 else dropped.append(patch)
    groups = sorted(tuple(sorted(group)) for group in members.values())
    return LayerMap(
        layer,
        tuple(group[0] for group in groups if len(group) == 1),
        tuple(group for group in groups if len(group) > 1),
        tuple(sorted(dropped)),
        tuple(sorted(tuple(group) for group in words.values())),
        tuple(text_dropped),
    )
