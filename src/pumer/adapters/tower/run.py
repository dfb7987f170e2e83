"""A forward of a vision transformer whose tokens are reduced between attention and MLP.

The model's own forward runs, over layers that are replaced one by one; what they hand on is in the
`TowerRun` of the call.

Shape suffixes: B images, N tokens, D channels, K slots.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from pumer.adapters.base import Patch
from pumer.adapters.encoder import reduce as encoder
from pumer.adapters.encoder.reduce import EncoderLayout
from pumer.adapters.forward import run_block, timed
from pumer.adapters.tower import blocks
from pumer.adapters.tower.axis import Rows
from pumer.adapters.tower.packed import Packed
from pumer.reducers import EMBEDDINGS, Plan, Reducer

Axis = Rows | Packed


@dataclass(frozen=True)
class TowerSpec:
    """A vision transformer that is reduced.

    Args:
        acts: the layers that a reducer can act in; its own numbers are those in this tuple.
        depth: how many layers are run; features come from the last of them.
        alone: whether the patch's reducer is the tower's; otherwise it is the `vision_reducer`.
        own_kernel: whether attention is the model's own kind, fused or eager; otherwise it is the
            patch's.
    """

    acts: tuple[int, ...]
    depth: int
    alone: bool = False
    own_kernel: bool = False

    def reducer(self, patch: Patch) -> Reducer:
        """The reducer that acts in the tower."""
        reducer: Reducer | None = patch.reducer if self.alone else patch.traits.vision_reducer
        assert reducer is not None
        return reducer

    def kernel(self, patch: Patch, attention: Any) -> str:
        """The kernel of an attention module, "sdpa" or "eager"."""
        if not self.own_kernel:
            return patch.attention
        return "eager" if attention.config._attn_implementation == "eager" else "sdpa"


Begin = Callable[[Tensor, dict[str, Any], bool], tuple[Axis, EncoderLayout]]
"""The axis and its layout, from the embeddings, the arguments of the tower's forward, and whether
its layers get an attention mask."""
Finish = Callable[["TowerRun", Any], Any]


@dataclass(eq=False)
class TowerRun:
    """What one forward of a tower hands from layer to layer.

    Args:
        patch: whose reducer acts.
        spec: of the tower.
        begin: makes axis and layout.
        inputs: arguments of the tower's forward.
        axis: of the layer that runs.
        layout: of its units.
        axes: the axis before the first layer and after every layer that has run, and the plan from
            the units of the embeddings to those there, None where nothing was reduced until then.
        lengths: units of the longest image there.
    """

    patch: Patch
    spec: TowerSpec
    begin: Begin
    inputs: dict[str, Any]
    axis: Axis | None = None
    layout: EncoderLayout | None = None
    axes: list[tuple[Axis, Plan | None]] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    @property
    def plan(self) -> Plan | None:
        """From the units of the embeddings to those that are left."""
        return None if self.layout is None else self.layout.plan

    def leave(self, states: Tensor, num_layers: int | None = None) -> Tensor:
        """States after so many layers, or after all, of every token that entered the tower, in the
        tower's order."""
        last = len(self.axes) - 1
        axis, plan = self.axes[last if num_layers is None else min(num_layers, last)]
        if isinstance(axis, Packed) and states.ndim == 3:
            return axis.leave(states[0], plan)[None]
        return axis.leave(states, plan)

    def layer(self, layer: Any, layer_index: int, states: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The output of a layer, reduced where the reducer acts in it."""
        if layer_index == 0:
            masked = kwargs.get("attention_mask") is not None
            self.axis, self.layout = self.begin(states, self.inputs, masked)
        packed = isinstance(self.axis, Packed) and states.ndim == 3
        states = states[0] if packed else states
        if layer_index == 0:
            states = self._entered(states)
        assert self.layout is not None
        assert self.axis is not None
        acts = self.spec.acts
        act_index = acts.index(layer_index) if layer_index in acts else None
        positions = self.axis.positions(kwargs.get("position_embeddings"), self.layout.plan)
        run = partial(block, layer, self.patch, self.spec, act_index, positions)
        states, self.layout, self.axis = run_block(layer, run, states, self.layout, self.axis)
        self._note()
        return states[None] if packed else states

    def _entered(self, states: Tensor) -> Tensor:
        """Embeddings as the first layer gets them, reduced before it where the reducer acts
        there."""
        assert self.layout is not None
        assert self.axis is not None
        states = self.axis.enter(states)
        reducer = self.spec.reducer(self.patch)
        if self.spec.alone and reducer.reduces_at(EMBEDDINGS):
            states, self.layout, self.axis = _reduce(
                self.patch, self.spec, EMBEDDINGS, states, self.layout, self.axis
            )
        self._note()
        return states

    def _note(self) -> None:
        assert self.layout is not None
        assert self.axis is not None
        self.axes.append((self.axis, self.layout.plan))
        self.lengths.append(self.layout.mask_BN.shape[1])


_current: ContextVar[TowerRun | None] = ContextVar("pumer_tower_run", default=None)


def current_run(patch: Patch) -> TowerRun | None:
    """The forward of this patch's tower that is running in this thread."""
    run = _current.get()
    return run if run is not None and run.patch is patch else None


def install(
    patch: Patch,
    vision: Any,
    layers: Iterable[nn.Module],
    spec: TowerSpec,
    begin: Begin,
    finish: Finish,
    wanted: Callable[[], bool] | None = None,
) -> None:
    """Have a tower reduce its tokens.

    Args:
        patch: that undoes it.
        vision: the module whose forward runs all the layers.
        layers: of the tower.
        spec: of the tower.
        begin: called before the first layer, see `TowerRun`.
        finish: called with the run and the tower's output; gives the output.
        wanted: whether the forward that begins is to be reduced; None for all.
    """
    patch.wrap(vision, "forward", _forward, patch, spec, begin, finish, wanted)
    for layer_index, layer in enumerate(layers):
        patch.wrap(layer, "forward", _layer, patch, spec, layer_index)


def _forward(
    vision: Any,
    stock: Callable[..., Any],
    patch: Patch,
    spec: TowerSpec,
    begin: Begin,
    finish: Finish,
    wanted: Callable[[], bool] | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of a tower's forward: the same, inside a run."""
    if patch.bypassed or not (wanted is None or wanted()):
        return stock(*args, **kwargs)
    arguments = inspect.signature(type(vision).forward).bind_partial(vision, *args, **kwargs)
    run = TowerRun(patch, spec, begin, arguments.arguments)
    token = _current.set(run)
    try:
        output = stock(*args, **kwargs)
    finally:
        _current.reset(token)
    return finish(run, output)


def _layer(
    layer: Any,
    stock: Callable[..., Any],
    patch: Patch,
    spec: TowerSpec,
    layer_index: int,
    states: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """In place of a layer's forward, which has no hook between attention and MLP."""
    run = current_run(patch)
    if run is None:
        return stock(states, *args, **kwargs)
    if layer_index >= spec.depth:  # nothing reads what comes behind the features
        return states
    if args:  # the attention mask comes second in every family
        kwargs = kwargs | {"attention_mask": args[0]}
    return run.layer(layer, layer_index, states, kwargs)


def block(
    layer: Any,
    patch: Patch,
    spec: TowerSpec,
    act_index: int | None,
    positions: blocks.Positions | None,
    states: Tensor,
    layout: EncoderLayout,
    axis: Any,
) -> tuple[Tensor, EncoderLayout, Any]:
    """A layer; `act_index` is the reducer's own of it, None where it cannot act.

    Replaces the forward of the layers of every family in `blocks`.
    """
    states, layout, axis = _attend_and_reduce(
        layer, patch, spec, act_index, positions, states, layout, axis
    )
    return blocks.mlp_half(layer, states), layout, axis


def _attend_and_reduce(
    layer: Any,
    patch: Patch,
    spec: TowerSpec,
    act_index: int | None,
    positions: blocks.Positions | None,
    states: Tensor,
    layout: EncoderLayout,
    axis: Any,
) -> tuple[Tensor, EncoderLayout, Any]:
    """A separate function, so that queries, keys and values are freed before the MLP."""
    attention = blocks.part(layer, blocks.ATTENTION)
    reducer = spec.reducer(patch)
    traits, acts = reducer.traits, act_index is not None and reducer.reduces_at(act_index)
    normed = blocks.part(layer, blocks.FIRST_NORM)(states)
    queries, keys, values = blocks.project(attention, normed, positions)
    by_size = traits.proportional_attention and layout.plan is not None
    bias = None
    if by_size or layout.padded or (layout.plan is not None and traits.dynamic_length):
        bias = axis.bias(layout, states.dtype, by_size)
    context, probabilities = axis.attend(
        queries,
        keys,
        values,
        bias,
        spec.kernel(patch, attention),
        blocks.dropout_of(attention),
        traits.needs_attention and acts,
        act_index is None,
    )
    states = blocks.attention_half(layer, states, context)
    if not acts:
        return states, layout, axis
    assert act_index is not None
    return _reduce(patch, spec, act_index, states, layout, axis, queries, keys, probabilities)


@timed("encoder")
def _reduce(
    patch: Patch,
    spec: TowerSpec,
    act_index: int,
    states: Tensor,
    layout: EncoderLayout,
    axis: Any,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    probabilities: Tensor | None = None,
) -> tuple[Tensor, EncoderLayout, Any]:
    """States, layout and axis after the reducer acted."""
    means = axis.means(states)
    queries, keys = (None if x is None else axis.head_means(x) for x in (queries, keys))
    layout, plan, _ = encoder.choose(
        patch, act_index, means, layout, queries, keys, probabilities, tower=not spec.alone
    )
    return (states, layout, axis) if plan is None else axis.reduced(states, plan, layout)
