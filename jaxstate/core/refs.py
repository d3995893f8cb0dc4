"""Slots that a program makes itself: one array of state, named by the object that stands for it."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable
from itertools import starmap
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxstate import _jax
from jaxstate.core import resolve
from jaxstate.core.notes import notes_of
from jaxstate.core.slots import Address, Cell, Holder, add_loose, holders, note_use
from jaxstate.core.specs import strong
from jaxstate.errors import ClosedStateError, LaneWriteError, SlotTypeError, message

__all__ = [
    "Kept",
    "KeptCell",
    "Slot",
    "SlotAddress",
    "Taken",
    "append_result",
    "is_large",
    "new_slot",
    "read",
    "write",
    "writing",
]


# -- Values that are written in their memory -------------------------------------------------

# Held while a value is taken out: threads may write elements of one array.
writing = threading.RLock()

# A value of fewer bytes is copied in the time that it takes to see whether something else has it.
LARGE = 1 << 18


def is_large(aval: Any) -> bool:
    sizes = getattr(aval, "shape", ())
    if not isinstance(getattr(aval, "dtype", None), np.dtype) or {*map(type, sizes)} > {int}:
        return False
    return math.prod(sizes) * aval.dtype.itemsize >= LARGE


class Kept:
    """Keeps a value that is taken out while it is written, so that its memory can be used again.

    Other threads wait for it then.

    Attributes:
      kept: the value; None while it is written, and after that if the write was interrupted.
      taken: where the value is then.
      is_own: whether a write has made the value, and nobody was given it since.
    """

    __slots__ = ()

    kept: Any
    taken: Taken | None
    is_own: bool

    @property
    def value(self) -> Any:
        value = self.kept
        if value is None:
            value = self.peek()
        self.is_own = False  # (After that: another thread may have written it.)
        return value

    @value.setter
    def value(self, value: Any) -> None:
        self.is_own = False
        self.kept = value

    def peek(self) -> Any:
        """The value, for one who keeps neither it nor its memory."""
        value = self.kept
        if value is None:
            with writing:
                value = self.kept
                if value is None and self.taken is not None:
                    value = self.taken.value()
        return value

    def make(self, value: Any) -> None:
        """Keeps what a write has made, which nothing else has."""
        self.is_own = True
        self.kept = value
        self.taken = None

    def take(self, taken: Taken) -> bool:
        """Moves the value to where ``taken`` says, and says whether nothing else has its memory.

        To be called with `writing` held, until there is a new value, or the old one is `put_back`
        (as it is at once if something else has its memory).
        """
        if self.kept is None:
            self.put_back()
        old, i = taken.old, taken.i
        old[i] = self.kept
        self.taken = taken
        self.kept = None
        is_unused = _is_unused(old, i, self.is_own)
        if not is_unused:
            self.put_back()
        return is_unused

    def put_back(self) -> None:
        """Ends what `take` began."""
        if self.kept is None and self.taken is not None:
            self.kept = self.taken.value()
        self.taken = None


class Taken(NamedTuple):
    """Where a value is while it is written: ``old[i]``, until ``new`` has what the write returns.

    That is the new value, or results and what is written, of which it is the one at ``rank``.
    """

    old: list[Any]
    i: int
    new: list[Any]
    rank: int | None = None

    def value(self) -> Any:
        if not self.new:
            return self.old[self.i]
        return self.new[0] if self.rank is None else self.new[0][1][self.rank]


def append_result(done: list[Any], call: Callable[[], Any]) -> None:
    """Appends what the C function ``call()`` returns. (No interrupt comes between the two, or the
    result would be lost, and what was in its memory.)"""
    done.extend(starmap(call, ((),)))


def _is_unused(held: list[Any], i: int, is_own: bool) -> bool:
    """Whether nothing but the list has the element ``i``, or its memory."""
    if not _jax.is_concrete_array(held[i]) or not _jax.is_only_reference(held, i):
        return False
    return is_own or not _jax.may_share_memory(held[i])


class KeptCell(Kept, Cell):
    """A cell whose value may be written in its memory."""

    __slots__ = ("is_own", "kept", "taken")

    def __init__(self, value: Any) -> None:
        self.is_own = False
        self.kept = value
        self.taken = None


def _cell_of(value: Any, aval: Any) -> Cell:
    return KeptCell(value) if is_large(aval) else Cell(value)


# -- Slots -----------------------------------------------------------------------------------


class ZeroCell(Cell):
    """A cell that is zero until it is written.

    Attributes:
      written: the value, or None as long as there is none.
    """

    __slots__ = ("_aval", "_place", "_zero", "written")

    def __init__(self, place: Any, aval: Any) -> None:
        self._place = place
        self._aval = aval
        self._zero: Any = None
        self.written: Any = None

    @property
    def value(self) -> Any:  # type: ignore[override]
        if self.written is not None:
            return self.written
        if self._zero is None:
            with _jax.set_current_trace(self._place):
                self._zero = _jax.zeros(self._aval)
        return self._zero

    @value.setter
    def value(self, value: Any) -> None:
        self.written = value


class Slot(Holder):
    """One array of state: see `new_slot`."""

    def __init__(self, cell: Cell, aval: Any, name: str, made: str) -> None:
        super().__init__()
        self.name = name
        self.made = made
        self.anchor = _jax.holding_trace(_jax.current_trace())
        self.address = SlotAddress(self)
        self._own: Any = weakref.WeakKeyDictionary()  # or the slot would keep itself alive
        self._cells()[self] = cell
        self._aval = aval
        add_loose(self)

    def knows(self, address: Address) -> bool:
        return address == self.address

    def _cells(self) -> Any:
        """Where the cell is: with the jaxpr in which the slot was made, so that a slot which a
        function keeps in its closure keeps no tracer."""
        if isinstance(self.anchor, _jax.StagingTrace):
            return notes_of(self.anchor).extra
        return self._own

    def cell(self, address: Address) -> Cell:
        cell = self.known_cell()
        if cell is None:
            raise self.ended()
        return cell

    def known_cell(self) -> Cell | None:
        """The cell; None if the function that made the slot has ended."""
        return self._cells().get(self)

    def close(self) -> None:
        """Forgets the value, and the place where it was made."""
        self._cells().pop(self, None)
        self.anchor = None

    def ended(self) -> Exception:
        """The error for a slot that is used after the function that made it."""
        return ClosedStateError(
            message(
                f"{self.address} was made inside a transformed function that has ended.",
                fix="""
                slot = jaxstate.extend.new_slot(value)      # outside of the function
                """,
                made=self.made,
                used=_jax.user_location(),
            )
        )

    def aval(self, address: Address) -> Any:
        return self._aval

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        return LaneWriteError(
            message(
                f"Lanes of a vmap wrote different values into slot {self.name!r}, which they"
                " share.",
                fix="""
                write(slot, values.mean())          # one value: outside the vmap, from all lanes
                slot = new_slot(value)              # or a slot per lane: made inside the vmap
                """,
                made=self.made,
                used=_jax.user_location(),
                under=f"vmap over {_jax.lane_count(trace)} lanes",
            )
        )

    def __repr__(self) -> str:
        return f"Slot({self.name!r}, {self._aval.str_short()})"


class SlotAddress(Address):
    """One particular slot. A cached jaxpr may keep the address, which does not keep the slot."""

    __slots__ = ("_slot", "name")

    threaded = True
    has_axes = True
    stays_here = True

    def __init__(self, slot: Slot) -> None:
        self._slot = weakref.ref(slot)
        self.name = slot.name

    @property
    def own_holder(self) -> Any:  # type: ignore[override]
        return self._slot

    def cell_here(self) -> Cell | None:
        slot = self._slot()
        if slot is None or slot.anchor is not _jax.current_trace():
            return None
        return None if any(h.knows(self) for h in holders()) else slot.known_cell()

    def __repr__(self) -> str:
        return f"slot {self.name!r}"

    def holder(self) -> Holder:
        holder = self.known_holder()
        if holder is None:
            raise self.missing()
        return holder

    def known_holder(self) -> Holder | None:
        for holder in holders():
            if holder.knows(self):
                return holder
            other = holder.passed_on(self)
            if other is not None:
                return other
        slot = self._slot()
        if slot is not None:
            note_use(slot)
        return slot

    def missing(self) -> Exception:
        return ClosedStateError(
            message(
                f"{self} is gone: a jitted function that was traced with it is called again after"
                " the slot was dropped.",
                fix="""
                slot = jaxstate.extend.new_slot(value)      # keep it as long as its users
                jax.clear_caches()                          # or trace them again
                """,
                used=_jax.user_location(),
            )
        )


def new_slot(value: Any, *, name: str = "slot") -> Slot:
    """Makes a slot that holds ``value``.

    Args:
      value: an array or scalar; its shape and dtype are those of the slot from now on.
      name: for messages.

    Returns:
      A `Slot`, which lives as long as the object does, under the transformation in which it was
      made: a slot made inside a vmap has a value per lane.

    Raises:
      TypeError: if ``value`` is no array or scalar.

    >>> import jax, jax.numpy as jnp
    >>> from jaxstate.extend import new_slot, read, write
    >>> total = new_slot(0.0)
    >>> def body(i, _):
    ...     write(total, read(total) + i)
    >>> _ = jax.lax.fori_loop(0, 4, body, None)
    >>> float(read(total))
    6.0
    """
    value = strong(value)
    aval = _jax.typeof(value)
    return Slot(_cell_of(value, aval), aval, name, _jax.user_location())


def read(slot: Slot) -> jax.Array:
    """The current value of a slot.

    Args:
      slot: made by `new_slot`, anywhere outside.

    Returns:
      An array of the slot's shape and dtype.

    Raises:
      ClosedStateError: if the transformed function in which the slot was made has ended.
    """
    value = resolve.read(slot.address)
    if _jax.has_ended(value):
        raise slot.ended()
    return value


def write(slot: Slot, value: Any) -> None:
    """Makes ``value`` the value of a slot.

    Args:
      slot: made by `new_slot`, anywhere outside.
      value: an array or scalar of the slot's shape and dtype.

    Gradients flow through a value written and read inside one differentiated function; what
    leaves that function is the value.

    Raises:
      SlotTypeError: if shape or dtype are not those of the slot.
      LaneWriteError: if lanes of a vmap that share the slot write different values.
    """
    value = strong(value)
    wanted = slot.aval(slot.address)
    if not _jax.same_type(value, wanted):
        raise SlotTypeError(
            message(
                f"{slot.address} has type {wanted.str_short()}, and was written with one of type"
                f" {_jax.typeof(value).str_short()}.",
                fix=f"""
                write(slot, jnp.asarray(value, {wanted.dtype}).reshape({wanted.shape}))
                """,
                made=slot.made,
                used=_jax.user_location(),
            )
        )
    resolve.write(slot.address, value)
