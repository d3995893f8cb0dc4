"""Slots that a program makes itself: one array of state, named by the object that stands for it."""

from __future__ import annotations

import weakref
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core import resolve
from jaxstate._src.core.memory import cell_of
from jaxstate._src.core.notes import notes_of
from jaxstate._src.core.slots import Address, Cell, Holder, add_loose, holders, note_use
from jaxstate._src.core.specs import strong
from jaxstate.errors import ClosedStateError, LaneWriteError, SlotTypeError, message

__all__ = ["Slot", "SlotAddress", "ZeroCell", "new_slot", "read", "write"]


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
    return Slot(cell_of(value, aval), aval, name, _jax.user_location())


def read(slot: Slot) -> jax.Array:
    """The current value of a slot.

    Args:
      slot: made by `new_slot`, anywhere outside.

    Returns:
      An array of the slot's shape and dtype.

    Raises:
      ClosedStateError: if the transformed function in which the slot was made has ended.
    """
    value = resolve.read_at(slot.address)
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
    resolve.write_at(slot.address, value)
