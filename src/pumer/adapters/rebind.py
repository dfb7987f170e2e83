"""Replace methods of one module instance, and undo it exactly.

The replacements are bound methods, so that accelerate, torch.export and dynamo find a `__func__`, a
`__code__` and a signature. Others may wrap them while they are active, as torch.compile, autocast
and offloading do. Such a wrapper stays after the undo, around the stock method. Copies, pickles and
replicas of the module get their own methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from types import MethodType
from typing import Any

from torch import nn

METHODS = "_pumer_methods"
"""Attribute of a module that holds its `Method`s, by key."""
_KEY = "_pumer_key"
_REPLICATE = "_replicate_for_data_parallel"
_REDUCE = "__reduce_ex__"
_keys = count()


@dataclass(frozen=True)
class Method:
    """One replaced method of an instance.

    Args:
        name: of the method on the class.
        attribute: of the instance that holds the replacement.
        function: called with the module, `bound` and the call's arguments; None after the undo, if
            a wrapper still holds this method.
        bound: further arguments after the module.
        before: the instance's own method before, None if it had the class's.
        wraps: whether the function also gets the stock method, after the module.
        adds: names of keyword arguments that the stock method lacks.
    """

    name: str
    attribute: str
    function: Callable[..., Any] | None
    bound: tuple[Any, ...]
    before: Any
    wraps: bool
    adds: tuple[str, ...]

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.function is None:
            return self.stock(module)(*args, **kwargs)
        if self.wraps:
            return self.function(module, self.stock(module), *self.bound, *args, **kwargs)
        return self.function(module, *self.bound, *args, **kwargs)

    def stock(self, module: nn.Module) -> Any:
        """The method without this replacement."""
        # Not a bound method: dynamo would look up the instance's method, which may wrap this one.
        return (
            partial(getattr(type(module), self.name), module)
            if self.before is None
            else self.before
        )

    def put(self, module: nn.Module, key: int) -> None:
        """Set it on the instance."""

        def stand_in(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self._pumer_methods[key](self, *args, **kwargs)

        stand_in.__name__ = self.name
        setattr(stand_in, _KEY, key)
        if self.wraps:  # others read the inputs from the signature
            stand_in.__signature__ = _with_self(  # type: ignore[attr-defined]
                inspect.signature(self.stock(module)), self.adds
            )
        vars(module)[self.attribute] = MethodType(stand_in, module)

    def take_off(self, module: nn.Module, key: int) -> None:
        """Restore the method from before; call the stock method if a wrapper holds this one."""
        attributes, methods = vars(module), vars(module)[METHODS]
        # A removed offload hook has moved the method back to `name`.
        for attribute in dict.fromkeys((self.attribute, self.name)):
            if _key_of(attributes.get(attribute)) == key:
                del methods[key], attributes[attribute]
                if self.before is not None:
                    attributes[attribute] = self.before
                break
        else:
            methods[key] = replace(self, function=None, bound=())
        if not methods:
            for attribute in (METHODS, _REPLICATE, _REDUCE):
                del attributes[attribute]


@dataclass(frozen=True)
class Rebound:
    """A handle to undo a replacement."""

    module: nn.Module
    key: int

    def undo(self) -> None:
        """Undo the replacement."""
        vars(self.module)[METHODS][self.key].take_off(self.module, self.key)


def rebind(
    module: nn.Module,
    name: str,
    function: Callable[..., Any],
    *bound: Any,
    wraps: bool = False,
    adds: Sequence[str] = (),
) -> Rebound:
    """Replace the method `name` of one instance by `function(module, *bound, *args, **kwargs)`.

    Args:
        module: the instance.
        name: of the method.
        function: a plain function; copies of the model share it.
        bound: further arguments after the module.
        wraps: also pass the previous method, after the module, and keep its signature.
        adds: names of keyword arguments to add to that signature.
    """
    attributes = vars(module)
    # accelerate's offload hooks keep the forward that they wrap in this attribute. The replacement
    # must run inside the hooks, where the weights are loaded.
    attribute = "_old_forward" if name == "forward" and "_old_forward" in attributes else name
    if METHODS not in attributes:
        attributes[METHODS] = {}
        _make_portable(module)
    before = attributes.get(attribute)
    method = Method(name, attribute, function, bound, before, wraps, tuple(adds))
    wrapped = _wrapped(module, attribute)
    if wrapped is not None and not wraps:
        # A full replacement must stay inside the wrapper around the previous one.
        attributes[METHODS][wrapped] = replace(method, before=attributes[METHODS][wrapped].before)
        return Rebound(module, wrapped)
    key = next(_keys)
    attributes[METHODS][key] = method
    method.put(module, key)
    return Rebound(module, key)


def _wrapped(module: nn.Module, attribute: str) -> int | None:
    """The key of the last undone method of this attribute that a wrapper still holds, or None."""
    if attribute not in vars(module):
        return None
    methods = reversed(vars(module)[METHODS].items())
    return next(
        (key for key, old in methods if old.attribute == attribute and old.function is None), None
    )


def _with_self(signature: inspect.Signature, adds: Sequence[str]) -> inspect.Signature:
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    parameters += [
        parameter
        if parameter.kind != inspect.Parameter.POSITIONAL_ONLY
        else parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for parameter in signature.parameters.values()
        if parameter.name != "self"  # also in wrappers that copy our signature
    ]
    var_keyword = parameters.pop() if parameters[-1].kind == inspect.Parameter.VAR_KEYWORD else None
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in adds
        if name not in signature.parameters
    ]
    return signature.replace(parameters=[*parameters, *([var_keyword] if var_keyword else [])])


def _key_of(value: Any) -> int | None:
    attributes = getattr(getattr(value, "__func__", None), "__dict__", {})
    # functools.wraps copies all attributes, and adds `__wrapped__`.
    return None if "__wrapped__" in attributes else attributes.get(_KEY)


def _make_portable(module: nn.Module) -> None:
    """Give copies, pickles and replicas of a module the replaced methods."""
    vars(module)[_REPLICATE] = MethodType(_replicate, module)
    vars(module)[_REDUCE] = MethodType(_reduce, module)


def _replicate(module: nn.Module) -> nn.Module:
    """Replaces `Module._replicate_for_data_parallel`: binds the methods to the replica."""

    def moved(value: Any) -> Any:
        mine = isinstance(value, MethodType) and value.__self__ is module
        return MethodType(value.__func__, replica) if mine else value

    replica = type(module)._replicate_for_data_parallel(module)
    attributes = vars(replica)
    attributes |= {name: moved(value) for name, value in attributes.items()}
    attributes[METHODS] = {
        key: replace(method, before=moved(method.before))
        for key, method in attributes[METHODS].items()
    }
    return replica


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Replaces `object.__reduce_ex__`, which pickles bound methods as the class's."""
    state = {
        name: value
        for name, value in vars(module).items()
        if name not in (_REPLICATE, _REDUCE) and _key_of(value) is None
    }
    return _new, (type(module),), state


def _new(cls: type[nn.Module]) -> nn.Module:
    module = cls.__new__(cls)
    vars(module)["__setstate__"] = MethodType(_set_state, module)
    return module


def _set_state(module: nn.Module, state: dict[str, Any]) -> None:
    del vars(module)["__setstate__"]
    module.__setstate__(state)
    _make_portable(module)
    for key, method in vars(module)[METHODS].items():
        method.put(module, key)
