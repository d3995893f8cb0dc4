"""The equations of a jaxpr that read the arrays of objects, and write them.

All that a jaxpr reads of the objects is what they were at its beginning, and all that it writes is
what they are at its end: one equation reads, and one writes. Whether the jaxpr writes an array that
it reads turns out at the end. What it only reads it *captures* (`core.capture`): that becomes an
equation of its own, with the capture as its operand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.primitives import read_p, state_effect, write_p
from jaxstate._src.tree.addresses import LeafAddress
from jaxstate._src.tree.walk import Walk

AddressOf = Callable[[int], LeafAddress]

_EFFECTS = {state_effect}


class Equations:
    """The equations of the jaxpr that ``trace`` is building.

    Attributes:
      walk: the objects at the beginning.
      written: the slots that are written, in order, and their values.
      has_ended: whether the equations are in the jaxpr.
    """

    __slots__ = ("_place", "_read", "_reads", "_trace", "has_ended", "walk", "written")

    def __init__(self, trace: Any, walk: Walk) -> None:
        self.walk = walk
        self.written: dict[Any, Any] = {}
        self.has_ended = False
        self._trace = trace
        self._place: Any = None
        self._reads: _jax.GrowingEquation | None = None
        self._read: list[int] = []  # the numbers of the arrays

    def read(self, number: int, address_of: AddressOf) -> Any:
        """An array as it was at the beginning."""
        if self.has_ended:
            return self._read_late(number, address_of(number))
        if self._reads is None:
            place = self._place_of(address_of(number))
            params = dict(addresses=(), avals=(), version=0)
            self._reads = _jax.GrowingEquation(self._trace, read_p, params, _EFFECTS, place)
        self._read.append(number)
        return self._reads.result(self.walk.avals[number])

    def _read_late(self, number: int, address: LeafAddress) -> Any:
        place, aval = self._place_of(address), self.walk.avals[number]
        operand, params = self._capture(number, address, place)
        (value,) = _jax.emit(self._trace, read_p, [operand], [aval], params, _EFFECTS, place)
        return value

    def add(self, address_of: AddressOf) -> None:
        """Adds them to the jaxpr, whose function has returned."""
        if self._reads is not None:
            self._divide(self._reads, [address_of(number) for number in self._read])
        if self.written:
            addresses = tuple(self.written)
            params, place = dict(addresses=addresses), self._place_of(addresses[0])
            values = list(self.written.values())
            _jax.emit(self._trace, write_p, values, [], params, _EFFECTS, place)

    def end(self) -> None:
        """To be called behind `add`, or if the function has failed."""
        self.has_ended = True
        self._reads, self._read, self.written = None, [], {}

    def _divide(self, reads: _jax.GrowingEquation, addresses: list[LeafAddress]) -> None:
        """Only what is written is read without a capture."""
        written, avals = self.written, self.walk.avals
        pairs = list(zip(self._read, addresses, strict=True))
        own = {
            i: self._capture(number, address, reads.place)
            for i, (number, address) in enumerate(pairs)
            if address not in written
        }
        kept = [(avals[number], address) for number, address in pairs if address in written]
        reads.params.update(
            addresses=tuple([address for _, address in kept]), avals=tuple([a for a, _ in kept])
        )
        reads.divide(own)

    def _capture(self, number: int, address: LeafAddress, place: Any) -> Any:
        aval, version = self.walk.avals[number], self.walk.versions[number]
        operand = _jax.new_const(self._trace, StateTracer(address, aval), aval, place)
        return operand, dict(addresses=(address,), avals=(aval,), version=version)

    def _place_of(self, address: Any) -> Any:
        """Where the program is, for equations. (One place for all: to look is slow.)"""
        if self._place is None:
            address.holder()  # a kernel refuses
            self._place = _jax.current_place()
        return self._place
