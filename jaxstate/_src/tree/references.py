"""Values that lead back to the objects: functions that close over one, and weak references to one.

Such a value is static, unless it leads back to an object that is looked at. A copy of the objects
then has one that leads to the copy. What a function closes over is kept in the cells of Python,
which are objects with one part; functions that share a variable share its cell.
"""

from __future__ import annotations

import dis
import functools
import gc
import itertools
import operator
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxstate._src import _jax
from jaxstate._src.tree.objects import LIBRARIES, MADE, kind_of, parts_of, taken_apart

Find = Callable[[Any], Any]


class Same:
    """A part that stays what it is."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class Function:
    """Of a function: its cells, its default values, and its attributes are the parts."""

    __slots__ = ("key", "like")

    def __init__(self, x: types.FunctionType) -> None:
        self.like = x
        names = tuple(x.__kwdefaults__ or ()), tuple(x.__dict__)
        counts = len(x.__closure__ or ()), len(x.__defaults__ or ())
        self.key = x.__code__, id(x.__globals__), *counts, *names

    @staticmethod
    def parts(x: types.FunctionType) -> list[Any]:
        keywords = (x.__kwdefaults__ or {}).values()
        return [*(x.__closure__ or ()), *(x.__defaults__ or ()), *keywords, *x.__dict__.values()]

    def make(self, parts: list[Any]) -> Any:
        code, _, n, m, keywords, attributes = self.key
        x, rest = self.like, [part.value if isinstance(part, Same) else part for part in parts]
        cells, defaults, rest = tuple(rest[:n]), tuple(rest[n : n + m]), rest[n + m :]
        made = types.FunctionType(code, x.__globals__, x.__name__, defaults or None, cells or None)
        made.__kwdefaults__ = dict(zip(keywords, rest, strict=False)) or None
        made.__dict__.update(zip(attributes, rest[len(keywords) :], strict=True))
        made.__qualname__, made.__module__, made.__doc__ = x.__qualname__, x.__module__, x.__doc__
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Function) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


class Jitted:
    """Of a jitted function: the function."""

    __slots__ = ("like",)

    def __init__(self, x: Any) -> None:
        self.like = _jax.how_jitted(x)

    @staticmethod
    def parts(x: Any) -> list[Any]:
        return [x.__wrapped__]

    def make(self, parts: list[Any]) -> Any:
        return _jax.jitted_again(parts[0], self.like)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Jitted) and self.like is other.like

    def __hash__(self) -> int:
        return id(self.like)


class Ruled:
    """Of a function with a rule of its own: its attributes are the parts."""

    __slots__ = ("cls", "names")

    def __init__(self, x: Any) -> None:
        self.cls, self.names = type(x), tuple(vars(x))

    @staticmethod
    def parts(x: Any) -> list[Any]:
        return list(vars(x).values())

    def make(self, parts: list[Any]) -> Any:
        made = object.__new__(self.cls)
        values = [part.value if isinstance(part, Same) else part for part in parts]
        vars(made).update(zip(self.names, values, strict=True))
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ruled) and (self.cls, self.names) == (other.cls, other.names)

    def __hash__(self) -> int:
        return hash((self.cls, self.names))


class Weak(NamedTuple):
    """Of a weak reference: the object, or the method."""

    cls: type
    callback: Any

    def make(self, parts: list[Any]) -> Any:
        make = weakref.proxy if self.cls in weakref.ProxyTypes else self.cls
        return make(parts[0], self.callback)


_MAKERS: dict[type, Any] = {
    types.FunctionType: Function,
    _jax.JittedFunction: Jitted,
    jax.custom_jvp: Ruled,
    jax.custom_vjp: Ruled,
    jax.custom_batching.custom_vmap: Ruled,
}
_REFERENCES = (weakref.ref, weakref.WeakMethod, *weakref.ProxyTypes)
_CONTAINERS = (weakref.WeakValueDictionary, weakref.WeakKeyDictionary, weakref.WeakSet)


def may_lead_back(x: Any) -> bool:
    cls = type(x)
    if cls is types.FunctionType:
        return bool(x.__closure__ or x.__defaults__ or x.__kwdefaults__ or x.__dict__)
    return cls in _REFERENCES or cls in _MAKERS or isinstance(x, _CONTAINERS)


def followed(x: Any, is_known: Find) -> tuple[Any, list[Any]] | None:
    """What makes such a value again, and the parts, if it leads to an object that is known.

    Weak containers of such objects cannot be made again: see `weak_container`.
    """
    cls = type(x)
    if cls in _MAKERS:
        parts = _MAKERS[cls].parts(x)
        written = _written(x) if cls is types.FunctionType else ()
        leading = [
            any(p is c for c in written) or is_known(p) or _leads(p, is_known, {}) for p in parts
        ]
        if not any(leading):
            return None
        parts = [p if leads else Same(p) for p, leads in zip(parts, leading, strict=True)]
        return _MAKERS[cls](x), parts
    if cls in _REFERENCES:
        (referent,) = _referents(x)
        if is_known(referent.__self__ if cls is weakref.WeakMethod and referent else referent):
            return Weak(cls, x.__callback__ if cls is weakref.ref else None), [referent]
    return None


def is_weak_container(x: Any, is_known: Find) -> bool:
    return isinstance(x, _CONTAINERS) and any(map(is_known, _referents(x)))


def _referents(x: Any) -> list[Any]:
    """The objects that a weak reference, or a container of such, refers to."""
    if isinstance(x, weakref.ref):
        return [x()]
    if type(x) in weakref.ProxyTypes:
        try:
            return [x.__init__.__self__]
        except ReferenceError:
            return [None]
    if isinstance(x, weakref.WeakSet):
        return list(x)
    return [y for pair in x.items() for y in pair]


def _written(x: types.FunctionType) -> list[Any]:
    """The cells of the variables that a function of the program closes over and assigns to."""
    if not x.__closure__ or (x.__module__ or "").partition(".")[0] in LIBRARIES:
        return []
    names = _assigned(x.__code__)
    return [c for n, c in zip(x.__code__.co_freevars, x.__closure__, strict=True) if n in names]


@functools.lru_cache(1024)
def _assigned(code: types.CodeType) -> frozenset[str]:
    """The names of variables of outer functions that code assigns to, or a function in it."""
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    names = {n for c in inner for n in _assigned(c)}
    if _STORE in code.co_code[::2]:
        names.update(i.argval for i in dis.get_instructions(code) if i.opcode == _STORE)
    return frozenset(names.intersection(code.co_freevars))


_STORE = dis.opmap["STORE_DEREF"]


def _leads(x: Any, is_known: Find, seen: dict[int, Any]) -> bool:
    """Whether an object that is known is reached through functions, values and containers."""
    if id(x) in seen:
        return False
    seen[id(x)] = x
    return any(is_known(part) or _leads(part, is_known, seen) for part in _inside(x))


def _inside(x: Any) -> Iterator[Any]:
    cls = type(x)
    if cls in _MAKERS:
        yield from _MAKERS[cls].parts(x)
    elif cls in (list, dict, types.CellType):
        yield from parts_of(x)[2]
    elif cls in _REFERENCES:
        yield from _referents(x)
    elif cls in (tuple, types.MethodType) or kind_of(x) is MADE:
        yield from taken_apart(x)[1]


# -- Iterators -------------------------------------------------------------------------------


def position(x: Any) -> Any:
    """Where an iterator of Python is: another value when it has been advanced."""
    place: Any = None
    if isinstance(x, types.GeneratorType) and x.gi_frame is not None:
        place = x.gi_frame.f_lasti, *map(id, x.gi_frame.f_locals.values())
    elif type(x) is itertools.count:
        place = repr(x)
    inner = [
        position(z)
        for y in gc.get_referents(x)
        for z in (y if type(y) is tuple else (y,))
        if is_iterator(z)
    ]
    return operator.length_hint(x, -1), place, *inner


def is_iterator(x: Any) -> bool:
    """Whether ``x`` is an iterator that is written in C, or a generator."""
    return isinstance(getattr(type(x), "__next__", None), types.WrapperDescriptorType)
