"""Parametrized methods: which module an instance is.

Every instance of a class is a module of its own, from when it is made (not from its first call).
An instance that a call of a module makes is, like a module that it makes, in every call the same
one.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import Any, NamedTuple

from jaxstate._src import _jax
from jaxstate._src.params.entries import current_origin
from jaxstate._src.params.entry import current_home
from jaxstate._src.params.paths import ModuleId, Origin

__all__ = ["PerInstance", "note_instances_of"]


class _Made(NamedTuple):
    """Where an instance was made, and which of those that are made there it is."""

    origin: Origin
    key: Hashable

    @classmethod
    def now(cls, kind: type) -> _Made:
        here = current_origin()
        return cls(here._replace(counts={}), here.next_key("instance", kind.__qualname__))

    def token(self, fn: Any) -> ModuleId:
        return self.origin.token(self.key, getattr(fn, "__qualname__", None))


class PerInstance:
    """The modules that one method is, by the identity of the instance, as long as that lives."""

    def __init__(self) -> None:
        self._tokens: dict[int, tuple[Any, ModuleId]] = {}
        self._without_weakrefs: dict[int, list[Any]] = {}
        self._enough = 16

    def token(self, instance: Any, method: Any) -> ModuleId:
        entry = self._tokens.get(id(instance))
        if entry is None:
            try:
                alive: Any = weakref.ref(instance, _forget(self._tokens, id(instance)))
            except TypeError:
                self._drop_forgotten()
                alive = self._without_weakrefs[id(instance)] = [instance]
            made = _made_when(instance)
            token = ModuleId(current_home()) if made is None else made.token(method)
            entry = self._tokens[id(instance)] = (alive, token)
        return entry[1]

    def _drop_forgotten(self) -> None:
        """Drops, once in a while, the instances without weak references that nobody else has."""
        if len(self._without_weakrefs) >= self._enough:
            for key, held in list(self._without_weakrefs.items()):
                if _jax.is_only_reference(held):
                    del self._without_weakrefs[key], self._tokens[key]
            self._enough = 2 * len(self._without_weakrefs) + 16

    def __deepcopy__(self, memo: Any) -> PerInstance:
        return PerInstance()


def _forget(notes: dict[int, Any], key: int) -> Callable[[Any], None]:
    """What to do when the object is gone of which there is a note."""
    return lambda _: notes.pop(key, None) and None


# For each instance of a class with parametrized methods, by identity: a weak reference, and where
# it was made.
_made: dict[int, tuple[Any, _Made]] = {}


def _made_when(instance: Any) -> _Made | None:
    """Where the instance was made; None if nobody saw it being made."""
    ref, made = _made.get(id(instance), (None, None))
    return made if ref is not None and ref() is instance else None


def note_instances_of(owner: type) -> None:
    """Lets every new instance of a class be noted in `_made`."""
    own = owner.__dict__.get("__new__")
    plain = getattr(getattr(own, "__func__", None), "plain", own)  # a class may be made once more

    def new(cls: Any, /, *args: Any, **kwargs: Any) -> Any:
        make = super(owner, cls).__new__ if plain is None else plain.__get__(None, cls)
        if make is not object.__new__:
            instance = make(cls, *args, **kwargs)
        elif (args or kwargs) and cls.__init__ is object.__init__:
            raise TypeError(f"{cls.__name__}() takes no arguments")
        else:
            instance = object.__new__(cls)
        key = id(instance)
        with suppress(TypeError):  # without weak references, it is as if nobody had seen it
            _made[key] = weakref.ref(instance, _forget(_made, key)), _Made.now(cls)
        return instance

    new.plain = plain  # type: ignore[attr-defined]
    with suppress(AttributeError, TypeError):  # a class that does not want to be changed
        owner.__new__ = staticmethod(new)  # type: ignore[assignment]
        if plain is None and "__signature__" not in owner.__dict__:
            owner.__signature__ = _Signature(owner)  # type: ignore[attr-defined]


class _Signature:
    """That of a class, for which `inspect` would ask the function that notes its instances."""

    def __init__(self, noted: type) -> None:
        self.noted = noted

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:  # which may be callable
            raise AttributeError("__signature__")
        make: Any = owner.__init__
        if make is object.__init__:
            make = super(self.noted, owner).__new__
        if make is object.__new__:
            return inspect.Signature()
        signature = inspect.signature(make)
        return signature.replace(parameters=list(signature.parameters.values())[1:])
