"""Records: where the attributes and items of a shadow are.

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

import copy
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxstate import _compat, trace
from jaxstate.containers import with_record
from jaxstate.errors import CopyWriteError, SlotTypeError, StructureChangeError, message
from jaxstate.leaves import GONE, Bundle, Leaf, Leaves, Noted, Static, ended, is_weak, strong
from jaxstate.objects import WITH_ITEMS, builtin_of, data_of, stored_in
from jaxstate.shadows import is_shadow, plain, raw, raw_entry
from jaxstate.slots import holders, signature_changed
from jaxstate.successors import handle, is_same_place, succeeded


def shadow_of(value: Any, leaves: Leaves | None, label: str) -> Any:
    """A shadow of an object with parts; a guest if ``leaves`` is None."""
    record = Record(type(value), leaves, label)
    stored = stored_in(value)
    record.static = frozenset(stored) - data_of(value, stored)
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
    shadow = with_record(record)
    if leaves is not None:
        record.number = leaves.number(shadow)
    return shadow


class Record:
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

    def seen_from(self, boundary: Any) -> Record:
        """The same attributes and items, for another shadow."""
        other = copy.copy(self)
        other.set_home(boundary)
        return other

    def with_entries(self, change: Callable[[Any], Any]) -> Record:
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
        if isinstance(entry, Leaf):
            assert self.leaves is not None
            return self.leaves.read(entry)
        if isinstance(entry, Bundle):
            return entry.tree.unflatten([self.value(e) for e in entry.entries])
        if isinstance(entry, Noted):
            return entry.value(self.label)
        if isinstance(entry, Static):
            if _compat.has_ended(entry.value):
                raise ended(self.label)
            return entry.value
        if entry is GONE:
            raise ended(self.label)
        return entry if self.leaves is None else handle(entry, trace.boundary_of(self.leaves))

    def assign(self, old: Any, value: Any, label: str, static: bool = False) -> Any:
        """Puts ``value`` where the entry ``old`` is (None: nowhere yet).

        Returns:
          The entry that is there now.
        """
        if is_shadow(old) and is_shadow(value) and is_same_place(old, value):
            return old
        leaves = self.check_not_a_copy(label)
        value = plain(value)
        if isinstance(old, Static) and _is_same(old.value, value):
            return old
        kept = _written(old, value, leaves)
        if kept is not None:
            return kept
        if not leaves.structure_may_change:
            if isinstance(old, Leaf) and _compat.is_array_like(value):
                raise _type_changed(label, value, leaves.avals[old.number])
            raise _structure_changed(label)
        entry = _entry(value, leaves, label, static)
        if is_shadow(old):
            succeeded(old)
        signature_changed()
        return entry

    def flatten(self, shadow: Any) -> tuple[list[Any], _Way]:
        leaves, tree = jax.tree.flatten(plain(shadow))
        return leaves, _Way(self, tree)

    def check_structure_may_change(self, label: str) -> None:
        if not self.check_not_a_copy(label).structure_may_change:
            raise _structure_changed(label)

    def check_not_a_copy(self, label: str) -> Leaves:
        if self.leaves is None:
            raise _copy_written(label)
        return self.leaves


# -- Assigning -------------------------------------------------------------------------------


def _written(old: Any, value: Any, leaves: Leaves) -> Any:
    """Writes ``value`` to the slots of an entry if it has their structure and types.

    Returns:
      The entry; None if ``value`` does not fit.
    """
    if old is None or isinstance(old, Static):
        return None
    try:
        slots, tree = jax.tree.flatten(raw_entry(old, lambda leaf: leaf))
        values, value_tree = jax.tree.flatten(value)
    except Exception:  # a class that cannot be rebuilt around something that is not an array
        return None
    if tree != value_tree or len(slots) != len(values):
        return None
    fitted = []
    for slot, new in zip(slots, values, strict=True):
        if not isinstance(slot, Leaf):
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
        old = succeeded(old)
    for slot, new in zip(slots, fitted, strict=True):
        if isinstance(slot, Leaf):
            leaves.write(slot, new)
    return old


def _fitted(value: Any, aval: Any) -> Any:
    """The value as an array; a Python number takes the dtype of a leaf that can hold it."""
    array = _compat.as_array(value)
    if is_weak(array) and jnp.result_type(aval.dtype, value) == aval.dtype:
        return jax.lax.convert_element_type(array, aval.dtype)
    return strong(array)


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
        return Static(value) if leaves is None else leaves.new(value, label)
    if static or value is None or _compat.children_of(value) is None:
        return Static(copy.deepcopy(value) if type(value) in (list, dict, set) else value)
    if builtin_of(type(value)) in WITH_ITEMS or builtin_of(type(value)) is object:
        return shadow_of(value, leaves, label)
    parts, tree = jax.tree.flatten(value)
    return Bundle(tree, [_entry(part, leaves, label, False) for part in parts])


# -- Shadows as arguments and results of transformed functions -------------------------------


class _Way:
    """Where a shadow was flattened: the static part of it as a pytree.

    Compared by what it is, not by where: a jitted function is traced once for every call of
    `mutate`, and what goes around a loop has one structure.
    """

    __slots__ = ("level", "number", "trace", "tree")

    def __init__(self, record: Record, tree: Any) -> None:
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

    def unflatten(self, leaves: Any) -> Any:
        leaves = list(leaves)
        here = _compat.current_trace()
        if trace.same_trace(self.trace(), here):  # jax.tree.map and the like
            return self.tree.unflatten(leaves)
        arrived = _arrived(self, leaves, here)
        return shadow_of(self.tree.unflatten(leaves), None, "tree") if arrived is None else arrived


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
    if not all(isinstance(s, Leaf) for s in slots) or len(slots) != len(leaves):
        return None
    pairs = list(zip(slots, leaves, strict=True))
    if not all(_compat.same_type(x, owner.avals[s.number]) for s, x in pairs):
        return None
    notes.extra["arrived", way] = True
    for slot, x in pairs:
        notes.values[owner.address_in(slot, here)] = x
    return handle(shadow, here)


# -- Errors ----------------------------------------------------------------------------------


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
