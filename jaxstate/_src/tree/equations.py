"""The equations of a jaxpr that read the arrays of objects, and write them.

All that a jaxpr reads of the objects is what they were at its beginning, and all that it writes is
what they are at its end: one equation reads, and one writes. Whether the jaxpr writes an array that
it reads turns out at the end. What it only reads it *captures* (`core.capture`): that becomes an
equation of its own, with the capture as its operand.
"""

from __future__ import annotations

from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.primitives import read_p, state_effect, write_p
from jaxstate._src.tree.addresses import LeafAddress

_EFFECTS = {state_effect}


class Equations:
    """The equations of the jaxpr that ``trace`` is building.

    Attributes:
      written: the slots that are written, in order, and their values.
    """

    __slots__ = ("_has_ended", "_place", "_read", "_reads", "_trace", "written")

    def __init__(self, trace: Any) -> None:
        self.written: dict[Any, Any] = {}
        self._trace = trace
        self._has_ended = False
        self._place: Any = None
        self._reads: _jax.GrowingEquation | None = None
        self._read: list[tuple[LeafAddress, Any, int]] = []

    def read(self, address: LeafAddress, aval: Any, version: int) -> Any:
        """An array as it was at the beginning, of type ``aval``; it had that version then."""
        reads = self._reads
        if reads is None:
            if self._has_ended:
                return self._read_late(address, aval, version)
            params = dict(addresses=(), avals=(), version=0)
            place = self._place_of(address)
            reads = _jax.GrowingEquation(self._trace, read_p, params, _EFFECTS, place)
            self._reads = reads
        self._read.append((address, aval, version))
        return reads.result(aval)

    def _read_late(self, address: LeafAddress, aval: Any, version: int) -> Any:
        place = self._place_of(address)
        operand, params = self._capture(address, aval, version, place)
        (value,) = _jax.emit(self._trace, read_p, [operand], [aval], params, _EFFECTS, place)
        return value

    def add(self) -> None:
        """Adds them to the jaxpr, whose function has returned."""
        if self._reads is not None:
            self._divide(self._reads)
        if self.written:
            addresses = tuple(self.written)
            params, place = dict(addresses=addresses), self._place_of(addresses[0])
            values = list(self.written.values())
            _jax.emit(self._trace, write_p, values, [], params, _EFFECTS, place)

    def end(self) -> None:
        """To be called behind `add`, or if the function has failed."""
        self._has_ended = True
        self._reads, self._read, self.written = None, [], {}

    def _divide(self, reads: _jax.GrowingEquation) -> None:
        """Only what is written is read without a capture."""
        place, written = reads.place, self.written
        own = {
            i: self._capture(address, aval, version, place)
            for i, (address, aval, version) in enumerate(self._read)
            if address not in written
        }
        kept = [(a, aval) for a, aval, _ in self._read if a in written]
        reads.params.update(
            addresses=tuple([a for a, _ in kept]), avals=tuple([aval for _, aval in kept])
        )
        reads.divide(own)

    def _capture(self, address: LeafAddress, aval: Any, version: int, place: Any) -> Any:
        operand = _jax.new_const(self._trace, StateTracer(address, aval), aval, place)
        return operand, dict(addresses=(address,), avals=(aval,), version=version)

    def _place_of(self, address: Any) -> Any:
        """Where the program is, for equations. (One place for all: to look is slow.)"""
        if self._place is None:
            address.holder()  # a kernel refuses
            self._place = _jax.current_place()
        return self._place
