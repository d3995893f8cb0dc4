"""Shadows: objects that look like the parts of a tree, and whose arrays are slots.

A *shadow* of an object is an instance of a subclass of its class, made for the time of one call of
`mutate`: ``isinstance`` holds, its methods and properties are those of the class. What is different
is where its attributes and items are: in its *record* (`jaxstate.records`), which is asked for the
value of each, and told what is assigned.

A *guest* is a shadow without slots. It shows the values it was given, and refuses to be written to.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxstate import _compat
from jaxstate.leaves import GONE, Bundle, Leaf, Leaves, Noted, Static, ended
from jaxstate.objects import built
from jaxstate.slots import holders


def record_of(shadow: Any) -> Any:
    """The `jaxstate.records.Record` of a shadow."""
    return object.__getattribute__(shadow, "__dict__")["_jaxstate_record"]


def set_record(shadow: Any, record: Any) -> None:
    object.__getattribute__(shadow, "__dict__")["_jaxstate_record"] = record


def is_shadow(x: Any) -> bool:
    return issubclass(type(x), Shadow)


# -- The objects that shadows stand for ------------------------------------------------------


def plain(value: Any) -> Any:
    """A tree without shadows: the objects that they stand for, as they are now."""
    if is_shadow(value):
        return raw(value, record_of(value).value)
    leaves, tree = jax.tree.flatten(value, is_leaf=is_shadow)
    if not any(map(is_shadow, leaves)):
        return value
    return tree.unflatten([plain(x) if is_shadow(x) else x for x in leaves])


def _of_plain_trees(tree_map: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.tree.map` of several trees: a shadow and a plain object have the same structure there.

    Everywhere else a shadow is a node of another type, for which there is no remedy.
    """

    @functools.wraps(tree_map)
    def mapped(f: Any, tree: Any, *rest: Any, **options: Any) -> Any:
        if rest and any(isinstance(holder, Leaves) for holder in holders()):
            tree, rest = plain(tree), tuple(map(plain, rest))
        return tree_map(f, tree, *rest, **options)

    return mapped


_compat.wrap_tree_map(_of_plain_trees)


def raw(shadow: Any, of_leaf: Callable[[Any], Any]) -> Any:
    """An object of the shadowed class with ``of_leaf(leaf)`` for its slots, made without its
    constructor."""
    record = record_of(shadow)
    items: Any = record.items
    if isinstance(items, dict):
        items = {key: raw_entry(entry, of_leaf) for key, entry in items.items()}
    elif items is not None:
        items = [raw_entry(entry, of_leaf) for entry in items]
    attributes = {name: raw_entry(entry, of_leaf) for name, entry in record.attributes.items()}
    return built(record.cls, attributes, items)


def raw_entry(entry: Any, of_leaf: Callable[[Any], Any]) -> Any:
    if isinstance(entry, Leaf):
        return of_leaf(entry)
    if isinstance(entry, Static):
        return entry.value
    if isinstance(entry, Noted):
        return entry.value("tree")
    if entry is GONE:
        raise ended("tree")
    if isinstance(entry, Bundle):
        return entry.tree.unflatten([raw_entry(e, of_leaf) for e in entry.entries])
    return raw(entry, of_leaf)


# -- Attributes ------------------------------------------------------------------------------


class Shadow:
    """What all shadows have in common; in front of the class of the object."""

    _jaxstate_class: type

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """``type(self)(...)`` in a method makes an object of the class itself."""
        return cls._jaxstate_class(*args, **kwargs)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Classes that do something with their subclasses need not know of this one."""

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        return record_of(self).cls

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigns also where the class refuses it; properties and other descriptors are asked."""
        if inspect.getattr_static(type(self), name, None) is None:
            add_field(type(self), name)
        found = inspect.getattr_static(type(self), name)
        if not hasattr(type(found), "__set__"):  # a class attribute as a default, or a method
            add_field(type(self), name)
            found = inspect.getattr_static(type(self), name)
        type(found).__set__(found, self, value)

    def __delattr__(self, name: str) -> None:
        found = inspect.getattr_static(type(self), name, None)
        if not hasattr(type(found), "__delete__"):
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        type(found).__delete__(found, self)  # type: ignore[union-attr]

    def __copy__(self) -> Any:
        return plain(self)

    def __deepcopy__(self, memo: Any) -> Any:
        return copy.deepcopy(plain(self), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)


class Field:
    """An attribute that a shadow has in its record; also for ``object.__setattr__``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, shadow: Any, owner: Any = None) -> Any:
        if shadow is None:
            return getattr(owner._jaxstate_class, self.name)
        record = record_of(shadow)
        if self.name not in record.attributes:
            raise AttributeError(f"{record.cls.__name__!r} has no attribute {self.name!r}")
        return record.value(record.attributes[self.name])

    def __set__(self, shadow: Any, value: Any) -> None:
        record, name = record_of(shadow), self.name
        record.attributes[name] = record.assign(
            record.attributes.get(name), value, f"{record.label}.{name}", name in record.static
        )

    def __delete__(self, shadow: Any) -> None:
        record = record_of(shadow)
        if self.name not in record.attributes:
            raise AttributeError(f"{record.cls.__name__!r} has no attribute {self.name!r}")
        record.check_structure_may_change(f"{record.label}.{self.name}")
        del record.attributes[self.name]


class NamedItem:
    """A field of a named tuple."""

    def __init__(self, name: str, index: int) -> None:
        self.name = name
        self.index = index

    def __get__(self, shadow: Any, owner: Any = None) -> Any:
        return getattr(owner._jaxstate_class, self.name) if shadow is None else shadow[self.index]

    def __set__(self, shadow: Any, value: Any) -> None:
        shadow[self.index] = value


def add_field(shadow_class: Any, name: str) -> None:
    if not isinstance(shadow_class.__dict__.get(name), Field):
        type.__setattr__(shadow_class, name, Field(name))
