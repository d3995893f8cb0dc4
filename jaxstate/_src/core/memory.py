"""Values that are written in their memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from itertools import starmap
from typing import Any, NamedTuple

import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.slots import Cell

__all__ = [
    "LARGE", "Kept", "KeptCell", "KeptElement", "Taken", "append_result", "cell_of", "is_large",
    "writing",
]  # fmt: skip


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


class KeptElement(Kept, Cell):
    """The same for one of many values in a list."""

    __slots__ = ("_number", "_values", "is_own", "taken")

    def __init__(self, values: list[Any], number: int) -> None:
        self.is_own = False
        self.taken = None
        self._values = values
        self._number = number

    @property
    def kept(self) -> Any:  # type: ignore[override]
        return self._values[self._number]

    @kept.setter
    def kept(self, value: Any) -> None:
        self._values[self._number] = value


def cell_of(value: Any, aval: Any) -> Cell:
    """A cell for a value that the program writes."""
    return KeptCell(value) if is_large(aval) else Cell(value)
