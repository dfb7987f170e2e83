"""Other methods for one instance of a module, undone exactly.

They are real bound methods, so that accelerate, torch.export and dynamo find what they look for: a
`__func__`, a `__code__`, a signature. Others may wrap them while they are in force, as
torch.compile, autocast and offloading do. Such a wrapper stays when they are taken off, and what it
wraps then does what the stock method does. Copies, pickles and replicas of the module get methods
of their own.
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
"""Attribute of a module that holds its `Method`s, by a key of their own."""
_KEY = "_pumer_key"
_REPLICATE = "_replicate_for_data_parallel"
_REDUCE = "__reduce_ex__"
_keys = count()


@dataclass(frozen=True)
class Method:
    """One method of an instance.

    Args:
        name: of the method on the class.
        attribute: of the instance that holds it.
        function: what is called instead, with the module, `bound` and the call's arguments; None
            once it is taken off, though somebody still holds it.
        bound: what it is given besides.
        before: the instance's own method at the time, or None where it had that of its class.
        wraps: whether the function is given the stock method too, behind the module.
        adds: names of keyword arguments that the stock method does not have.
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
        """The method as it is without this one."""
        # No bound method: dynamo would read it as the instance's own, which may be what wraps this.
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
        if self.wraps:  # others read from it which inputs there are
            stand_in.__signature__ = _with_self(  # type: ignore[attr-defined]
                inspect.signature(self.stock(module)), self.adds
            )
        vars(module)[self.attribute] = MethodType(stand_in, module)

    def take_off(self, module: nn.Module, key: int) -> None:
        """Give back what was there before, or step aside where somebody wrapped this."""
        attributes, methods = vars(module), vars(module)[METHODS]
        # An offload hook that was taken off has moved what it found to `name`.
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
    """Where a method was put, for taking it off again."""

    module: nn.Module
    key: int

    def undo(self) -> None:
        """Take it off."""
        vars(self.module)[METHODS][self.key].take_off(self.module, self.key)


def rebind(
    module: nn.Module,
    name: str,
    function: Callable[..., Any],
    *bound: Any,
    wraps: bool = False,
    adds: Sequence[str] = (),
) -> Rebound:
    """Give one instance another method `name`: `function(module, *bound, *args, **kwargs)`.

    Args:
        module: the instance.
        name: of the method.
        function: of a module, by itself: a copy of the model shares it.
        bound: what it is given besides the module.
        wraps: give it the method that was there before, too, behind the module, and keep that one's
            signature.
        adds: names of keyword arguments to add to that signature.
    """
    attributes = vars(module)
    # accelerate's offload hooks wrap a forward that they keep under this name. What takes its place
    # has to run inside them, where the weights are.
    attribute = "_old_forward" if name == "forward" and "_old_forward" in attributes else name
    if METHODS not in attributes:
        attributes[METHODS] = {}
        _make_portable(module)
    before = attributes.get(attribute)
    method = Method(name, attribute, function, bound, before, wraps, tuple(adds))
    wrapped = _wrapped(module, attribute)
    if wrapped is not None and not wraps:
        # What calls no stock method has to stay inside the wrapper that somebody has put around it.
        attributes[METHODS][wrapped] = replace(method, before=attributes[METHODS][wrapped].before)
        return Rebound(module, wrapped)
    key = next(_keys)
    attributes[METHODS][key] = method
    method.put(module, key)
    return Rebound(module, key)


def _wrapped(module: nn.Module, attribute: str) -> int | None:
    """The last method that was taken off this attribute while somebody had it wrapped; None if
    there is none."""
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
        if parameter.name != "self"  # a wrapper that copies ours has it too
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
    # functools.wraps copies all attributes, and adds this one.
    return None if "__wrapped__" in attributes else attributes.get(_KEY)


def _make_portable(module: nn.Module) -> None:
    """Let copies, pickles and replicas of a module have the methods of its instance."""
    vars(module)[_REPLICATE] = MethodType(_replicate, module)
    vars(module)[_REDUCE] = MethodType(_reduce, module)


def _replicate(module: nn.Module) -> nn.Module:
    """In place of `Module._replicate_for_data_parallel`: the replica's methods are its own."""

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
    """In place of `object.__reduce_ex__`, for which a bound method is one of the class."""
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
