"""`Adapter`: what pumer knows about a model family. `Patch`: all it changed on one instance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pumer import _plugins
from pumer.adapters.rebind import Rebound, rebind
from pumer.adapters.step import ReductionStep
from pumer.reducers import Learned, Reducer, Traits
from pumer.reducers.base import ModelShape
from pumer.reducers.tokens import Encoder, Grid

PARTS = "reducer_parts"
"""Name of the submodule that holds what a learned reducer trains."""


OPTIONS = ("attention", "trim", "renumber", "pack")
"""Options of `pumer.apply` beside the reducer, which are fields of `Patch`."""


class _Absent:
    """Marks an attribute that was not set. A class, because copy.deepcopy does not copy classes."""


@dataclass
class Patch:
    """All changes to one model instance, so that they can be undone exactly.

    Args:
        reducer: the active method.
        adapter: of the model's family.
        attention: attention kernel, "sdpa" or "eager".
        trim: cut padded text and images to the longest of the batch at the model's entry.
        parts: trainable parts of a learned reducer, by layer; a submodule of the model while the
            patch is active.
        renumber: renumber the positions of the remaining tokens, layer by layer.
        pack: lay the rows of a batch end to end, so that padding costs nothing.
    """

    reducer: Reducer
    adapter: Adapter
    attention: str = "sdpa"
    trim: bool = True
    parts: nn.ModuleDict | None = None
    bypassed: bool = False
    """Whether forwards run unreduced for now: a learned reducer's model as its own teacher."""
    progress: float = 1.0
    """Progress of the training of `parts`, 0 to 1."""
    renumber: bool = False
    pack: bool = False
    traits: Traits = field(init=False, repr=False)
    """Of the reducer; read in every layer."""
    forwards_per_example: int = 1
    """Forwards of the layers per example; see `Adapter.forwards_per_example`."""
    decisions: list[tuple[Sequence[Tensor], Sequence[Tensor]]] = field(default_factory=list)
    """Keep ratios and head ratios of every pass of the last training forward, for `budget_loss`."""
    lengths: list[tuple[int, int]] = field(default_factory=list)
    """(text, image) tokens of the last forward, before the first layer and after every layer: the
    evidence that reduction happened."""
    entry: tuple[int, int, Grid | None] | None = None
    """(text, image, grid) of the last forward before any reduction; None before the first
    forward."""
    planned: list[tuple[int, int]] | None = None
    """The planned `lengths`, where they do not follow from `entry`: prompts of several images."""
    kept: Tensor | None = None
    """Positions [B,K] of the tokens left after the last forward's last layer, -1: empty slots."""
    sizes: Tensor | None = None
    """Of a vision tower alone: how many patches each token of the last forward's output stands for
    [B,K]."""
    slots: Tensor | None = None
    """Of a vision tower alone: where in that output every token is that entered [B,N], -1 if it is
    dropped or padding; None if nothing was reduced."""
    rows: list[tuple[tuple[int, int], ...]] = field(default_factory=list)
    """`lengths` of every row of the last packed forward."""
    tower: list[int] = field(default_factory=list)
    """Image tokens of the last forward, before the vision tower's first layer and after every
    layer."""
    steps: list[ReductionStep] | None = None
    """Reductions since `trace` began; None outside of it."""
    timer: Callable[[str], AbstractContextManager[Any]] | None = None
    """Entered around every part of a forward that reduction adds, see `timed`; None outside of
    benchmarks."""
    _changes: list[tuple[Any, str, Any, Any]] = field(default_factory=list)
    _methods: list[Rebound] = field(default_factory=list)
    _hooks: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.traits = self.reducer.traits

    def __repr__(self) -> str:
        """Leaves the changes out: each would print the whole model."""
        return (
            f"Patch({self.reducer!r}, family={self.adapter.family!r}, "
            f"attention={self.attention!r}, trim={self.trim})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out tensors of the last forward's graph, which cannot be copied."""
        return vars(self) | {"decisions": []}

    def part(self, layer: int) -> Any:
        """The trainable part of one layer, None without any."""
        return None if self.parts is None else self.parts[str(layer)]

    def budget_loss(self) -> Tensor | None:
        """The budget loss of a learned reducer's decisions in the last training forward; None if
        there were none."""
        learned: Learned | None = self.traits.learned
        if learned is None or not self.decisions:
            return None
        losses = [
            learned.budget_loss(keep_ratios, self.progress, heads)
            for keep_ratios, heads in self.decisions
        ]
        return torch.stack(losses).mean()

    def timing(self, part: str) -> AbstractContextManager[Any]:
        """The timer of a part, "encoder" or "decoder", to be entered around it."""
        return nullcontext() if self.timer is None else self.timer(part)

    def record_decisions(self, keep_ratios: Sequence[Tensor], heads: Sequence[Tensor]) -> None:
        """Record the decisions of one pass."""
        if keep_ratios:
            self.decisions = [*self.decisions, (keep_ratios, heads)][-self.forwards_per_example :]

    def record_lengths(self, layouts: Sequence[Any]) -> None:
        """Record a forward's lengths from its layouts before and after every layer."""
        self.lengths = [layout.lengths for layout in layouts]
        self.rows = [layout.rows for layout in layouts] if self.pack else []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of an instance; `undo` restores it."""
        self._changes.append((owner, name, vars(owner).get(name, _Absent), value))
        setattr(owner, name, value)

    def replace(
        self, module: nn.Module, name: str, method: Callable[..., Any], *bound: Any
    ) -> None:
        """Replace a method of one module instance by `method(module, *bound, *args)`."""
        self._methods.append(rebind(module, name, method, *bound))

    def wrap(
        self,
        module: nn.Module,
        name: str,
        method: Callable[..., Any],
        *bound: Any,
        adds: Sequence[str] = (),
    ) -> None:
        """Wrap a method of one module instance: `method(module, stock, *bound, *args)`.

        `adds` names keyword arguments that it takes in addition.
        """
        self._methods.append(rebind(module, name, method, *bound, wraps=True, adds=adds))

    def hook(self, handle: Any) -> None:
        """Record the handle of a hook; `undo` removes it."""
        self._hooks.append(handle)

    def undo(self) -> None:
        """Remove every hook and restore every attribute and method, last change first.

        What others have set or wrapped in the meantime stays.
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
    """A model family: where its layers are, how to reduce their tokens, what they cost."""

    family: ClassVar[str]
    classes: ClassVar[tuple[str, ...]]
    """Names of its model classes. Names, so that looking one up imports nothing."""
    modules: ClassVar[Mapping[str, str]] = {}
    """The module of every class that is not in transformers."""
    has_cross_attention: ClassVar[bool] = False
    """Whether layers have a separate cross-attention between text and image (co-attention)."""
    num_prefix_tokens: ClassVar[int] = 1
    """Structure tokens at the head of each modality that a reducer sees."""
    renumbers: ClassVar[bool] = False
    """Whether a position is one number per token, read in every layer, so that `renumber` works."""
    packs: ClassVar[bool] = False
    """Whether the rows of a batch can be packed, so that padding costs nothing."""
    separate: ClassVar[tuple[str, ...]] = ()
    """Classes that run the layers once per image of an example."""

    def fits(self, model: nn.Module) -> bool:
        """Whether a model of one of `classes` is of this family, where its parts say which."""
        return True

    def layers(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers that a reducer can act in."""
        raise NotImplementedError

    def depth(self, model: nn.Module) -> int:
        """Number of these layers."""
        return len(self.layers(model))

    def tower_depth(self, model: nn.Module) -> int:
        """Number of layers of the vision tower; 0 without one."""
        return 0

    def tower_prefix(self, model: nn.Module) -> int:
        """Structure tokens before the patches in the vision tower."""
        return 1

    def tower_reason(self, model: nn.Module) -> str | None:
        """Why its vision tower cannot be reduced, if that needs a reason."""
        return None

    def tower_entry(self, model: nn.Module, image: int) -> tuple[int, int]:
        """(number of images, tokens of each that a reducer sees in the vision tower), if `image`
        tokens come out of it unreduced."""
        return 1, image

    def tower_exit(self, model: nn.Module, image: int, left: int) -> int:
        """Image tokens that come out of a vision tower which leaves `left` tokens per image."""
        num_images, entered = self.tower_entry(model, image)
        return image - num_images * (entered - left)

    def tower_attention_shape(self, model: nn.Module) -> tuple[int, int]:
        """(heads, channels of a head) of the vision tower."""
        raise NotImplementedError

    def shape(self, model: nn.Module) -> ModelShape:
        """What `Reducer.resolve` fits open settings to."""
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
        """Raise ValueError for a resolved reducer that this family cannot run."""
        if reducer.traits.needs_input:
            raise ValueError(
                f"{reducer.name} compares the input and the output of a layer of a language model: "
                f"{self.family} has none, choose another reducer"
            )

    def encoder_facts(
        self, model: nn.Module, needs: frozenset[str], image: int, device: str
    ) -> Encoder | None:
        """A stand-in for what the reducer needs of a vision encoder, to count its cost with; None
        without such an encoder."""
        return None

    def patch(self, model: nn.Module, patch: Patch) -> None:
        """Change the instance so that `patch.reducer` acts; every change is recorded in `patch`."""
        raise NotImplementedError

    def default_lengths(self, model: nn.Module) -> tuple[int, int]:
        """(text, image) tokens of a full-length question and an image of the configured size."""
        raise NotImplementedError

    def default_grid(self, model: nn.Module) -> Grid:
        """Rows and columns of patches of an image of the configured size."""
        side = config_of(model).image_size // config_of(model).patch_size
        return side, side

    def forwards_per_example(self, model: nn.Module) -> int:
        """How often one example runs through the layers: once per image where images are encoded
        separately."""
        return config_of(model).num_images if is_a(model, self.separate) else 1

    def attention_shape(self, model: nn.Module) -> tuple[int, int]:
        """(heads, channels of a head)."""
        heads = config_of(model).num_attention_heads
        return heads, config_of(model).hidden_size // heads

    def layer_macs(
        self, model: nn.Module, lengths: Sequence[tuple[int, int]], after_layer: bool = False
    ) -> list[tuple[int, int]]:
        """Multiply-accumulates of every layer's (attention, MLP) in one pass; arguments as for
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
        """Multiply-accumulates per example by part, of matrix products and convolutions; FLOPs are
        twice that.

        The reducer's own cost is not included.

        Args:
            lengths: (text, image) tokens before the first layer and after every layer.
            entry: (text, image) tokens that were embedded, if tokens are reduced before the first
                layer.
            tower: image tokens before the vision tower's first layer and after every layer.
            after_layer: whether tokens leave after a layer, instead of between its attention and
                its MLP.
        """
        raise NotImplementedError


_ADAPTERS: list[Adapter] = []


def register(adapter: type[Adapter]) -> type[Adapter]:
    """Class decorator: register a family."""
    _ADAPTERS.append(adapter())
    return adapter


def adapters() -> tuple[Adapter, ...]:
    """All registered families, those of plugins included."""
    _plugins.load(_plugins.MODELS, _register_plugin)
    return tuple(_ADAPTERS)


def _register_plugin(plugin: Any) -> None:
    """Accepts an adapter class, or a module that registers its adapters on import."""
    if isinstance(plugin, ModuleType) or any(type(adapter) is plugin for adapter in _ADAPTERS):
        return
    if not (isinstance(plugin, type) and issubclass(plugin, Adapter)):
        raise TypeError(f"{plugin!r} is no subclass of pumer.adapters.Adapter")
    register(plugin)


def adapter_of(model: Any) -> Adapter | None:
    """The adapter of the model's class, or of the nearest class that it inherits from.

    Plugins are loaded only if no built-in adapter lists the class itself.
    """

    def serving(cls: type, among: Iterable[Adapter]) -> Adapter | None:
        return next((a for a in among if cls.__name__ in a.classes and a.fits(model)), None)

    exact = serving(type(model), _ADAPTERS)
    if exact is not None:
        return exact
    return next(filter(None, (serving(cls, adapters()) for cls in type(model).__mro__)), None)


def is_a(model: Any, names: tuple[str, ...]) -> bool:
    """Whether a model's class, or a class that it inherits from, has one of these names."""
    return any(base.__name__ in names for base in type(model).__mro__)


def config_of(model: nn.Module) -> Any:
    """The model's configuration, which nn.Module does not declare."""
    return model.config
