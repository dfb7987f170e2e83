"""The verbs on a live model: apply, remove, reduced, kept, vectors, trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pumer.adapters import Adapter, Patch, ReductionStep, find, supported
from pumer.adapters.active import PATCH, active, patched_module
from pumer.adapters.base import OPTIONS, PARTS
from pumer.adapters.encoder.attention import BACKENDS
from pumer.adapters.forward import execution_device
from pumer.presets import ReducerSpec, read_reducer
from pumer.reducers import EMBEDDINGS, Learned, Reducer, TokenShape

M = TypeVar("M", bound=nn.Module)


def apply(
    model: M,
    reducer: ReducerSpec,
    *,
    attention: str = "sdpa",
    trim: bool = True,
    renumber: bool = False,
    pack: bool = False,
) -> M:
    """Patch `model` in place so that it runs with token reduction; undo with `remove`.

    Only this instance is patched. Applying again replaces the active reducer. A learned reducer
    adds trainable parts to the model, which `remove` takes away again; they are kept where it
    replaces a reducer with parts of the same shapes.

    Args:
        model: a supported Hugging Face model (`pumer list` names them).
        reducer: a reducer or its class, its name ("fastv") or `{"reducer": name, setting: value}`,
            a preset's name ("vilt-vqav2"), a YAML or JSON file of settings, or a saved model,
            whose reducer is used. Settings that are None are fitted to the model.
        attention: "sdpa" (fused) or "eager".
        trim: at the model's entry, cut padding down to the longest text and image of the batch;
            this needs one host-device sync. Turn it off for CUDA graphs; it is off under
            torch.compile.
        renumber: renumber the positions of a language model's tokens wherever tokens were dropped,
            as the published code of several methods does (docs/methods.md). By default the
            remaining tokens keep their positions.
        pack: in joint encoders, lay the rows of a batch end to end, so that neither padding nor a
            sample with more tokens than others costs time (docs/packing.md). The host then reads
            the lengths at the entry and in every layer that reduces.

    Returns:
        The model itself.

    Raises:
        ValueError: if the model is not supported or the settings do not fit it; the model is then
            unchanged.

    Example:
        >>> model = pumer.load("scenes-vilt")
        >>> model = pumer.apply(model, pumer.PuMer(prune=0.1, merge=0.3))
        >>> model = pumer.apply(model, "tome")  # by name, in place of the one before
        >>> pumer.active(model).reducer.name
        'tome'
    """
    before = active(model)
    _apply(
        model,
        reducer,
        None if before is None else before.parts,
        attention=attention,
        trim=trim,
        renumber=renumber,
        pack=pack,
    )
    return model


def _apply(
    wrapped: nn.Module,
    reducer: ReducerSpec,
    parts: nn.ModuleDict | None,
    *,
    attention: str,
    trim: bool,
    renumber: bool,
    pack: bool,
) -> None:
    from pumer.hub.saving import follow  # imported here, as it imports this module

    model = supported(wrapped)
    adapter = find(model)
    reducer = read_reducer(reducer)
    if attention not in BACKENDS:
        raise ValueError(f"attention is one of {', '.join(BACKENDS)}, not {attention!r}")
    if renumber and not adapter.renumbers:
        raise ValueError(
            f"positions of {adapter.family} cannot be renumbered, as they are not one number that "
            "every layer of a language model reads: leave renumber out"
        )
    reducer = reducer.resolve(adapter.shape(model))
    adapter.check(reducer)
    reducer.check(adapter.depth(model))
    if pack:
        _check_pack(adapter, reducer, trim)
    needs = reducer.traits.needs_encoder
    if needs and adapter.encoder_facts(model, needs, 1, "meta") is None:
        raise ValueError(
            f"{reducer.name} reads the {', '.join(sorted(needs))} of a tower that feeds a "
            f"language model: {adapter.family} has none, take another reducer"
        )
    _check_tower(adapter, model, reducer)
    _check_lengths(adapter, model, reducer)
    parts = _fitting(model, adapter, reducer, parts)
    remove(model)
    forwards_per_example = adapter.forwards_per_example(model)
    patch = Patch(
        reducer,
        adapter,
        attention,
        trim,
        parts,
        renumber=renumber,
        pack=pack,
        forwards_per_example=forwards_per_example,
    )
    try:
        adapter.patch(model, patch)
        if parts is not None:
            patch.set(model, PARTS, parts)
        follow(wrapped, patch)
    except BaseException:
        patch.undo()
        raise
    setattr(model, PATCH, patch)


def _check_pack(adapter: Adapter, reducer: Reducer, trim: bool) -> None:
    """Raise ValueError where rows cannot be packed."""
    if not adapter.packs:
        raise ValueError(
            f"{adapter.family} cannot pack the rows of a batch, as ViLT and METER can: leave pack "
            "out"
        )
    if not trim:
        raise ValueError(
            "packing reads the lengths of a batch on the host, which trim=False is to avoid: leave "
            "one of them out"
        )
    if reducer.traits.official:
        raise ValueError(
            f"the published code that {reducer.name} reproduces counts padding, and packed rows "
            "have none: leave pack out"
        )


def _fitting(
    model: nn.Module, adapter: Adapter, reducer: Reducer, parts: nn.ModuleDict | None
) -> nn.ModuleDict | None:
    """The trainable parts of a learned reducer: `parts` if they fit, else new ones; None for other
    reducers.

    Each part is moved to the device of its layer.
    """
    learned: Learned | None = reducer.traits.learned
    if learned is None:
        return None
    heads, channels = adapter.attention_shape(model)
    new = learned.parts(heads * channels, heads, adapter.depth(model), adapter.has_cross_attention)
    fitting = parts if parts is not None and _shapes(parts) == _shapes(new) else new
    layers, dtype = adapter.layers(model), next(model.parameters()).dtype
    for layer, part in fitting.items():
        if fitting is parts and all(weight.is_meta for weight in part.parameters()):
            continue  # they are offloaded like the model: their own hooks bring them in
        # Parts that were kept aside have not followed the model to its device.
        part.to(execution_device(layers[int(layer)]), dtype)
    return fitting.train(model.training)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def _check_tower(adapter: Adapter, model: nn.Module, reducer: Reducer) -> None:
    """Raise ValueError for a reducer in the vision tower of a model that has no tower, or too few
    layers in it."""
    tower = reducer.traits.vision_reducer
    if tower is None:
        return
    depth = adapter.tower_depth(model)
    if depth == 0:
        reason = adapter.tower_reason(model)
        raise ValueError(
            f"{type(model).__name__} has no vision tower that can be reduced"
            + (f" ({reason})" if reason else "")
            + ": give the reducer `inside` alone"
        )
    if any(layer < 0 for layer in tower.layers):
        raise ValueError(f"{tower.name} in the tower reduces in layers 0 to {depth - 1}")
    tower.check(depth)


def _check_lengths(adapter: Adapter, model: nn.Module, reducer: Reducer) -> None:
    """Raise ValueError if no image token would be left of an image of the configured size."""
    if reducer.traits.drops_image:
        return
    text, image = adapter.default_lengths(model)
    tower = reducer.traits.vision_reducer
    if tower is not None:
        _, length = adapter.tower_entry(model, image)
        for layer in range(adapter.tower_depth(model)):
            shape = TokenShape(0, length, layer, adapter.tower_prefix(model))
            _, length = tower.lengths(shape)
        image = adapter.tower_exit(model, image, length)
    for layer in range(EMBEDDINGS, adapter.depth(model)):
        grid = adapter.default_grid(model)
        text, image = reducer.lengths(
            TokenShape(text, image, layer, adapter.num_prefix_tokens, grid)
        )
        if image <= adapter.num_prefix_tokens:
            raise ValueError(
                f"{reducer.name} leaves no image token after layer {layer}: lower its ratios, or "
                "reduce in fewer layers"
            )


def remove(model: M) -> M:
    """Restore the original model; does nothing to an unreduced one.

    Wrappers that others have put around its methods since (torch.compile, autocast, offloading)
    stay, around the original methods. A model inside PEFT, DistributedDataParallel or torch.compile
    is restored inside its wrapper.

    Example:
        >>> model = pumer.apply(pumer.load("scenes-vilt"), "pumer")
        >>> pumer.active(pumer.remove(model)) is None
        True
    """
    patched = patched_module(model)
    if patched is not None:
        vars(patched).pop(PATCH).undo()
    return model


@contextmanager
def reduced(
    model: M,
    reducer: ReducerSpec,
    *,
    attention: str = "sdpa",
    trim: bool = True,
    renumber: bool = False,
    pack: bool = False,
) -> Iterator[M]:
    """`apply` for the duration of a with block; the reducer that was active before is active again
    afterwards.

    Example:
        >>> model = pumer.load("scenes-vilt")
        >>> with pumer.reduced(model, pumer.ToMe(r=16)):
        ...     pumer.active(model).reducer.r
        16
        >>> pumer.active(model) is None
        True
    """
    before = active(model)
    apply(model, reducer, attention=attention, trim=trim, renumber=renumber, pack=pack)
    try:
        yield model
    finally:
        remove(model)
        if before is not None:
            settings = {name: getattr(before, name) for name in OPTIONS}
            _apply(model, before.reducer, before.parts, **settings)


@contextmanager
def unreduced(model: nn.Module) -> Iterator[None]:
    """Bypass the reducer inside the with block, without removing it or its parts.

    For a model in training that is its own teacher; otherwise use `remove`.
    """
    patch = active(model)
    if patch is None:
        raise ValueError("nothing reduces this model: call pumer.apply(model, ...) first")
    patch.bypassed = True
    try:
        yield
    finally:
        patch.bypassed = False


def kept(model: nn.Module) -> Tensor:
    """Which tokens of its prompts were left after the last reducing layer of a model's last call.

    Returns:
        Positions in the prompt (with a cached prefix: in the whole sequence), in order, int64
        [B,K]; -1 fills rows that have fewer. They include text tokens, and padding that was left
        alone. A merged token has the position of its first member. In joint encoders positions
        count the text tokens as given, then the image tokens, [CLS] first. Where images are read
        by cross-attention, they count the tokens of the encoder's output.

    Raises:
        ValueError: if the model carries no reducer, or has reduced nothing yet.

    Example:
        >>> from PIL import Image
        >>> model = pumer.apply(pumer.load("scenes-vilt"), "pumer")
        >>> image = Image.new("RGB", (96, 96))
        >>> inputs = pumer.processor("scenes-vilt")("is there a red circle?", image)
        >>> answer = model(**inputs)
        >>> pumer.kept(model).shape
        torch.Size([1, 37])
    """
    patch = active(model)
    if patch is None or patch.kept is None:
        raise ValueError(
            "nothing was reduced yet: call pumer.apply(model, ...), then the model with images"
        )
    return patch.kept


def vectors(model: nn.Module, **inputs: Any) -> list[Tensor]:
    """The vectors that a retriever makes of pages or queries, reduced or not: of every sample a
    tensor [N,D] with those of its real tokens.

    For an index of pages, and for `processor.score_retrieval`, which compares such lists.

    Args:
        model: ColPali or its like.
        inputs: of its `forward`.

    Raises:
        ValueError: if it gives no vectors.

    Example:
        >>> import transformers
        >>> config = transformers.ColPaliConfig(vlm_config=llava.config, embedding_dim=8)
        >>> retriever = transformers.ColPaliForRetrieval(config)
        >>> queries = pumer.vectors(retriever, input_ids=torch.tensor([[1, 5, 9]]))
        >>> [query.shape for query in queries]
        [torch.Size([3, 8])]
    """
    output = model(**inputs)
    embeddings = getattr(output, "embeddings", None)
    if embeddings is None:
        raise ValueError(
            f"{type(model).__name__} gives no embeddings: vectors are of retrievers such as "
            "ColPaliForRetrieval"
        )
    mask = getattr(output, "attention_mask", None)
    mask = inputs.get("attention_mask") if mask is None else mask
    if mask is None:
        return list(embeddings)
    real = mask.to(embeddings.device).bool()
    return [rows[is_real] for rows, is_real in zip(embeddings, real, strict=True)]


@contextmanager
def trace(model: nn.Module) -> Iterator[list[ReductionStep]]:
    """Collect every reduction of the forwards inside the with block, in order.

    Example:
        >>> from PIL import Image
        >>> model = pumer.apply(pumer.load("scenes-vilt"), "pumer")
        >>> image = Image.new("RGB", (96, 96))
        >>> inputs = pumer.processor("scenes-vilt")("is there a red circle?", image)
        >>> with pumer.trace(model) as steps:
        ...     answer = model(**inputs)
        >>> [step.layer for step in steps]
        [1, 2, 3]
    """
    patch = active(model)
    if patch is None:
        raise ValueError("nothing reduces this model: call pumer.apply(model, ...) first")
    steps: list[ReductionStep] = []
    before, patch.steps = patch.steps, steps
    try:
        yield steps
    finally:
        patch.steps = before
