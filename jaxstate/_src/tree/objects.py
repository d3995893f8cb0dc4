"""Objects of Python: of what kind one is, where it keeps its parts, how one is made of them.

A *part* of an object is an attribute (in ``__dict__`` or in a slot of ``__slots__``) or an item (of
a dict, list, deque or set). Parts are read and set directly, past ``__setattr__``, properties and
``__setitem__``: those are the program's, and it has used them when it assigned.
"""

from __future__ import annotations

import array
import contextlib
import enum
import functools
import gc
import operator
import pickle
import random
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstate._src import _jax

# -- Kinds -----------------------------------------------------------------------------------

NODE = "node"  # has an identity, and parts that can be assigned
MADE = "made"  # a value that is made of its parts, and made again when one of them changes
STATIC = "static"  # anything else

_ATOMS = (
    str, bytes, type(None), type, types.FunctionType, types.BuiltinFunctionType, types.ModuleType,
    property, staticmethod, classmethod, enum.Enum, np.dtype, np.generic, np.ndarray, jax.Array,
)  # fmt: skip
_CONTAINERS = (dict, list, deque, set)
_MADE = (tuple, types.MethodType, functools.partial, types.MappingProxyType)


class PerClass:
    """Something for each class, as long as the class is there."""

    def __init__(self) -> None:
        self._by_class: dict[Any, Any] = {}

    def get(self, cls: type) -> Any:
        return self._by_class.get(weakref.ref(cls))

    def put(self, cls: type, value: Any) -> Any:
        self._by_class[weakref.ref(cls, self._forget)] = value
        return value

    def _forget(self, cls: Any) -> None:
        self._by_class.pop(cls, None)


_kinds = PerClass()
_unknown = PerClass()  # to JAX, and nodes all the same


def kind_of(x: Any) -> str:
    """NODE, MADE or STATIC."""
    cls = type(x)
    kind = _kinds.get(cls)
    if kind is None:
        kind = _kinds.put(cls, _kind(x))
    return STATIC if _unknown.get(cls) and _is_sentinel(x) else kind


def _kind(x: Any) -> str:
    cls = type(x)
    if issubclass(cls, (*_ATOMS, _jax.Tracer)) or is_trace_note(x):
        return STATIC
    if issubclass(cls, (*_CONTAINERS, *_CONTENTS, types.CellType)):
        return NODE
    if issubclass(cls, _MADE):
        return MADE
    package = cls.__module__.partition(".")[0]
    layout = layout_of(cls)
    is_object = layout.base in (object, types.SimpleNamespace, threading.local)
    has_parts = is_object and (layout.has_dict or layout.slots)
    if _jax.children_of(x) is not None:
        return NODE if has_parts and package not in LIBRARIES else MADE
    if not has_parts or package in LIBRARIES or _is_value(cls) or _is_its_own_copy(x):
        return STATIC
    if layout.base is not threading.local:  # an empty one with a name is there to be assigned to
        _unknown.put(cls, True)
    return NODE


LIBRARIES = ("jax", "jaxlib", "jaxstate", "numpy")


def _is_value(cls: type) -> bool:
    """Whether objects of a class of Python's library are values, or no business of the state."""
    package = cls.__module__.partition(".")[0]
    if cls in (types.SimpleNamespace, threading.local):
        return False
    if package in ("collections", "argparse", "queue", "__main__"):
        return False
    return package in sys.stdlib_module_names


def _is_its_own_copy(x: Any) -> bool:
    """Whether the class says that its objects are not copied."""
    copy = getattr(type(x), "__deepcopy__", None)
    if copy is None:
        return False
    try:
        return copy(x, {}) is x
    except Exception:
        return False


def _is_sentinel(x: Any) -> bool:
    """Whether ``x`` has no parts and a name in its module: programs compare it by ``is``."""
    if parts_of(x)[0]:
        return False
    module = sys.modules.get(type(x).__module__)
    return any(value is x for value in vars(module).values()) if module else False


def is_trace_note(x: Any) -> bool:
    """Whether ``x`` is what an object of `flax.nnx` notes about the trace that it is made in."""
    cls = type(x)
    return cls.__name__ == "TraceState" and cls.__module__.startswith("flax.nnx")


# -- Contents --------------------------------------------------------------------------------


class Contents(NamedTuple):
    """How objects of a class written in C tell what they are, a static value, and become it."""

    get: Callable[[Any], Any]
    set: Callable[[Any, Any], None]
    make: Callable[[Any, Any], Any] = lambda cls, _: cls.__new__(cls)
    argument: Callable[[Any], Any] = lambda x: None


class Content:
    """What an object is: equal to that of another that is the same."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __len__(self) -> int:
        return 0  # there are no parts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Content) and self.value == other.value

    def __hash__(self) -> int:
        return hash(self.value)


def _set_bytes(x: Any, value: bytes) -> None:
    if x.tobytes() == value:
        return
    if len(value) == len(x) * x.itemsize:  # in place: a view of NumPy forbids another length
        np.frombuffer(x, np.uint8)[:] = np.frombuffer(value, np.uint8)
        return
    del x[:]
    x.frombytes(value)


def _set_bits(x: Any, value: bytes) -> None:
    x.state = pickle.loads(value)


def _bits_of(x: Any) -> Any:
    return x._bit_generator if isinstance(x, np.random.RandomState) else x.bit_generator


_CONTENTS = {
    bytearray: Contents(bytes, lambda x, value: x.__setitem__(slice(None), value)),
    array.array: Contents(
        array.array.tobytes, _set_bytes,
        lambda cls, typecode: array.array.__new__(cls, typecode), lambda x: x.typecode,
    ),
    random.Random: Contents(random.Random.getstate, random.Random.setstate),
    np.random.BitGenerator: Contents(
        lambda x: pickle.dumps(x.state), _set_bits, lambda cls, _: cls()
    ),
    **{
        kind: Contents(
            lambda x: pickle.dumps(_bits_of(x).state),
            lambda x, value: _set_bits(_bits_of(x), value),
            lambda cls, bits: cls(bits()), lambda x: type(_bits_of(x)),
        )
        for kind in (np.random.Generator, np.random.RandomState)
    },
}  # fmt: skip


# -- Nodes -----------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where the objects of a class keep their parts.

    Attributes:
      base: the class that makes the objects, the first in the order of resolution written in C.
      has_dict: whether they have a ``__dict__``.
      slots: the names of the attributes that are kept in slots.
      items: the container that they are, or None.
      contents: how they tell what they are beside their parts, or None.
    """

    base: Any
    has_dict: bool
    slots: tuple[str, ...]
    items: Any
    contents: Contents | None


_NOT_THERE = AttributeError, ValueError  # the latter for cells of functions
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


_layouts = PerClass()


def layout_of(cls: type) -> Layout:
    found = _layouts.get(cls)
    return _layouts.put(cls, _layout(cls)) if found is None else found


def _layout(cls: type) -> Layout:
    base: Any = next(
        c for c in cls.__mro__
        if not c.__flags__ & _HEAP_TYPE
        or isinstance(c.__dict__.get("__new__"), types.BuiltinFunctionType)
    )  # fmt: skip
    items = next((c for c in _CONTAINERS if issubclass(cls, c)), None)
    has_dict = bool(cls.__dictoffset__) or issubclass(cls, threading.local)
    contents = next((how for c, how in _CONTENTS.items() if issubclass(cls, c)), None)
    return Layout(base, has_dict, tuple(_slots_of(cls)), items, contents)


def _slots_of(cls: type) -> list[str]:
    names = []
    for c in cls.__mro__:
        slots = c.__dict__.get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__"):
                private = name.startswith("__") and not name.endswith("__")
                names.append(f"_{c.__name__.lstrip('_')}{name}" if private else name)
    if issubclass(cls, defaultdict):
        names.append("default_factory")
    if cls is types.CellType:
        names.append("cell_contents")
    return names


def dict_of(x: Any) -> dict[str, Any]:
    """The ``__dict__`` of an object whose class has one, whatever the class says it is.

    That of a `threading.local` is the one of this thread (and none of `object`, which finds another
    or nothing): what other threads have assigned is no part.
    """
    if issubclass(type(x), threading.local):
        return threading.local.__getattribute__(x, "__dict__")
    return object.__getattribute__(x, "__dict__")


def parts_of(x: Any) -> tuple[list[str], Any, list[Any]]:
    """The names of the attributes, the keys of the items (their number, if these have no keys), and
    the parts: first the attributes, then the items."""
    cls = type(x)
    if cls is dict:
        return [], list(x), list(x.values())
    if cls is list:
        return [], len(x), x[:]
    _, has_dict, slots, items, contents = layout_of(cls)
    names: list[str] = []
    values: list[Any] = []
    if has_dict:
        attributes = dict_of(x)
        names, values = list(attributes), list(attributes.values())
    for name in slots:
        with contextlib.suppress(*_NOT_THERE):
            values.append(object.__getattribute__(x, name))
            names.append(name)
    keys: Any = None
    if items is dict:
        base = _mapping(cls)
        keys = list(base.keys(x))
        values += base.values(x)
    elif contents is not None:
        keys = Content(contents.get(x))
    elif items is not None:
        parts = list(items.__iter__(x))
        keys = len(parts)
        values += parts
    return names, keys, values


def _mapping(cls: type) -> Any:
    return OrderedDict if issubclass(cls, OrderedDict) else dict


def put(x: Any, names: Any, keys: Any, i: int, value: Any) -> None:
    """Sets the part number ``i`` of an object whose parts are at ``names`` and ``keys``."""
    cls = type(x)
    if cls is dict or cls is list:
        x[i if cls is list else keys[i]] = value
        return
    if i < len(names):
        put_attribute(x, names[i], value)
        return
    i -= len(names)
    items = layout_of(cls).items
    if items is dict:
        _mapping(cls).__setitem__(x, keys[i], value)
    elif items is set:
        raise AssertionError("arrays have no hash")
    else:
        items.__setitem__(x, i, value)


def put_attribute(x: Any, name: str, value: Any) -> None:
    layout = layout_of(type(x))
    if name in layout.slots:
        layout.base.__setattr__(x, name, value)
    else:
        dict_of(x)[name] = value


def fill(x: Any, names: Any, keys: Any, values: list[Any]) -> None:
    """Makes these the parts of an object, whatever they are now."""
    cls = type(x)
    layout = layout_of(cls)
    if cls is not dict and cls is not list:
        attributes = dict_of(x) if layout.has_dict else {}
        kept = set(names)
        for name in [n for n in attributes if n not in kept]:
            del attributes[name]
        for name in layout.slots:
            if name not in kept:
                with contextlib.suppress(*_NOT_THERE):
                    layout.base.__delattr__(x, name)
        for name, value in zip(names, values, strict=False):
            put_attribute(x, name, value)
    contents = values[len(names) :]
    if layout.items is dict:
        base = _mapping(cls)
        if base.__len__(x) != len(keys) or not all(map(operator.is_, base.keys(x), keys)):
            base.clear(x)
        for key, value in zip(keys, contents, strict=True):
            base.__setitem__(x, key, value)
    elif layout.items is list:
        list.__setitem__(x, slice(None), contents)
    elif layout.contents is not None:
        layout.contents.set(x, keys.value)
    elif layout.items is deque:
        deque.clear(x)
        deque.extend(x, contents)
    elif layout.items is set and set(map(id, set.__iter__(x))) != set(map(id, contents)):
        set.clear(x)
        set.update(x, contents)


class Blank(NamedTuple):
    """What makes objects like a given one, without parts and past their constructor.

    Attributes:
      argument: what one cannot be made without: the longest that a deque gets, the type of an array
        of Python, the kind of bits of a generator, or what the constructor of a `threading.local`
        is called with again in each other thread.
    """

    cls: type
    argument: Any

    @staticmethod
    def of(x: Any) -> Blank:
        contents = layout_of(type(x)).contents
        if contents is not None:
            return Blank(type(x), contents.argument(x))
        if issubclass(type(x), threading.local):
            return Blank(type(x), _arguments_of_local(x))
        return Blank(type(x), x.maxlen if isinstance(x, deque) else None)

    def make(self) -> Any:
        layout = layout_of(self.cls)
        if layout.contents is not None:
            return layout.contents.make(self.cls, self.argument)
        if layout.base is threading.local:
            args, keywords = self.argument
            return threading.local.__new__(self.cls, *args, **keywords)
        made = layout.base.__new__(self.cls)
        if self.argument is not None:
            deque.__init__(made, (), self.argument)
        return made


def _arguments_of_local(x: Any) -> tuple[Any, Any]:
    """What a `threading.local` was made with, which only Python's memory manager sees."""
    seen = gc.get_referents(x)
    args = next((y for y in seen if type(y) is tuple), ())
    keywords = next((y for y in seen if type(y) is dict and any(type(k) is str for k in y)), {})
    return args, keywords


def made_of(cls: type, names: Any, values: list[Any]) -> Any:
    """An object of a class without items that has these attributes."""
    made = layout_of(cls).base.__new__(cls)
    for name, value in zip(names, values, strict=True):
        put_attribute(made, name, value)
    return made


_children = PerClass()
_ENOUGH = 256  # sets of attributes that are remembered of one class


def children_names(x: Any, names: list[str], values: list[Any]) -> frozenset[str]:
    """The attributes that are children of the pytree: a number there is an array of the tree.

    The class can say so: among the children of an object that has a mark in the place of each
    attribute are the marks of those. If it computes something of its attributes, their values are
    looked for.
    """
    cls = type(x)
    if not names or layout_of(cls).items is not None:
        return frozenset()
    known = _children.get(cls)
    if known is None:
        known = _children.put(cls, {})
    found = known.get(tuple(names))
    if found is None:
        marks: list[Any] = [object() for _ in names]
        try:
            children = _jax.children_of(made_of(cls, names, marks)) or ()
        except Exception:
            marks, children = values, _jax.children_of(x) or ()
        pairs = zip(names, marks, strict=True)
        found = frozenset(n for n, m in pairs if any(m is c for c in children))
        if len(known) >= _ENOUGH:
            known.clear()
        known[tuple(names)] = found
    return found


# -- Values that are made of their parts -----------------------------------------------------


class Tuple(NamedTuple):
    """Of a tuple or a subclass of it. (Behind its items come the attributes with these names.)"""

    cls: type
    names: tuple[str, ...]

    def make(self, parts: list[Any]) -> Any:
        n = len(parts) - len(self.names)
        made = tuple.__new__(self.cls, parts[:n])
        for name, value in zip(self.names, parts[n:], strict=True):
            put_attribute(made, name, value)
        return made


class Method(NamedTuple):
    """Of a bound method."""

    function: Any

    def make(self, parts: list[Any]) -> Any:
        return types.MethodType(self.function, parts[0])


class Partial(NamedTuple):
    """Of a `functools.partial`: the function, its arguments, and its keyword arguments."""

    cls: type
    count: int
    names: tuple[str, ...]

    def make(self, parts: list[Any]) -> Any:
        n = self.count
        keywords = dict(zip(self.names, parts[n:], strict=True))
        return self.cls(*parts[:n], **keywords)


class Members(NamedTuple):
    """Of a frozen set of objects."""

    cls: type

    def make(self, parts: list[Any]) -> Any:
        return frozenset.__new__(self.cls, parts)


class View(NamedTuple):
    """Of a view of a dict that cannot be written."""

    def make(self, parts: list[Any]) -> Any:
        return types.MappingProxyType(parts[0])


class Tree(NamedTuple):
    """Of a node of a pytree whose parts only JAX knows."""

    structure: Any

    def make(self, parts: list[Any]) -> Any:
        return self.structure.unflatten(parts)


def taken_apart(x: Any) -> tuple[Any, list[Any]]:
    """What makes a value of its parts again, and the parts."""
    cls = type(x)
    if cls is tuple:
        return Tuple(tuple, ()), list(x)
    if issubclass(cls, tuple):
        attributes = dict_of(x) if layout_of(cls).has_dict else {}
        return Tuple(cls, tuple(attributes)), [*tuple.__iter__(x), *attributes.values()]
    if issubclass(cls, frozenset):
        return Members(cls), list(x)
    if issubclass(cls, types.MappingProxyType):
        return View(), gc.get_referents(x)
    if issubclass(cls, types.MethodType):
        return Method(x.__func__), [x.__self__]
    if issubclass(cls, functools.partial):
        parts = [x.func, *x.args, *x.keywords.values()]
        return Partial(cls, 1 + len(x.args), tuple(x.keywords)), parts
    parts, structure = jax.tree.flatten(x, is_leaf=lambda part: part is not x)
    return Tree(structure), parts


def label(names: Any, keys: Any, i: int) -> str:
    """How a program writes the part number ``i``."""
    if i < len(names):
        return f".{names[i]}"
    i -= len(names)
    return f"[{i if isinstance(keys, int) else keys[i]!r}]"
