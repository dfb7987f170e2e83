"""Tokens and FLOPs of a model with its reducer, and whether the reduction is active.

Costs are multiply-accumulates (MACs) of matrix products and convolutions per example; FLOPs are
twice that. Additions, norms, activations and softmax are not counted, as in most publications. The
reducer's own cost is a separate part.
"""

from __future__ import annotations

from torch import nn

from pumer.adapters import Adapter, Patch, find, supported
from pumer.adapters.decoder.costs import DecoderCosts
from pumer.api import active
from pumer.costs.decoder import decoding
from pumer.costs.reducer import NO_COST, ReducerCost, count_reducer_costs
from pumer.costs.result import LayerCost, Lengths, Report
from pumer.reducers import EMBEDDINGS, Reducer, TokenShape, Unreduced, to_dict
from pumer.reducers.base import ModelShape
from pumer.reducers.tokens import Grid


def report(model: nn.Module, text: int | None = None, image: int | None = None) -> Report:
    """Tokens and FLOPs per layer of a model with and without its reducer, and whether the
    reduction is active.

    Args:
        model: a supported model, reduced or not.
        text: text tokens at the entry, [CLS] included; default: a full-length text.
        image: image tokens at the entry, [CLS] included; default: an image of the configured size.

    Raises:
        ValueError: for an unsupported model, or lengths below 1.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), "pumer")
        >>> report = pumer.report(model)  # print it: a table, layer by layer
        >>> report.lengths[-1], round(report.ratio, 2)
        ((21, 32), 1.87)
    """
    model = supported(model)
    adapter, patch = find(model), active(model)
    default_text, default_image = adapter.default_lengths(model)
    # The grid of an image of another size is unknown.
    grid = adapter.default_grid(model) if image in (None, default_image) else None
    entry = (default_text if text is None else text, default_image if image is None else image)
    # A vision tower alone has no text.
    if entry[0] < min(1, default_text) or entry[1] < 1:
        raise ValueError(
            f"a text and an image have at least 1 token each, not {entry[0]} and {entry[1]}"
        )
    if entry[0] and not default_text:
        raise ValueError(f"{type(model).__name__} has no text among its images: leave text out")
    depth, forwards_per_example = adapter.depth(model), adapter.forwards_per_example(model)
    reducer = Unreduced() if patch is None else patch.reducer
    tower, lengths, reducer_costs = _plan(reducer, adapter, model, *entry, grid)
    base = [entry] * (depth + 1)
    layers = zip(
        adapter.layer_macs(model, lengths, reducer.traits.post_layer),
        adapter.layer_macs(model, base),
        strict=True,
    )
    ran, planned = _last_forward(patch, adapter, model)
    reducer_cost = forwards_per_example * sum(reducer_costs.values(), NO_COST)
    result = Report(
        model=type(model).__name__,
        reducer=None if patch is None else to_dict(reducer),
        entry=entry,
        lengths=lengths,
        tower=tower,
        layers=tuple(
            LayerCost(
                layer_index,
                *lengths[layer_index + 1],
                forwards_per_example * (sum(macs) + reducer_costs[layer_index].macs),
                forwards_per_example * sum(base_macs),
            )
            for layer_index, (macs, base_macs) in enumerate(layers)
        ),
        parts=adapter.macs(model, lengths, entry, tower, reducer.traits.post_layer)
        | {"reducer": reducer_cost.macs},
        base_parts=adapter.macs(model, base) | {"reducer": 0},
        forwards_per_example=forwards_per_example,
        reducer_cost=reducer_cost,
        ran=ran,
        planned=planned,
    )
    if isinstance(adapter, DecoderCosts) and adapter.decodes:
        return decoding(model, adapter, result)
    return result


def last_forward_macs(model: nn.Module) -> int:
    """Multiply-accumulates per example of the last forward of a reduced model, padding included
    unless rows are packed: then the mean over the rows.

    Raises ValueError if there was none.
    """
    return sum(last_forward_parts(model).values())


def last_forward_parts(model: nn.Module) -> dict[str, int]:
    """`last_forward_macs` by part, as in `Report.parts`; raises ValueError if there was none."""
    model = supported(model)
    adapter, patch = find(model), active(model)
    if patch is None or patch.entry is None:
        raise ValueError("apply a reducer (pumer.Unreduced() for none) and call the model first")
    text, image, grid = patch.entry
    # With a dynamic length the data have decided on the lengths.
    ran = (tuple(patch.tower), tuple(patch.lengths)) if patch.traits.dynamic_length else None
    tower, lengths, reducer_costs = _plan(patch.reducer, adapter, model, text, image, grid, ran)
    # Packed rows cost what each has; a reducer sees them padded.
    rows = list(zip(*patch.rows, strict=True)) or [lengths]
    costs = [
        adapter.macs(model, row, (text, image), tower, patch.traits.post_layer) for row in rows
    ]
    macs = {part: round(sum(cost[part] for cost in costs) / len(costs)) for part in costs[0]}
    return macs | {
        "reducer": adapter.forwards_per_example(model) * sum(reducer_costs.values(), NO_COST).macs
    }


def planned_lengths(
    reducer: Reducer,
    depth: int,
    text: int,
    image: int,
    grid: Grid | None = None,
    num_prefix_tokens: int = 1,
) -> Lengths:
    """(text, image) tokens before the first layer and after every layer of `depth` layers.

    Args:
        reducer: the method and its settings.
        depth: number of layers.
        text: text tokens at the entry, [CLS] included.
        image: image tokens at the entry, [CLS] included.
        grid: rows and columns of patches, for methods that go by position.
        num_prefix_tokens: structure tokens at the head of each modality.
    """
    reducer = reducer.resolve(ModelShape(depth, depth - 1, max(image - num_prefix_tokens, 0)))
    lengths = []
    entered: int | None = None
    for layer in range(EMBEDDINGS, depth):
        if reducer.reduces_at(layer):
            text, image = reducer.lengths(
                TokenShape(text, image, layer, num_prefix_tokens, grid, entered)
            )
            grid = None  # the remaining tokens are not a grid
        if layer == EMBEDDINGS:
            entered = image
        lengths.append((text, image))
    return tuple(lengths)


def _plan(
    reducer: Reducer,
    adapter: Adapter,
    model: nn.Module,
    text: int,
    image: int,
    grid: Grid | None,
    ran: tuple[tuple[int, ...], Lengths] | None = None,
) -> tuple[tuple[int, ...], Lengths, dict[int, ReducerCost]]:
    """Lengths in the vision tower and after it, and the reducers' cost by layer, with all of the
    tower's at `EMBEDDINGS`.

    Arguments as for `planned_lengths`; `ran` are the lengths in the tower and after it, if known.
    """
    device = "cpu" if next(model.parameters()).device.type == "cpu" else "meta"
    tower = ran[0] if ran else _planned_tower(reducer, adapter, model, image, grid)
    first, reducer_cost = (text, image), NO_COST
    if reducer.traits.vision_reducer is not None:
        # There is no text in the tower.
        inside = [(0, length) for length in tower]
        shape = adapter.tower_attention_shape(model)
        num_images, _ = adapter.tower_entry(model, image)
        reducer_cost = num_images * sum(
            count_reducer_costs(
                reducer.traits.vision_reducer,
                shape,
                inside[0],
                inside,
                grid,
                device,
                num_prefix_tokens=adapter.tower_prefix(model),
            ).values(),
            NO_COST,
        )
        first = text, adapter.tower_exit(model, image, tower[-1])
        grid = None if tower[-1] != tower[0] else grid
    lengths = (
        ran[1]
        if ran
        else planned_lengths(reducer, adapter.depth(model), *first, grid, adapter.num_prefix_tokens)
    )
    patch = active(model)
    reducer_costs = count_reducer_costs(
        reducer,
        adapter.attention_shape(model),
        first,
        lengths,
        grid,
        device,
        adapter.has_cross_attention,
        None if patch is None else patch.parts,
        adapter.encoder_facts(model, reducer.traits.needs_encoder, first[1], device),
        adapter.num_prefix_tokens,
    )
    reducer_costs[EMBEDDINGS] += reducer_cost
    return tower, lengths, reducer_costs


def _planned_tower(
    reducer: Reducer, adapter: Adapter, model: nn.Module, image: int, grid: Grid | None
) -> tuple[int, ...]:
    """Image tokens before the vision tower's first layer and after every layer."""
    depth = adapter.tower_depth(model)
    _, entered = adapter.tower_entry(model, image)
    if reducer.traits.vision_reducer is None:
        return (entered,) * (depth + 1) if depth else ()
    return tuple(
        length
        for _, length in planned_lengths(
            reducer.traits.vision_reducer, depth, 0, entered, grid, adapter.tower_prefix(model)
        )
    )


def _last_forward(
    patch: Patch | None, adapter: Adapter, model: nn.Module
) -> tuple[Lengths | None, Lengths | None]:
    """Actual and planned lengths of the last forward, first those in a reduced vision tower."""
    if patch is None or patch.entry is None:
        return None, None
    if patch.planned is not None:
        return tuple(patch.lengths), tuple(patch.planned)
    text, image, grid = patch.entry
    tower = _planned_tower(patch.reducer, adapter, model, image, grid)
    grid_after = grid if not tower or tower[-1] == image else None
    ran = tuple(patch.lengths)
    planned = planned_lengths(
        patch.reducer,
        adapter.depth(model),
        text,
        tower[-1] if tower else image,
        grid_after,
        adapter.num_prefix_tokens,
    )
    if patch.traits.vision_reducer is not None:
        ran = (*((text, length) for length in patch.tower), *ran)
        planned = (*((text, length) for length in tower), *planned)
    if patch.traits.dynamic_length and all(
        max(real) <= max(most) and sum(real) <= sum(most)
        for real, most in zip(ran, planned, strict=True)
    ):
        return ran, ran  # planned lengths are upper bounds
    return ran, planned
