"""The parts of the tree that a call of `mutate` works on.

`Leaves` is the holder of a call; each array of the tree is a slot in it, so that code inside loops,
branches and other transformations reads and writes it like any slot. What a shadow
(`jaxstate.shadows`) has in the place of an attribute or item is an *entry*:

* `Leaf`: an array in a slot;
* another shadow, for a part that has parts of its own;
* `Bundle`: a part that can only be replaced as a whole (a `jax.tree_util.Partial`, say);
* `Static`: anything else;
* `Noted` or `GONE`: what was there before something else was assigned.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Hashable
from typing import Any

import jax

from jaxstate import _compat, trace
from jaxstate.errors import ClosedStateError, LaneWriteError, message
from jaxstate.slots import Address, Cell, Holder, holders

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

    def new(self, value: Any, label: str) -> Leaf:
        """A leaf that holds ``value``, which is an array or a scalar."""
        leaf = Leaf(next(self._numbers), label)
        value = strong(value)
        self.avals[leaf.number] = _compat.typeof(value)
        self.cells[leaf.number] = Cell(None)
        try:
            trace.write(self._address(leaf), value)  # which keeps what outlives the trace
        except Exception:
            del self.avals[leaf.number], self.cells[leaf.number]
            raise
        return leaf

    def remember_originals(self, given: list[Any], slots: list[Any]) -> None:
        """A leaf that nobody writes comes out as it was given, also if that is a Python number."""
        if len(slots) == len(given):
            for slot, value in zip(slots, given, strict=True):
                if isinstance(slot, Leaf):
                    self.originals[slot.number] = value, self.cells[slot.number].value

    def read(self, leaf: Leaf) -> Any:
        self._check_open(leaf)
        return trace.read(self._address(leaf))

    def write(self, leaf: Leaf, value: Any) -> None:
        self._check_open(leaf)
        trace.write(self._address(leaf), value)

    def result(self, leaf: Leaf) -> Any:
        """The value after the call; the given object itself if the leaf was not written."""
        value = self.cells[leaf.number].value
        original, stored = self.originals.get(leaf.number, (None, None))
        return original if value is stored else value

    def address_in(self, leaf: Leaf, boundary: Any) -> Address:
        return self._address(leaf).seen_from(boundary)

    def number(self, shadow: Any) -> int:
        number = next(self._numbers)
        self.shadows[number] = shadow
        return number

    def _address(self, leaf: Leaf) -> LeafAddress:
        return LeafAddress(self.level, leaf.number, leaf.label)

    def _check_open(self, leaf: Leaf) -> None:
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


def strong(value: Any) -> Any:
    """The value as an array whose dtype no Python scalar can change."""
    value = _compat.as_array(value)
    return jax.lax.convert_element_type(value, value.dtype) if is_weak(value) else value


def is_weak(array: Any) -> bool:
    return getattr(array, "weak_type", False)  # arrays of keys have no such thing


# -- Entries ---------------------------------------------------------------------------------


class Leaf:
    """An array in a slot."""

    __slots__ = ("label", "number")

    def __init__(self, number: int, label: str) -> None:
        self.number = number
        self.label = label


class Bundle:
    """A part that can only be replaced as a whole."""

    __slots__ = ("entries", "tree")

    def __init__(self, tree: Any, entries: list[Any]) -> None:
        self.tree = tree
        self.entries = entries


class Static:
    """Anything that is not an array and has no parts; in a guest, also an array."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


class Gone:
    """What was there before something else was assigned, in a jaxpr that this one is not part of:
    there is no telling how often that was done."""

    __slots__ = ()


GONE = Gone()


class Noted:
    """An array that only a jaxpr under construction has, and that must not outlive it."""

    __slots__ = ("leaves",)

    def __init__(self, leaves: Leaves, value: Any, boundary: Any) -> None:
        self.leaves = leaves
        extra_of(boundary)[self] = value

    def value(self, label: str) -> Any:
        for boundary in trace.boundaries(self.leaves):
            if self in extra_of(boundary):
                return extra_of(boundary)[self]
        raise ended(label)


def extra_of(boundary: Any) -> dict[Any, Any]:
    """Where clients note things about a boundary, for as long as that lasts."""
    return boundary.extra if isinstance(boundary, Holder) else trace.notes_of(boundary).extra


def ended(label: str) -> Exception:
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
