"""Objects of Python: where one keeps its parts, and how to make one of given parts.

A class may keep attributes in ``__dict__`` and in ``__slots__``, and be a dict, list or tuple
beside. An object is made without its constructor, which could have an opinion on the parts.
"""

from __future__ import annotations

import contextlib
import types
from collections import OrderedDict, defaultdict
from typing import Any

import jax

from jaxstate import _compat

WITH_ITEMS = (dict, list, tuple, OrderedDict, defaultdict)
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def stored_in(value: Any) -> dict[str, Any]:
    """The attributes that an object keeps: in its ``__dict__``, and in slots."""
    stored = dict(getattr(value, "__dict__", {}))
    for name in slots_of(type(value)):
        with contextlib.suppress(AttributeError):
            stored[name] = object.__getattribute__(value, name)
    return stored


def slots_of(cls: type) -> list[str]:
    """The names of the attributes that a class and its bases keep outside of ``__dict__``."""
    names = []
    for c in cls.__mro__:
        slots = c.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                names.append(f"_{c.__name__.lstrip('_')}{name}" if private else name)
    if issubclass(cls, defaultdict):
        names.append("default_factory")
    return names


def data_of(value: Any, stored: dict[str, Any]) -> frozenset[str]:
    """The names of the attributes that are children of the pytree.

    Its class can say so: among the children of an object that has a mark in the place of each
    attribute are the marks of those.
    """
    if not stored or issubclass(type(value), (dict, list, tuple)):
        return frozenset()
    marks = {name: object() for name in stored}
    try:
        children = _compat.children_of(built(type(value), marks, None)) or ()
        found = {name for name, mark in marks.items() if any(mark is c for c in children)}
    except Exception:  # it computes something of its attributes
        parts = {id(x) for x in jax.tree.leaves(value)}
        found = {n for n, x in stored.items() if any(id(p) in parts for p in jax.tree.leaves(x))}
    with_arrays = {n for n, x in stored.items() if any(map(_is_jax, jax.tree.leaves(x)))}
    return frozenset(found | with_arrays)


def _is_jax(x: Any) -> bool:
    return isinstance(x, (jax.Array, _compat.Tracer))


def built(cls: type, attributes: dict[str, Any], items: Any) -> Any:
    """An object with these attributes and, if it is a dict, list or tuple, these items."""
    builtin: Any = builtin_of(cls)
    made: Any = tuple.__new__(cls, items) if issubclass(cls, tuple) else builtin.__new__(cls)
    if issubclass(cls, dict):
        for key, value in items.items():
            builtin.__setitem__(made, key, value)
    elif issubclass(cls, list):
        list.extend(made, items)
    slots = slots_of(cls)
    for name, value in attributes.items():
        if name in slots:
            object.__setattr__(made, name, value)
        else:
            vars(made)[name] = value
    return made


def builtin_of(cls: type) -> Any:
    """The first class in the order of resolution that is written in C: it makes the objects."""
    return next(
        c for c in cls.__mro__
        if not c.__flags__ & _HEAP_TYPE
        or isinstance(c.__dict__.get("__new__"), types.BuiltinFunctionType)
    )  # fmt: skip
