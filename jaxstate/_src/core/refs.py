"""Slots that a program makes itself: one array of state, named by the object that stands for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxstate._src import _jax
from jaxstate._src.core import resolve
from jaxstate._src.core.memory import cell_of
from jaxstate._src.core.notes import notes_of
from jaxstate._src.core.slots import Address, Cell, Holder, Lane, add_loose, holders, note_use
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

    def __init__(
        self, cell: Cell, aval: Any, name: str, made: str, lanes: OfLanes | None = None
    ) -> None:
        super().__init__()
        self.name = name
        self.made = made
        self.lanes = lanes
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

    def lane(self, address: Address, trace: Any, notes: dict[Any, Any]) -> Lane | None:
        if self.lanes is None:
            return None
        if address not in notes:
            with _jax.set_current_trace(_jax.parent_of(trace)):
                before = resolve.read_at(address)
            notes[address] = before, Lane(before, None)
        return _OwnLane(self, trace, *notes[address])

    def of_lanes(self, before: Any, values: Any) -> Any:
        """One value of those that lanes or devices have, which are stacked on the first axis."""
        assert self.lanes is not None
        value = strong(self.lanes(before, values))
        if not _jax.same_type(value, self._aval):
            raise SlotTypeError(
                message(
                    f"{self.address} has type {self._aval.str_short()}, and its lanes=..., given"
                    f" values of type {_jax.shown(_jax.typeof(values))}, makes"
                    f" {_jax.shown(_jax.typeof(value))} of them.",
                    fix="""
                    new_slot(value, lanes=lambda before, values: values.sum(0))
                    """,
                    made=self.made,
                    used=_jax.user_location(),
                )
            )
        return value

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        return LaneWriteError(
            message(
                f"Lanes of a vmap wrote different values into slot {self.name!r}, which they"
                " share.",
                fix="""
                write(slot, values.mean())          # one value: outside the vmap, from all lanes
                slot = new_slot(value)              # or a slot per lane: made inside the vmap
                slot = new_slot(value, lanes=lambda before, values: values.sum(0))   # or one of all
                """,
                made=self.made,
                used=_jax.user_location(),
                under=f"vmap over {_jax.lane_count(trace)} lanes",
            )
        )

    def __repr__(self) -> str:
        return f"Slot({self.name!r}, {self._aval.str_short()})"


class _OwnLane(Lane):
    """The value of each lane, where a slot has ``lanes``. It is kept in another `Lane`, as this one
    knows the trace."""

    __slots__ = ("_before", "_kept", "_slot", "_trace")

    def __init__(self, slot: Slot, trace: Any, before: Any, kept: Lane) -> None:
        super().__init__(kept.value, kept.batch_dim)
        self._slot, self._trace, self._before, self._kept = slot, trace, before, kept

    def write(self, value: Any, batch_dim: int | None) -> None:
        with _jax.set_current_trace(_jax.parent_of(self._trace)):
            resolve.write_at(self._slot.address, self._of_all(value, batch_dim))
        super().write(value, batch_dim)  # if that has not failed
        self._kept.write(value, batch_dim)

    def _of_all(self, value: Any, batch_dim: int | None) -> Any:
        if _jax.lanes_are_directions(self._trace):  # all the same: the function runs once
            return value if batch_dim is None else jnp.take(value, 0, batch_dim)
        if batch_dim is None:
            values = jnp.broadcast_to(value, (_jax.lane_count(self._trace), *jnp.shape(value)))
        else:
            values = jnp.moveaxis(value, batch_dim, 0)
        return self._slot.of_lanes(self._before, values)


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

    @property
    def reduce(self) -> Any:  # type: ignore[override]
        slot = self._slot()
        return None if slot is None else slot.lanes

    def reduced(self, values: Any) -> Any:
        slot = self._slot()
        if slot is None:
            raise self.missing()
        return slot.of_lanes(resolve.read_at(self), values)

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


# Makes one value of those that the lanes of a vmap, or devices, have.
OfLanes = Callable[[jax.Array, jax.Array], Any]


def new_slot(value: Any, *, name: str = "slot", lanes: OfLanes | None = None) -> Slot:
    """Makes a slot that holds ``value``.

    Args:
      value: an array or scalar; its shape and dtype are those of the slot from now on.
      name: for messages.
      lanes: with it, every lane of a vmap and every device of a shard_map has a value of its own,
        and goes on from what the slot holds outside. When they have written, the slot outside is
        ``lanes(before, values)``: ``before`` is what it was before the vmap or shard_map, of the
        slot's shape, and ``values`` are those of all lanes or devices, along a further first axis.
        (What the lanes of a vmap write is put together at each write, what devices write at the
        end.) Without it, lanes and devices share the slot, and have to write one value.

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
    >>> calls = new_slot(0, lanes=lambda before, values: before + (values - before).sum())
    >>> def count(x):
    ...     write(calls, read(calls) + 1)
    ...     return 2 * x
    >>> _ = jax.vmap(count)(jnp.arange(3.0))
    >>> int(read(calls))
    3
    """
    if lanes is not None and not callable(lanes):
        raise TypeError(f"lanes is a function of two arrays, (before, values), and not {lanes!r}.")
    value = strong(value)
    aval = _jax.typeof(value)
    return Slot(cell_of(value, aval), aval, name, _jax.user_location(), lanes)


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
