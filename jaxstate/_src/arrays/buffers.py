"""The values of writable arrays.

A *buffer* is what a writable array and its views share: the current value, and the trace under
which the array was born, its home. Code that runs at home sees the value directly. Code further in
(a jitted function, a loop body, lanes ...) reaches it as a slot (`core.resolve`), which
the buffer becomes the first time that happens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.arrays.activation import Activation, quiet
from jaxstate._src.arrays.updates import Update
from jaxstate._src.core import resolve, slots
from jaxstate._src.core.boundaries import same_trace
from jaxstate._src.core.memory import Kept, KeptCell, Taken, append_result, writing
from jaxstate._src.core.refs import Slot, SlotAddress
from jaxstate._src.core.slots import Address, Holder, Lane
from jaxstate.errors import CustomRuleStateError, LaneWriteError, message

__all__ = ["Buffer", "is_computed", "place_here", "way_home", "write_to"]


def place_here() -> Any:
    """The trace that holds the arrays of the code that runs now."""
    return _jax.holding_trace(_jax.current_trace())


class Buffer(Kept):
    """The value that a writable array and its views share.

    Attributes:
      value: the value at home, until the buffer is a slot.
      home: the trace under which the array was born.
      age: larger than that of what was there before.
      version: counts the writes made at home.
    """

    __slots__ = (
        "__weakref__", "activation", "age", "home", "is_own", "kept", "made", "slot", "taken",
        "version",
    )  # fmt: skip

    def __init__(self, value: Any, home: Any, age: int, within: Activation | None) -> None:
        self.value = value
        self.home = home
        self.age = age
        self.activation = within
        self.made: str | None = None
        self.slot: ArraySlot | None = None
        self.version = 0
        self.taken = None

    def aval(self) -> Any:
        """The type of the value."""
        with writing:
            slot = self.slot
            return _jax.typeof(self.kept) if slot is None else slot.aval(slot.address)

    def read(self, *, to_write: bool = False) -> Any:
        """The current value, as the current trace sees it.

        ``to_write`` says that neither it nor its memory is handed on.
        """
        if self.activation is not None and self.activation.ended:
            raise self.activation.escaped()
        here = _jax.current_trace()
        way = way_home(self.home, here)
        is_held = self.is_held_elsewhere()
        staged = any(isinstance(t, _jax.StagingTrace) for t in way or ())
        if not is_held and (not way or (self.slot is None and not staged)):
            place = self.place_of_value()
            value = place.peek() if to_write else place.value
            if value is not None:
                return value
        self.become_slot()
        assert self.slot is not None
        if not way and not is_held:  # it has just become a slot, on another thread
            return self.place_of_value().value
        with quiet(), _jax.set_current_trace(here):
            try:
                value = resolve.read_at(self.slot.address)
            except CustomRuleStateError:
                # A rule that reads what its function does not: a value that Python closes over.
                value = self.slot.cell(self.slot.address).value
                if way is None and isinstance(value, _jax.DIFFERENTIATED):
                    raise
                with slots.only_open([h for h in slots.stack() if not self._is_held_by(h)]):
                    value = value if way is None else resolve.read_at(self.slot.address)
            return _jax.canonicalize(value)

    def place_of_value(self) -> Kept:
        """Where the value is at home."""
        if self.slot is None:
            return self
        cell: Any = self.slot.cell(self.slot.address)
        return cell

    def write(self, value: Any) -> None:
        here = _jax.current_trace()
        if self.is_at_home():
            self.note_write()
            self.place_of_value().value = value
            return
        self.version += 1
        self.become_slot()
        assert self.slot is not None
        with quiet(), _jax.set_current_trace(here):
            resolve.write_at(self.slot.address, value)

    def is_at_home(self) -> bool:
        """Whether the program sees the value where it is kept."""
        return place_here() is self.home and not self.is_held_elsewhere()

    def note_write(self) -> None:
        """To be called for every write at home."""
        self.version += 1
        if self.slot is not None:
            self.slot.address.note_write()

    def state(self) -> Any:
        """Equal as long as nothing was written."""
        if self.is_at_home():
            return self.version if self.slot is None else self.slot.version
        return _Same(self.read())

    def is_held_elsewhere(self) -> bool:
        """Whether a custom rule or a device runs now, which was given the array as an operand."""
        return any(map(self._is_held_by, slots.holders()))

    def _is_held_by(self, holder: Holder) -> bool:
        return holder.age > self.age and (holder.is_boundary or holder.outside is not None)

    def become_slot(self) -> None:
        with writing:
            if self.slot is None:
                self.slot = ArraySlot(self)
                self.kept = None


class _Same:
    """Equality of objects."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.value is self.value

    __hash__ = None  # type: ignore[assignment]


def way_home(home: Any, here: Any) -> list[Any] | None:
    """The traces between here and home; None if home is not further out.

    Then the value is asked for by JAX itself, which takes the results of a function when it has
    left the trace of that function, and builds the linear part of a derivative in no other trace.
    """
    way: list[Any] = []
    for t in _jax.chain(here):
        if same_trace(t, home):
            return way
        way.append(t)
    return None


class ArrayAddress(SlotAddress):
    """The slot of a buffer. It is captured, as an array that a function closes over is."""

    __slots__ = ()

    threaded = False

    @property
    def may_be_written(self) -> bool:
        return True

    def version(self) -> int:
        slot = self._slot()
        return 0 if slot is None else slot.version  # type: ignore[attr-defined]

    notices_writes = True
    stays_here = False

    def note_write(self) -> None:
        slot = self._slot()
        if slot is not None:
            slot.version += 1  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return "a writable array"


class ArraySlot(Slot):
    """The slot of a buffer."""

    def __init__(self, buffer: Buffer) -> None:
        with _jax.set_current_trace(buffer.home):
            cell = KeptCell(buffer.kept)
            cell.is_own = buffer.is_own
            aval = _jax.typeof(cell.kept)
            super().__init__(cell, aval, "a writable array", buffer.made or "")
        self.address = ArrayAddress(self)
        self.age = buffer.age
        self.activation = buffer.activation
        self.version = buffer.version

    def lane(self, address: Address, trace_: Any, notes: dict[Any, Any]) -> Lane | None:
        """An array that was born in a vmap is one array per lane."""
        if self.age < _age_of(trace_):
            return None
        lane = notes.get(address)
        if lane is None:
            with _jax.set_current_trace(_jax.parent_of(trace_)):
                lane = notes[address] = Lane(_jax.canonicalize(resolve.read_at(address)), None)
        return lane

    def refuse_lanes(self, address: Address, trace: Any) -> Exception:
        return LaneWriteError(
            message(
                "Lanes of a vmap wrote different values into a writable array that was made outside"
                " of the vmap, so that they share it.",
                fix="""
                x[:] = jax.vmap(f)(...)             # return the values, and write all of them
                x = jaxstate.array(x)               # or an array per lane: inside the vmap
                """,
                made=self.made or None,
                used=_jax.user_location(),
                under=f"vmap over {_jax.lane_count(trace)} lanes",
            )
        )

    def ended(self) -> Exception:
        return (self.activation or Activation("array")).escaped()


def _age_of(trace_: Any) -> float:
    """The age of the first tracer of a vmap: what is younger was born in it."""
    return _jax.tag_of(trace_).__dict__.get("_jaxstate_age", float("inf"))


def write_to(buffer: Buffer, update: Callable[[Any], Update]) -> Any:
    """Writes to the buffer: in the memory of the old value, if nothing else has it.

    Returns:
      The new value.
    """
    base = buffer.read(to_write=True)
    place = buffer.place_of_value() if buffer.is_at_home() else None
    with quiet():
        write = update(base)
        if place is not None and place.kept is base and is_computed(base):
            del base
            new = _write_kept(place, write)
            buffer.note_write()
            return new
        new = _jax.as_array(_jax.canonicalize(write(base)))
    buffer.write(new)
    return new


def _write_kept(place: Kept, write: Update) -> Any:
    taken = Taken([None], 0, [])
    try:
        into_x = place.take(taken)
        append_result(taken.new, write.program(taken.old[0], into_x=into_x))
        (new,) = taken.new
        place.make(new)
        return new
    finally:
        place.put_back()


def is_computed(value: Any) -> bool:
    return isinstance(value, jax.Array) and not isinstance(value, _jax.Tracer)
