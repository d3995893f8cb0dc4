"""Shadows: objects that look like the parts of a tree, and whose arrays are slots.

A *shadow* of an object is an instance of a subclass of its class, made for the time of one call of
`mutate`: ``isinstance`` holds, its methods and properties are those of the class. What is different
is where its attributes and items are. Each is an *entry* of the shadow's record:

* `_Leaf`: an array, kept in a slot (`Leaves`), so that code inside loops, branches and other
  transformations reads and writes it like any slot;
* another shadow, for a part that has parts of its own;
* `_Bundle`: a part that can only be replaced as a whole (a `jax.tree_util.Partial`, say);
* `_Static`: anything else.

Assigning to a shadow writes the slots, if what is assigned has the structure and types of what was
there. Otherwise it makes new entries, which is a change of structure: it needs Python to run, so it
is refused inside a jaxpr under construction.

A shadow may pass through a transformation as an argument, because its class is a pytree too:

* into a jaxpr under construction (jit, the carry of a loop, an operand of a branch), it arrives as
  the same object;
* elsewhere (the lanes of a vmap, the result of a jitted function) arrives a *guest*: a shadow that
  shows the given arrays, and refuses to be written to, because that would be lost.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import types
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator, MutableMapping, MutableSequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxstate import _compat, trace
from jaxstate.errors import (
    ClosedStateError,
    CopyWriteError,
    LaneWriteError,
    SlotTypeError,
    StructureChangeError,
    message,
)
from jaxstate.slots import Address, Cell, Holder, holders, signature_changed

__all__ = ["Leaves", "is_shadow", "plain", "shadow_of"]


# -- The slots -------------------------------------------------------------------------------


class LeafAddress(Address):
    """One leaf of the tree that a call of `mutate` works on.

    The calls that are open are told apart by how deep they are nested, so that a jitted function
    which was traced in one call can be used in the next one.
    """

    __slots__ = ("label", "level", "number")

    threaded = True

    def __init__(self, level: int, number: int, label: str) -> None:
        self.level = level
        self.number = number
        self.label = label

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LeafAddress):
            return False
        return (self.level, self.number) == (other.level, other.number)

    def __hash__(self) -> int:
        return hash((LeafAddress, self.level, self.number))

    def __repr__(self) -> str:
        return f"leaf {self.label}"

    def missing(self) -> Exception:
        return _closed(self.label)


class Leaves(Holder):
    """The leaves of the tree that one call of `mutate` works on."""

    def __init__(self, structure: Hashable, made: str) -> None:
        super().__init__()
        self.made = made
        self.level = sum(isinstance(holder, Leaves) for holder in holders())
        self.is_open = True
        self.cells: dict[int, Cell] = {}
        self.avals: dict[int, Any] = {}
        self.originals: dict[int, tuple[Any, Any]] = {}  # the given leaf, and what it was made into
        self.shadows: dict[int, Any] = {}
        self._numbers = itertools.count()
        self._structure = structure

    def knows(self, address: Address) -> bool:
        return (
            isinstance(address, LeafAddress)
            and address.level == self.level
            and address.number in self.avals
        )

    def cell(self, address: LeafAddress) -> Cell:  # type: ignore[override]
        return self.cells[address.number]

    def aval(self, address: LeafAddress) -> Any:  # type: ignore[override]
        return self.avals[address.number]

    def without_values(self) -> Leaves:
        rest = copy.copy(self)
        rest.cells, rest.originals, rest.shadows, rest.anchor = {}, {}, {}, None
        rest.lane_tables, rest.extra = {}, {}
        return rest

    def signature(self) -> Hashable:
        return ("mutate", self._structure, tuple(self.avals.items()))

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        return LaneWriteError(
            message(
                f"Lanes of a vmap wrote different values to {address}, which they share.",
                fix="""
                tree.total = values.sum()                     # one value: outside, from all lanes
                jax.vmap(jaxstate.mutate(fn))(trees, xs)      # or a tree per lane
                """,
                made=self.made,
                used=_compat.user_location(),
                under=f"vmap over {_compat.lane_count(trace)} lanes",
            )
        )

    def close(self) -> None:
        self.is_open = False
        self.cells, self.originals, self.shadows = {}, {}, {}

    # What shadows do with it.

    @property
    def structure_may_change(self) -> bool:
        """Inside a jaxpr under construction it may not: the jaxpr may be run often, or never."""
        return trace.boundary_of(self) is None

    def new(self, value: Any, label: str) -> _Leaf:
        """A leaf that holds ``value``, which is an array or a scalar."""
        leaf = _Leaf(next(self._numbers), label)
        value = _strong(value)
        self.avals[leaf.number] = _compat.typeof(value)
        self.cells[leaf.number] = Cell(None)
        try:
            trace.write(self._address(leaf), value)  # which keeps what outlives the trace
        except Exception:
            del self.avals[leaf.number], self.cells[leaf.number]
            raise
        return leaf

    def remember_originals(self, given: list[Any], shadow: Any) -> None:
        """A leaf that nobody writes comes out as it was given, also if that is a Python number."""
        slots = jax.tree.leaves(raw(shadow, lambda leaf: leaf))
        if len(slots) == len(given):
            for slot, value in zip(slots, given, strict=True):
                if isinstance(slot, _Leaf):
                    self.originals[slot.number] = value, self.cells[slot.number].value

    def read(self, leaf: _Leaf) -> Any:
        self._check_open(leaf)
        return trace.read(self._address(leaf))

    def write(self, leaf: _Leaf, value: Any) -> None:
        self._check_open(leaf)
        trace.write(self._address(leaf), value)

    def result(self, leaf: _Leaf) -> Any:
        """The value after the call; the given object itself if the leaf was not written."""
        value = self.cells[leaf.number].value
        original, stored = self.originals.get(leaf.number, (None, None))
        return original if value is stored else value

    def address_in(self, leaf: _Leaf, boundary: Any) -> Address:
        return self._address(leaf).seen_from(boundary)

    def number(self, shadow: Any) -> int:
        number = next(self._numbers)
        self.shadows[number] = shadow
        return number

    def _address(self, leaf: _Leaf) -> LeafAddress:
        return LeafAddress(self.level, leaf.number, leaf.label)

    def _check_open(self, leaf: _Leaf) -> None:
        if not self.is_open:
            raise _closed(leaf.label)


def _closed(label: str) -> Exception:
    return ClosedStateError(
        message(
            f"{label} is part of the object that a function under jaxstate.mutate was given, and"
            " is used after that function has ended.",
            fix="""
            out, tree = jaxstate.mutate(fn)(tree)      # the new tree: use this
            """,
            used=_compat.user_location(),
        )
    )


def _strong(value: Any) -> Any:
    """The value as an array whose dtype no Python scalar can change."""
    value = _compat.as_array(value)
    return jax.lax.convert_element_type(value, value.dtype) if _is_weak(value) else value


def _is_weak(array: Any) -> bool:
    return getattr(array, "weak_type", False)  # arrays of keys have no such thing


# -- Entries and records ---------------------------------------------------------------------


class _Leaf:
    """An array in a slot."""

    __slots__ = ("label", "number")

    def __init__(self, number: int, label: str) -> None:
        self.number = number
        self.label = label


class _Bundle:
    """A part that can only be replaced as a whole."""

    __slots__ = ("entries", "tree")

    def __init__(self, tree: Any, entries: list[Any]) -> None:
        self.tree = tree
        self.entries = entries


class _Static:
    """Anything that is not an array and has no parts; in a guest, also an array."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class _Gone:
    """What was there before something else was assigned, in a jaxpr that this one is not part of:
    there is no telling how often that was done."""

    __slots__ = ()


_gone = _Gone()


class _Noted:
    """An array that only a jaxpr under construction has, and that must not outlive it."""

    __slots__ = ("leaves",)

    def __init__(self, leaves: Leaves, value: Any, boundary: Any) -> None:
        self.leaves = leaves
        _extra(boundary)[self] = value

    def value(self, label: str) -> Any:
        for boundary in trace.boundaries(self.leaves):
            if self in _extra(boundary):
                return _extra(boundary)[self]
        raise _ended(label)


def _extra(boundary: Any) -> dict[Any, Any]:
    return boundary.extra if isinstance(boundary, Holder) else trace.notes_of(boundary).extra


class _Record:
    """Where the attributes and items of one shadow are.

    Attributes:
      cls: the class of the object.
      leaves: the slots; None for a guest.
      label: how the program gets to the object, for messages.
      attributes: name -> entry.
      static: the names of attributes that are not data: their numbers stay numbers.
      items: of a dict, list or tuple, entries by key or index; else None.
      number: of the place in the tree; None for a guest.
      home: the boundary inside which the program got the shadow (weakly), or None.
    """

    __slots__ = ("attributes", "cls", "home", "items", "label", "leaves", "number", "static")

    def __init__(self, cls: type, leaves: Leaves | None, label: str) -> None:
        self.cls = cls
        self.leaves = leaves
        self.label = label
        self.attributes: dict[str, Any] = {}
        self.static: frozenset[str] = frozenset()
        self.items: Any = None
        self.number: int | None = None
        self.set_home(None if leaves is None else trace.boundary_of(leaves))

    def set_home(self, boundary: Any) -> None:
        self.home = None if boundary is None else weakref.ref(boundary)

    def is_home(self, boundary: Any) -> bool:
        return boundary is (self.home and self.home())

    def seen_from(self, boundary: Any) -> _Record:
        """The same attributes and items, for another shadow."""
        other = copy.copy(self)
        other.set_home(boundary)
        return other

    def with_entries(self, change: Callable[[Any], Any]) -> _Record:
        """Other attributes and items, of the same names."""
        other = copy.copy(self)
        other.attributes = {name: change(e) for name, e in self.attributes.items()}
        if isinstance(self.items, dict):
            other.items = {key: change(e) for key, e in self.items.items()}
        elif self.items is not None:
            other.items = [change(e) for e in self.items]
        return other

    def value(self, entry: Any) -> Any:
        """What the program sees of an entry."""
        if isinstance(entry, _Leaf):
            assert self.leaves is not None
            return self.leaves.read(entry)
        if isinstance(entry, _Bundle):
            return entry.tree.unflatten([self.value(e) for e in entry.entries])
        if isinstance(entry, _Noted):
            return entry.value(self.label)
        if isinstance(entry, _Static):
            if _compat.has_ended(entry.value):
                raise _ended(self.label)
            return entry.value
        if entry is _gone:
            raise _ended(self.label)
        return entry if self.leaves is None else _handle(entry, trace.boundary_of(self.leaves))

    def assign(self, old: Any, value: Any, label: str, static: bool = False) -> Any:
        """Puts ``value`` where the entry ``old`` is (None: nowhere yet).

        Returns:
          The entry that is there now.
        """
        if is_shadow(old) and is_shadow(value) and _is_same_place(old, value):
            return old
        leaves = self.check_not_a_copy(label)
        value = plain(value)
        if isinstance(old, _Static) and _is_same(old.value, value):
            return old
        kept = _written(old, value, leaves)
        if kept is not None:
            return kept
        if not leaves.structure_may_change:
            if isinstance(old, _Leaf) and _compat.is_array_like(value):
                raise _type_changed(label, value, leaves.avals[old.number])
            raise _structure_changed(label)
        entry = _entry(value, leaves, label, static)
        if is_shadow(old):
            _succeeded(old)
        signature_changed()
        return entry

    def check_structure_may_change(self, label: str) -> None:
        if not self.check_not_a_copy(label).structure_may_change:
            raise _structure_changed(label)

    def check_not_a_copy(self, label: str) -> Leaves:
        if self.leaves is None:
            raise _copy_written(label)
        return self.leaves


def _written(old: Any, value: Any, leaves: Leaves) -> Any:
    """Writes ``value`` to the slots of an entry if it has their structure and types.

    Returns:
      The entry; None if ``value`` does not fit.
    """
    if old is None or isinstance(old, _Static):
        return None
    try:
        slots, tree = jax.tree.flatten(_raw_entry(old, lambda leaf: leaf))
        values, value_tree = jax.tree.flatten(value)
    except Exception:  # a class that cannot be rebuilt around something that is not an array
        return None
    if tree != value_tree or len(slots) != len(values):
        return None
    fitted = []
    for slot, new in zip(slots, values, strict=True):
        if not isinstance(slot, _Leaf):
            if not _is_same(slot, new):
                return None
        elif not _compat.is_array_like(new):
            return None
        else:
            aval = leaves.avals[slot.number]
            new = _fitted(new, aval)
            if not _compat.same_type(new, aval):
                return None
        fitted.append(new)
    if is_shadow(old):
        old = _succeeded(old)
    for slot, new in zip(slots, fitted, strict=True):
        if isinstance(slot, _Leaf):
            leaves.write(slot, new)
    return old


def _fitted(value: Any, aval: Any) -> Any:
    """The value as an array; a Python number takes the dtype of a leaf that can hold it."""
    array = _compat.as_array(value)
    if _is_weak(array) and jnp.result_type(aval.dtype, value) == aval.dtype:
        return jax.lax.convert_element_type(array, aval.dtype)
    return _strong(array)


def _is_same(a: Any, b: Any) -> bool:
    """Whether two objects that are not arrays are equal."""
    if a is b:
        return True
    if type(a) is not type(b) or _compat.is_array_like(a):
        return False
    try:
        return bool(a == b)
    except Exception:
        return False


def _entry(value: Any, leaves: Leaves | None, label: str, static: bool) -> Any:
    """A new entry for a value. Nothing but arrays is kept in slots if it is ``static``."""
    is_array = isinstance(value, (jax.Array, _compat.Tracer))
    if is_array or (not static and _compat.is_array_like(value)):
        return _Static(value) if leaves is None else leaves.new(value, label)
    if static or value is None or _compat.children_of(value) is None:
        return _Static(copy.deepcopy(value) if type(value) in (list, dict, set) else value)
    if _builtin(type(value)) in _WITH_ITEMS or _builtin(type(value)) is object:
        return shadow_of(value, leaves, label)
    parts, tree = jax.tree.flatten(value)
    return _Bundle(tree, [_entry(part, leaves, label, False) for part in parts])


# -- Shadows and the objects they stand for --------------------------------------------------


def shadow_of(value: Any, leaves: Leaves | None, label: str) -> Any:
    """A shadow of an object with parts; a guest if ``leaves`` is None."""
    record = _Record(type(value), leaves, label)
    stored = _stored(value)
    record.static = frozenset(stored) - _data(value, stored)
    for name, part in stored.items():
        where = f"{label}.{name}"
        record.attributes[name] = _entry(part, leaves, where, name in record.static)
    names = getattr(value, "_fields", None) if isinstance(value, tuple) else None
    if isinstance(value, dict):
        record.items = {k: _entry(v, leaves, f"{label}[{k!r}]", False) for k, v in value.items()}
    elif isinstance(value, (list, tuple)):
        record.items = [
            _entry(v, leaves, f"{label}.{names[i]}" if names else f"{label}[{i}]", False)
            for i, v in enumerate(value)
        ]
    shadow = _with_record(record)
    if leaves is not None:
        record.number = leaves.number(shadow)
    return shadow


def _with_record(record: _Record) -> Any:
    cls = _shadow_class(record.cls)
    for name in record.attributes:
        _add_field(cls, name)
    shadow = _builtin(record.cls).__new__(cls)
    _set_record(shadow, record)
    return shadow


def _set_record(shadow: Any, record: _Record) -> None:
    object.__getattribute__(shadow, "__dict__")["_jaxstate_record"] = record


def _record_of(shadow: Any) -> _Record:
    return object.__getattribute__(shadow, "__dict__")["_jaxstate_record"]


def is_shadow(x: Any) -> bool:
    return issubclass(type(x), Shadow)


def plain(value: Any) -> Any:
    """A tree without shadows: the objects that they stand for, as they are now."""
    if is_shadow(value):
        return raw(value, _record_of(value).value)
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
    record = _record_of(shadow)
    items: Any = record.items
    if isinstance(items, dict):
        items = {key: _raw_entry(entry, of_leaf) for key, entry in items.items()}
    elif items is not None:
        items = [_raw_entry(entry, of_leaf) for entry in items]
    attributes = {name: _raw_entry(entry, of_leaf) for name, entry in record.attributes.items()}
    return _built(record.cls, attributes, items)


def _raw_entry(entry: Any, of_leaf: Callable[[Any], Any]) -> Any:
    if isinstance(entry, _Leaf):
        return of_leaf(entry)
    if isinstance(entry, _Static):
        return entry.value
    if isinstance(entry, _Noted):
        return entry.value("tree")
    if entry is _gone:
        raise _ended("tree")
    if isinstance(entry, _Bundle):
        return entry.tree.unflatten([_raw_entry(e, of_leaf) for e in entry.entries])
    return raw(entry, of_leaf)


def _built(cls: type, attributes: dict[str, Any], items: Any) -> Any:
    builtin: Any = _builtin(cls)
    made: Any = tuple.__new__(cls, items) if issubclass(cls, tuple) else builtin.__new__(cls)
    if issubclass(cls, dict):
        for key, value in items.items():
            builtin.__setitem__(made, key, value)
    elif issubclass(cls, list):
        list.extend(made, items)
    slots = _slots(cls)
    for name, value in attributes.items():
        if name in slots:
            object.__setattr__(made, name, value)
        else:
            vars(made)[name] = value
    return made


# A part that is assigned anew keeps its slots, so the shadow that stood for the old part has to
# become something else: Python code that still has it means the object that was there before. It
# gets the values that the slots had, which are known inside the boundary (the jaxpr under
# construction) in which the part is assigned, and nowhere else: in the next turn of a loop they are
# others. So the program gets another shadow of the same part in each boundary, its `_handle`.


def _handle(shadow: Any, boundary: Any) -> Any:
    """The shadow of the same part for the code inside a boundary."""
    record = _record_of(shadow)
    if record.leaves is None or record.is_home(boundary):
        return shadow
    handles = record.leaves.extra if boundary is None else _extra(boundary)
    key = _place(record)
    if key not in handles:
        handles[key] = _with_record(record.seen_from(boundary))
    return handles[key]


def _place(record: _Record) -> Hashable:
    return ("shadow", record.leaves and record.leaves.level, record.number)


def _is_same_place(a: Any, b: Any) -> bool:
    place = _place(_record_of(a))
    return place[2] is not None and place == _place(_record_of(b))  # type: ignore[index]


def _succeeded(shadow: Any) -> Any:
    """Another shadow with the slots of this one, which becomes a guest with the present values."""
    record = _record_of(shadow)
    leaves = record.leaves
    assert leaves is not None and record.number is not None
    boundaries = trace.boundaries(leaves)
    here = boundaries[0] if boundaries else None
    parts = [*record.attributes.values(), *_all_items(record)]
    inner = {id(part): _handle(part, here) for part in parts if is_shadow(part)}
    successors = {id(part): _succeeded(part) for part in parts if is_shadow(part)}

    def frozen(entry: Any) -> Any:
        if isinstance(entry, _Bundle):
            return _Bundle(entry.tree, [frozen(e) for e in entry.entries])
        if isinstance(entry, _Leaf):
            value = leaves.read(entry)
            return _Static(value) if here is None else _Noted(leaves, value, here)
        return inner.get(id(entry), entry)

    old = [shadow]
    for handles in (leaves.extra, *map(_extra, boundaries)):
        old += [handle for handle in [handles.pop(_place(record), None)] if handle is not None]
    for other in old:
        is_known = _record_of(other).is_home(here)
        guest = record.with_entries(frozen if is_known else lambda entry: _gone)
        guest.leaves = guest.number = guest.home = None
        _set_record(other, guest)
    new = record.with_entries(lambda entry: successors.get(id(entry), entry))
    new.set_home(here)
    successor = leaves.shadows[record.number] = _with_record(new)
    return successor


def _all_items(record: _Record) -> list[Any]:
    items = record.items
    return list(items.values()) if isinstance(items, dict) else list(items or ())


def _stored(value: Any) -> dict[str, Any]:
    """The attributes that an object keeps: in its ``__dict__``, and in slots."""
    stored = dict(getattr(value, "__dict__", {}))
    for name in _slots(type(value)):
        with contextlib.suppress(AttributeError):
            stored[name] = object.__getattribute__(value, name)
    return stored


def _slots(cls: type) -> list[str]:
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


def _data(value: Any, stored: dict[str, Any]) -> frozenset[str]:
    """The names of the attributes that are children of the pytree.

    Its class can say so: among the children of an object that has a mark in the place of each
    attribute are the marks of those.
    """
    if not stored or issubclass(type(value), (dict, list, tuple)):
        return frozenset()
    marks = {name: object() for name in stored}
    try:
        children = _compat.children_of(_built(type(value), marks, None)) or ()
        found = {name for name, mark in marks.items() if any(mark is c for c in children)}
    except Exception:  # it computes something of its attributes
        parts = {id(x) for x in jax.tree.leaves(value)}
        found = {n for n, x in stored.items() if any(id(p) in parts for p in jax.tree.leaves(x))}
    with_arrays = {n for n, x in stored.items() if any(map(_is_jax, jax.tree.leaves(x)))}
    return frozenset(found | with_arrays)


def _is_jax(x: Any) -> bool:
    return isinstance(x, (jax.Array, _compat.Tracer))


_WITH_ITEMS = (dict, list, tuple, OrderedDict, defaultdict)
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE


def _builtin(cls: type) -> Any:
    """The first class in the order of resolution that is written in C: it makes the objects."""
    return next(
        c for c in cls.__mro__
        if not c.__flags__ & _HEAP_TYPE
        or isinstance(c.__dict__.get("__new__"), types.BuiltinFunctionType)
    )  # fmt: skip


# -- The classes of shadows ------------------------------------------------------------------


class _Field:
    """An attribute that a shadow has in its record; also for ``object.__setattr__``."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, shadow: Any, owner: Any = None) -> Any:
        if shadow is None:
            return getattr(owner._jaxstate_class, self.name)
        record = _record_of(shadow)
        if self.name not in record.attributes:
            raise AttributeError(f"{record.cls.__name__!r} has no attribute {self.name!r}")
        return record.value(record.attributes[self.name])

    def __set__(self, shadow: Any, value: Any) -> None:
        record, name = _record_of(shadow), self.name
        record.attributes[name] = record.assign(
            record.attributes.get(name), value, f"{record.label}.{name}", name in record.static
        )

    def __delete__(self, shadow: Any) -> None:
        record = _record_of(shadow)
        if self.name not in record.attributes:
            raise AttributeError(f"{record.cls.__name__!r} has no attribute {self.name!r}")
        record.check_structure_may_change(f"{record.label}.{self.name}")
        del record.attributes[self.name]


class _NamedItem:
    """A field of a named tuple."""

    def __init__(self, name: str, index: int) -> None:
        self.name = name
        self.index = index

    def __get__(self, shadow: Any, owner: Any = None) -> Any:
        return getattr(owner._jaxstate_class, self.name) if shadow is None else shadow[self.index]

    def __set__(self, shadow: Any, value: Any) -> None:
        shadow[self.index] = value


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
        return _record_of(self).cls

    def __setattr__(self, name: str, value: Any) -> None:
        """Assigns also where the class refuses it; properties and other descriptors are asked."""
        if inspect.getattr_static(type(self), name, None) is None:
            _add_field(type(self), name)
        found = inspect.getattr_static(type(self), name)
        if not hasattr(type(found), "__set__"):  # a class attribute as a default, or a method
            _add_field(type(self), name)
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


class _Items:
    """What dicts, lists and tuples have in common. Their own methods look at items that are not
    there, so all that read or write have another definition here."""

    def __len__(self) -> int:
        return len(_record_of(self).items)

    def __eq__(self, other: object) -> Any:
        return plain(self) == plain(other)

    def __ne__(self, other: object) -> Any:
        return plain(self) != plain(other)

    def __repr__(self) -> str:
        return repr(plain(self))

    def copy(self) -> Any:
        return plain(self)

    def __contains__(self, value: Any) -> bool:
        return any(value is x or bool(value == x) for x in self)  # type: ignore[attr-defined]

    def _put(self, key: Any, value: Any) -> None:
        """Assigns to an item that exists."""
        record = _record_of(self)
        record.items[key] = record.assign(record.items[key], value, f"{record.label}[{key!r}]")

    def _new(self, key: Any, value: Any) -> Any:
        """The entry of an item that does not exist yet."""
        record = _record_of(self)
        return record.assign(None, value, f"{record.label}[{key!r}]")


class DictShadow(_Items):
    def __getitem__(self, key: Any) -> Any:
        record = _record_of(self)
        if key in record.items:
            return record.value(record.items[key])
        if issubclass(record.cls, defaultdict):
            factory = self.default_factory  # type: ignore[attr-defined]
            if factory is not None:
                self[key] = factory()
                return self[key]
        elif hasattr(record.cls, "__missing__"):
            return record.cls.__missing__(self, key)  # type: ignore[attr-defined]
        raise KeyError(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        record = _record_of(self)
        if key in record.items:
            self._put(key, value)
        else:
            record.items[key] = self._new(key, value)

    def __delitem__(self, key: Any) -> None:
        record = _record_of(self)
        record.check_structure_may_change(f"{record.label}[{key!r}]")
        del record.items[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(_record_of(self).items)

    def __reversed__(self) -> Iterator[Any]:
        return reversed(_record_of(self).items)

    def __contains__(self, key: Any) -> bool:
        return key in _record_of(self).items

    def __or__(self, other: Any) -> Any:
        return plain(self) | plain(other)

    def __ror__(self, other: Any) -> Any:
        return plain(other) | plain(self)

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def move_to_end(self, key: Any, last: bool = True) -> None:
        record = _record_of(self)
        record.check_structure_may_change(f"{record.label}[{key!r}]")
        entry = record.items.pop(key)
        rest = {} if last else dict(record.items)
        for other in rest:
            del record.items[other]
        record.items.update({key: entry, **rest})

    keys: Any = MutableMapping.keys
    values: Any = MutableMapping.values
    items: Any = MutableMapping.items
    get: Any = MutableMapping.get
    clear: Any = MutableMapping.clear
    update: Any = MutableMapping.update
    setdefault: Any = MutableMapping.setdefault

    def pop(self, key: Any, *default: Any) -> Any:
        if default and key not in self:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> Any:
        key = next(reversed(_record_of(self).items))
        return key, self.pop(key)


class _SequenceShadow(_Items):
    def __getitem__(self, index: Any) -> Any:
        record = _record_of(self)
        found = record.items[index]
        if isinstance(index, slice):
            return (list if issubclass(record.cls, list) else tuple)(map(record.value, found))
        return record.value(found)

    def __setitem__(self, index: Any, value: Any) -> None:
        n = len(self)
        if not isinstance(index, slice):
            return self._put(range(n)[index], value)
        values, places = list(value), range(n)[index]
        if len(values) == len(places):
            for i, x in zip(places, values, strict=True):
                self._put(i, x)
        elif places.step != 1 or not isinstance(_record_of(self).items, list):
            raise ValueError(f"{len(values)} values for {len(places)} items")
        else:
            self._splice(places.start, places.start + len(places), values)

    def _splice(self, start: int, stop: int, values: list[Any]) -> None:
        record = _record_of(self)
        if issubclass(record.cls, tuple):
            raise TypeError("a tuple has a fixed length")
        record.check_structure_may_change(f"{record.label}[{start}:{stop}]")
        record.items[start:stop] = [self._new(start + i, x) for i, x in enumerate(values)]

    def __iter__(self) -> Iterator[Any]:
        record = _record_of(self)
        i = 0
        while i < len(record.items):
            yield record.value(record.items[i])
            i += 1

    def __reversed__(self) -> Iterator[Any]:
        return (self[i] for i in reversed(range(len(self))))

    def index(self, value: Any, *where: Any) -> int:
        return list(self).index(value, *where)

    def count(self, value: Any) -> int:
        return list(self).count(value)

    def __add__(self, other: Any) -> Any:
        return plain(self) + plain(other)

    def __radd__(self, other: Any) -> Any:
        return plain(other) + plain(self)

    def __mul__(self, n: Any) -> Any:
        return plain(self) * n

    __rmul__ = __mul__

    def __lt__(self, other: Any) -> Any:
        return plain(self) < plain(other)

    def __le__(self, other: Any) -> Any:
        return plain(self) <= plain(other)

    def __gt__(self, other: Any) -> Any:
        return plain(self) > plain(other)

    def __ge__(self, other: Any) -> Any:
        return plain(self) >= plain(other)


class ListShadow(_SequenceShadow):
    def __delitem__(self, index: Any) -> None:
        record = _record_of(self)
        record.check_structure_may_change(f"{record.label}[{index!r}]")
        del record.items[index]

    def insert(self, index: int, value: Any) -> None:
        start = slice(index, None).indices(len(self))[0]
        self._splice(start, start, [value])

    def sort(self, **how: Any) -> None:
        self[:] = sorted(map(plain, self), **how)

    def reverse(self) -> None:
        self[:] = list(map(plain, self))[::-1]

    def __imul__(self, n: int) -> Any:
        self[:] = plain(self) * n
        return self

    append: Any = MutableSequence.append
    extend: Any = MutableSequence.extend
    pop: Any = MutableSequence.pop
    remove: Any = MutableSequence.remove
    clear: Any = MutableSequence.clear
    __iadd__: Any = MutableSequence.__iadd__


class TupleShadow(_SequenceShadow):
    def __hash__(self) -> int:
        return hash(plain(self))

    @classmethod
    def _make(cls, values: Any) -> Any:
        return cls._jaxstate_class._make(values)  # type: ignore[attr-defined]


_classes: weakref.WeakKeyDictionary[type, Any] = weakref.WeakKeyDictionary()


def _shadow_class(cls: type) -> Any:
    """The class of shadows of objects of class ``cls``."""
    made = _classes.get(cls)
    if made is not None:
        return made
    kinds = {dict: DictShadow, list: ListShadow, tuple: TupleShadow}
    operations = [kind for builtin, kind in kinds.items() if issubclass(cls, builtin)]
    namespace = dict(
        _jaxstate_class=cls, __module__=cls.__module__, __qualname__=cls.__qualname__,
        __doc__=cls.__doc__,
    )  # fmt: skip
    # Not by calling the metaclass, which may do something with every class that it makes.
    made = type.__new__(type(cls), cls.__name__, (Shadow, *operations, cls), namespace)
    for name in _slots(cls):
        _add_field(made, name)
    if issubclass(cls, tuple):
        for i, name in enumerate(getattr(cls, "_fields", ())):
            type.__setattr__(made, name, _NamedItem(name, i))
    jax.tree_util.register_pytree_node(made, _flatten, _unflatten)
    _classes[cls] = made
    return made


def _add_field(shadow_class: Any, name: str) -> None:
    if not isinstance(shadow_class.__dict__.get(name), _Field):
        type.__setattr__(shadow_class, name, _Field(name))


# -- Shadows as arguments and results of transformed functions -------------------------------


class _Way:
    """Where a shadow was flattened: the static part of it as a pytree.

    Compared by what it is, not by where: a jitted function is traced once for every call of
    `mutate`, and what goes around a loop has one structure.
    """

    __slots__ = ("level", "number", "trace", "tree")

    def __init__(self, record: _Record, tree: Any) -> None:
        self.level = record.leaves and record.leaves.level
        self.number = record.number
        self.tree = tree
        self.trace = weakref.ref(_compat.current_trace())

    def _parts(self) -> tuple[Any, ...]:
        return self.level, self.number, self.tree

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Way) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())


def _flatten(shadow: Any) -> tuple[list[Any], _Way]:
    leaves, tree = jax.tree.flatten(plain(shadow))
    return leaves, _Way(_record_of(shadow), tree)


def _unflatten(way: _Way, leaves: Any) -> Any:
    leaves = list(leaves)
    here = _compat.current_trace()
    if trace.same_trace(way.trace(), here):  # jax.tree.map and the like
        return way.tree.unflatten(leaves)
    arrived = _arrived(way, leaves, here)
    return shadow_of(way.tree.unflatten(leaves), None, "tree") if arrived is None else arrived


def _arrived(way: _Way, leaves: list[Any], here: Any) -> Any:
    """The very shadow, if it has come as an argument into a jaxpr under construction.

    There, its slots have the values of these arguments.
    """
    if way.number is None or not _compat.are_its_inputs(here, leaves):
        return None
    open_trees = (h for h in holders() if isinstance(h, Leaves) and h.level == way.level)
    owner = next(open_trees, None)
    shadow = None if owner is None else owner.shadows.get(way.number)
    notes = trace.notes_of(here)
    if owner is None or shadow is None or ("arrived", way) in notes.extra:
        return None
    slots = jax.tree.leaves(raw(shadow, lambda leaf: leaf))
    if not all(isinstance(s, _Leaf) for s in slots) or len(slots) != len(leaves):
        return None
    pairs = list(zip(slots, leaves, strict=True))
    if not all(_compat.same_type(x, owner.avals[s.number]) for s, x in pairs):
        return None
    notes.extra["arrived", way] = True
    for slot, x in pairs:
        notes.values[owner.address_in(slot, here)] = x
    return _handle(shadow, here)


# -- Errors ----------------------------------------------------------------------------------


def _ended(label: str) -> Exception:
    return ClosedStateError(
        message(
            f"{label} was assigned anew inside a loop or another transformed function, and the"
            " object that was there before is used outside of it.",
            fix="""
            before = jax.tree.map(lambda x: x, tree.part)      # a copy, before the loop
            """,
            used=_compat.user_location(),
        )
    )


def _copy_written(label: str) -> Exception:
    return CopyWriteError(
        message(
            f"{label} was assigned, but the object is a copy: it came into, or out of, a"
            " transformed function, or is what another object has replaced. The assignment would"
            " be lost.",
            fix="""
            jax.vmap(lambda x: tree.update(x))(xs)        # the object itself, by closure
            tree.part = jax.jit(new_part)(tree.part)      # or assign what comes out
            jax.vmap(jaxstate.mutate(fn))(trees, xs)      # or a tree per lane
            """,
            used=_compat.user_location(),
        )
    )


def _structure_changed(label: str) -> Exception:
    return StructureChangeError(
        message(
            f"{label} was added, removed or replaced by something of another structure inside a"
            " loop, a branch or a jitted function. What is compiled there has one structure.",
            fix="""
            tree.items["new"] = jnp.zeros(3)       # before the loop
            jax.lax.fori_loop(0, n, body, x)       # body writes tree.items["new"]
            """,
            used=_compat.user_location(),
        )
    )


def _type_changed(label: str, value: Any, wanted: Any) -> Exception:
    return SlotTypeError(
        message(
            f"{label} has type {wanted.str_short()}, and was assigned a value of type"
            f" {_compat.typeof(value).str_short()} inside a loop, a branch or a jitted function.",
            fix=f"""
            tree.part = jnp.asarray(value, "{wanted.dtype}").reshape({wanted.shape})
            """,
            used=_compat.user_location(),
        )
    )
