"""Reduction inside the vision tower of a model that decodes.

Behind the tower all is as ever: every patch has the states of the token that it was merged into, so
that what follows, such as a projector that takes squares of patches, finds as many as it expects.
The language model then gets one token of each group (`reduce.py`).

Shape suffixes: R crops, N tokens of the tower, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.decoder.captured import Captured
from pumer.adapters.decoder.parts import tower_layers
from pumer.adapters.decoder.spec import DecoderSpec
from pumer.adapters.decoder.vision import VisionCapture
from pumer.adapters.encoder.reduce import EncoderLayout
from pumer.adapters.tower.axis import Rows
from pumer.adapters.tower.packed import Packed
from pumer.adapters.tower.run import Axis, TowerRun, TowerSpec, current_run, install
from pumer.reducers import Plan


def install_tower(
    patch: Patch, spec: DecoderSpec, model: nn.Module, capture: VisionCapture
) -> None:
    """Have the vision tower of a model reduced, if a reducer acts there."""
    if patch.traits.vision_reducer is None:
        return
    vision, trunk = spec.vision(model), spec.trunk(model)
    tower = TowerSpec(spec.tower_acts(model), spec.feature_depth(model), own_kernel=True)
    begin = partial(_begin, patch, spec, trunk, capture)
    finish = partial(_finish, patch, spec, trunk, capture)
    install(patch, vision, tower_layers(vision), tower, begin, finish, capture.is_image)
    for merger in spec.tower_mergers(model):
        patch.hook(merger.register_forward_hook(partial(_merged, patch)))


def _begin(
    patch: Patch,
    spec: DecoderSpec,
    trunk: Any,
    capture: VisionCapture,
    embeddings: Tensor,
    inputs: dict[str, Any],
    masked: bool,
) -> tuple[Axis, EncoderLayout]:
    """The axis of the images of a call."""
    captured = capture.current
    assert captured is not None
    unit = spec.patches_per_token(trunk)
    grids = spec.tower_grids(trunk, captured)
    if grids is not None:
        windows = spec.tower_windows(trunk, captured)
        device, grid = embeddings.device, grids[0] if len(set(grids)) == 1 else None
        packed = Packed.of(grids, unit, spec.grouped, windows, device)
        return packed, packed.layout(embeddings, grid, None)
    axis = Rows.of(embeddings, int(spec.has_class_token(trunk)), unit)
    units = math.isqrt((embeddings.shape[1] - axis.num_prefix_tokens) // unit)
    mask = inputs.get(spec.tower_mask) if masked else None
    mask_RP = None if mask is None else mask.flatten(1)
    return axis, axis.layout(embeddings, (units, units), mask_RP)


def _finish(
    patch: Patch,
    spec: DecoderSpec,
    trunk: Any,
    capture: VisionCapture,
    run: TowerRun,
    output: Any,
) -> Any:
    """The tower's output with states of every patch, and where the patches went."""
    captured = capture.current
    assert captured is not None
    patch.tower = [run.lengths[0], *(run.lengths[layer + 1] for layer in run.spec.acts)]
    if run.plan is not None:
        captured.merged = _plans(spec, trunk, captured, run)
    output.last_hidden_state = run.leave(output.last_hidden_state)
    if output.get("hidden_states") is not None:
        # The first are the embeddings, which the layers got in the tower's order.
        output.hidden_states = tuple(
            states if states is None or layer_index == 0 else run.leave(states, layer_index)
            for layer_index, states in enumerate(output.hidden_states)
        )
    return output


def _merged(patch: Patch, _: nn.Module, args: Any, output: Tensor) -> Tensor | None:
    """Behind a module of the tower that makes one vector of every unit: one for all of a group."""
    run = current_run(patch)
    if run is None or not isinstance(run.axis, Packed):
        return None
    return run.axis.leave_units(output, run.plan)


def _plans(spec: DecoderSpec, trunk: Any, captured: Captured, run: TowerRun) -> list[Plan]:
    """Where the units of every image went, in the order of the prompt: plans of one row."""
    assert run.plan is not None
    if isinstance(run.axis, Rows):
        plan = run.plan.tail(run.axis.num_prefix_tokens)
        return [plan.rows([row]) for row in range(len(plan.slot_BN))]
    assert run.axis is not None
    order, start, plans = spec.token_order(trunk, captured), 0, []
    for row, length in enumerate(run.axis.entered):
        plan = run.plan.rows([row])
        index = torch.arange(length)
        if order is not None:
            index = order[start : start + length] - start
        start += length
        index = index.to(plan.slot_BN.device)
        plans.append(Plan(plan.slot_BN[:, index], plan.weight_BN[:, index], plan.mask_BK))
    return plans


def stack_plans(plans: Sequence[Plan]) -> Plan:
    """One plan for all images, each a row of as many tokens and slots as the largest has."""
    tokens = max(plan.slot_BN.shape[1] for plan in plans)
    slots = max(plan.slots for plan in plans)

    def padded(x_1N: Tensor, length: int, value: Any) -> Tensor:
        return nn.functional.pad(x_1N, (0, length - x_1N.shape[1]), value=value)

    if all(plan.slot_BN.shape[1] == tokens and plan.slots == slots for plan in plans):
        return Plan.stack(plans)
    return Plan(
        torch.cat([padded(plan.slot_BN, tokens, -1) for plan in plans]),
        torch.cat([padded(plan.weight_BN, tokens, 0.0) for plan in plans]),
        torch.cat([padded(plan.mask_BK, slots, False) for plan in plans]),
    )
