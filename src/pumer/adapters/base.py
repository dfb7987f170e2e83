"""`Adapter`: what is known about one model family. `Patch`: everything it changed on one
instance."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer import _plugins
from pumer.adapters.rebind import Rebound, rebind
from pumer.reducers import Plan, Reducer
from pumer.reducers.base import ModelShape
from pumer.reducers.tokens import Encoder, Grid

PARTS = "reducer_parts"
"""Name of the submodule that holds what a learned reducer trains."""


class _Absent:
    """Stands for an attribute that was not there. A class, because copy.deepcopy does not make
    another one of it."""


@dataclass(frozen=True)
class ReductionStep:
    """One reduction that happened: for looking at, never needed for computing.

    Args:
        layer: where, -1 before the first.
        text: text tokens before it, padding included.
        plan: where the tokens went.
        grid: rows and columns of patches of the unreduced image.
        patch_BN: raster number of the patch of every unreduced token, -1 for tokens that are none.
        prompt: what a decoder's prompt has become, a `prompt.PromptStep`; None in encoders.
    """

    layer: int
    text: int
    plan: Plan
    grid: tuple[int, int] | None
    patch_BN: Any
    prompt: Any = None


@dataclass
class Patch:
    """What was changed on one model instance, so that it can be undone exactly.

    Args:
        reducer: the method in force.
        adapter: the family's adapter.
        attention: attention kernel, "sdpa" or "eager".
        trim: cut padded text and images to the longest of the batch at the model's entry.
        parts: what a learned reducer has trained, by layer; a submodule of the model as long as the
            patch is in force.
        renumber: count the positions of the tokens that are left anew, layer by layer.
    """

    reducer: Reducer
    adapter: Adapter
    attention: str = "sdpa"
    trim: bool = True
    parts: nn.ModuleDict | None = None
    bypassed: bool = False
    """Let a learned reducer's model see everything in the next forwards, as its own teacher."""
    progress: float = 1.0
    """Of the training of those parts, 0 to 1."""
    renumber: bool = False
    forwards_per_example: int = 1
    """How often one example goes through the layers."""
    decisions: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = field(default_factory=list)
    """What `Learned.budget_loss` takes, of every pass of the last forward in training."""
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(text, image) tokens before the first layer and after every one of the last forward: evidence
    that the reduction is active."""
    entry: tuple[int, int, Grid | None] | None = None
    """(text, image, grid) of the last forward before anything was reduced; None if there was no
    forward."""
    planned: list[tuple[int, int]] | None = None
    """What `lengths` had to be, where a prompt of several images does not follow from `entry`."""
    kept: Tensor | None = None
    """Places [B,K] of the tokens that were left after the last layer of the last forward, -1 for
    empty slots."""
    tower: list[int] = field(default_factory=list)
    """Image tokens before the first layer of the vision tower and after every one, of the last
    forward."""
    steps: list[ReductionStep] | None = None
    """Reductions of the forwards since `trace` began, None when nobody looks."""
    _changes: list[tuple[Any, str, Any, Any]] = field(default_factory=list)
    _methods: list[Rebound] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)

    def __repr__(self) -> str:
        """Without what was changed, which is the model once for every change."""
        return (
            f"Patch({self.reducer!r}, family={self.adapter.family!r}, "
            f"attention={self.attention!r}, trim={self.trim})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model, which can have no part in the graph of its last forward."""
        return vars(self) | {"decisions": []}

    def part(self, layer: int) -> Any:
        """What is trained for one layer."""
        return None if self.parts is None else self.parts[str(layer)]

    def budget_loss(self) -> Tensor | None:
        """The price of what a learned reducer decided in the last forward in training; None if it
        decided nothing."""
        learned = self.reducer.traits.learned
        if learned is None or not self.decisions:
            return None
        losses = [
            learned.budget_loss(keep_ratios, self.progress, heads)
            for keep_ratios, heads in self.decisions
        ]
        return torch.stack(losses).mean()

    def record_decisions(self, keep_ratios: Sequence[Tensor], heads: Sequence[Tensor]) -> None:
        """Keep what a learned reducer decided in one pass."""
        if keep_ratios:
            self.decisions = [*self.decisions, (keep_ratios, heads)][-self.forwards_per_example :]

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance, remembering what was there."""
        self._changes.append((owner, name, vars(owner).get(name, _Absent), value))
        setattr(owner, name, value)

    def replace(
        self, module: nn.Module, name: str, method: Callable[..., Any], *bound: Any
    ) -> None:
        """Give one module instance another `name(module, *bound, *args)`."""
        self._methods.append(rebind(module, name, method, *bound))

    def wrap(
        self,
        module: nn.Module,
        name: str,
        method: Callable[..., Any],
        *bound: Any,
        adds: Sequence[str] = (),
    ) -> None:
        """The same with the method that was there: `name(module, stock, *bound, *args)`.

        `adds` names keyword arguments that it takes besides.
        """
        self._methods.append(rebind(module, name, method, *bound, wraps=True, adds=adds))

    def hook(self, handle: Any) -> None:
        """Remember a hook that was registered."""
        self._hooks.append(handle)

    def undo(self) -> None:
        """Take every hook off and put every attribute and method back, last change first.

        What somebody else has set or wrapped in the meantime stays.
        """
        while self._hooks:
            self._hooks.pop().remove()
        while self._methods:
            self._methods.pop().undo()
        while self._changes:
            owner, name, before, value = self._changes.pop()
            if getattr(owner, name, _Absent) is not value:
                continue
            if before is _Absent:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


class Adapter:
    """Knowledge of one model family: where the layers are, how to shorten what has a token axis,
    what it costs."""

    family: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    """Names of the model classes it knows; names, so that the family need not be imported to
    look."""
    modules: ClassVar[Mapping[str, str]] = {}
    """The module of every class that transformers does not have."""
    has_cross_attention: ClassVar[bool] = False
    """Whether text looks at the image by an attention of its own, as in co-attention."""
    num_prefix_tokens: ClassVar[int] = 1
    """Structure tokens at the head of each modality that a reducer sees."""
    renumbers: ClassVar[bool] = False
    """Whether positions are one number a token, read in every layer: they can be counted anew."""
    separate: ClassVar[tuple[str, ...]] = ()
    """Classes in which every image of an example goes through the layers by itself."""

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers that a reducer can act in."""
        raise NotImplementedError

    def depth(self, model: nn.Module) -> int:
        """How many these are."""
        return len(self.layers(model))

    def tower_depth(self, model: nn.Module) -> int:
        """Number of layers of the vision tower, 0 where there is none."""
        return 0

    def tower_entry(self, model: nn.Module, image: int) -> tuple[int, int]:
        """(images, tokens of each in the vision tower) where `image` tokens come out of it
        unreduced."""
        return 1, image

    def tower_exit(self, model: nn.Module, image: int, left: int) -> int:
        """Image tokens that come out of a vision tower that leaves `left` tokens of each
        image."""
        num_images, entered = self.tower_entry(model, image)
        return image - num_images * (entered - left)

    def tower_attention_shape(self, model: nn.Module) -> tuple[int, int]:
        """(heads, channels of a head) of the vision tower."""
        raise NotImplementedError

    def shape(self, model: nn.Module) -> ModelShape:
        """What settings that a reducer leaves open are fitted to."""
        depth, tower = self.depth(model), self.tower_depth(model)
        _, image = self.default_lengths(model)
        return ModelShape(
            depth,
            last=depth - 1,
            image=image - self.num_prefix_tokens,
            co_attention=self.has_cross_attention,
            tower=ModelShape(tower, last=tower - 1) if tower else None,
        )

    def check(self, reducer: Reducer) -> None:
        """Raise ValueError for a reducer that this family cannot run; it is resolved already."""
        if reducer.traits.needs_input:
            raise ValueError(
                f"{reducer.name} compares what a layer of a language model gives with what it was "
                f"given: {self.family} has no language model, take another reducer"
            )

    def encoder_facts(
        self, model: nn.Module, needs: frozenset[str], image: int, place: str
    ) -> Encoder | None:
        """What a reducer that needs it is told of a vision encoder, without content; for counting
        what it costs."""
        return None

    def patch(self, model: nn.Module, patch: Patch) -> None:
        """Change the instance so that `patch.reducer` acts, recording every change in `patch`."""
        raise NotImplementedError

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        """(text, image) tokens of a full-length question and an image of the configured size."""
        raise NotImplementedError

    def default_grid(self, model: nn.Module) -> Grid:
        """Rows and columns of patches of an image of the configured size."""
        side = config_of(model).image_size // config_of(model).patch_size
        return side, side

    def forwards_per_example(self, model: nn.Module) -> int:
        """How often one example goes through the layers: the number of images where each is a
        pass of its own."""
        return config_of(model).num_images if is_a(model, self.separate) else 1

    def attention_shape(self, model: nn.Module) -> tuple[int, int]:
        """(heads, channels of a head)."""
        heads = config_of(model).num_attention_heads
        return heads, config_of(model).hidden_size // heads

    def layer_macs(
        self, model: nn.Module, lengths: Sequence[tuple[int, int]], after_layer: bool = False
    ) -> list[tuple[int, int]]:
        """Multiply-accumulates of every layer's (attention, MLP), of one pass; arguments as for
        `macs`."""
        raise NotImplementedError

    def macs(
        self,
        model: nn.Module,
        lengths: Sequence[tuple[int, int]],
        entry: tuple[int, int] | None = None,
        tower: Sequence[int] = (),
        after_layer: bool = False,
    ) -> dict[str, int]:
        """Multiply-accumulates per example by part: matrix products and convolutions; FLOPs are
        twice that.

        What a reducer itself computes is not in here.

        Args:
            lengths: (text, image) tokens before the first layer and after every one.
            entry: (text, image) tokens that were embedded, if something is reduced before the first
                layer.
            tower: image tokens before the first layer of the vision tower and after every one.
            after_layer: whether tokens leave after the layers, in place of between their attention
                and MLP.
        """
        raise NotImplementedError


_ADAPTERS: list[Adapter] = []


def register(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: make a family known."""
    _ADAPTERS.append(adapter())
    return adapter


def adapters() -> tuple[Adapter, ...]:
    """All known families, those of plugins included."""
    _plugins.load(_plugins.MODELS, _register_plugin)
    return tuple(_ADAPTERS)


def _register_plugin(plugin: Any) -> None:
    """Takes an adapter class, or a module that registers its adapters as it is imported."""
    if isinstance(plugin, ModuleType) or any(type(adapter) is plugin for adapter in _ADAPTERS):
        return
    if not (isinstance(plugin, type) and issubclass(plugin, Adapter)):
        raise TypeError(f"{plugin!r} is no subclass of pumer.adapters.Adapter")
    register(plugin)


def adapter_of(model: Any) -> Adapter | None:
    """That of the model's class, or of the nearest one that it inherits from.

    Plugins are read only where none of ours has the class itself.
    """
    name = type(model).__name__
    exact = next((adapter for adapter in _ADAPTERS if name in adapter.classes), None)
    if exact is not None:
        return exact
    return next(
        (
            adapter
            for parent in type(model).__mro__
            for adapter in adapters()
            if parent.__name__ in adapter.classes
        ),
        None,
    )


def is_a(model: Any, names: tuple[str, ...]) -> bool:
    """Whether the class of a model, or one that it inherits from, has one of these names."""
    return any(base.__name__ in names for base in type(model).__mro__)


def config_of(model: nn.Module) -> Any:
    """The model's configuration, which nn.Module does not know to be there."""
    return model.config


def head_macs(model: nn.Module, trunk: nn.Module) -> int:
    """Multiply-accumulates of one state's way through the linear layers outside the trunk and the
    reducer."""
    inside = {*trunk.modules(), *getattr(model, PARTS, nn.Module()).modules()}
    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module not in inside
    ]
    return sum(head.in_features * head.out_features for head in heads)


def attention_and_mlp_lengths(
    lengths: Sequence[tuple[int, int]], after_layer: bool
) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(text, image) tokens of every layer's attention and of its MLP."""
    return [(before, before if after_layer else after) for before, after in pairwise(lengths)]
