"""Operands of a jitted call that are donated: what a call writes, it writes in their memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.memory import Kept, Taken, writing
from jaxstate._src.core.primitives import state_effect
from jaxstate._src.core.slots import Address

__all__ = ["Donation", "Donations", "OtherStateError", "calls_host", "content", "donations", "lost"]


class OtherStateError(Exception):
    """A threaded call was tried, and the call uses other state."""


class Donation:
    """The operands of a call. Those at ``which`` are donated: they are taken out of their cells, or
    are copies, if something else has their memory.

    Attributes:
      values: the operands.
      before: what the cells hold until they are written.
      done: what the call returns, when it has.
    """

    def __init__(self, cells: Sequence[Any], which: Sequence[int], carried: range) -> None:
        self.which = which
        self.values: list[Any] = []
        self.before: list[Any] = []
        self.done: list[Any] = []
        self._cells = cells
        self._carried = carried
        self._is_locked = False

    def __enter__(self) -> Donation:
        self._outer, donations.last = donations.last, self
        if self.which:
            writing.acquire()
            self._is_locked = True
        try:
            cells = self._cells
            self.values[:] = [c.peek() if isinstance(c, Kept) else c.value for c in cells]
            for i in self.which:
                rank = self._carried.index(i)
                if not cells[i].take(Taken(self.values, i, self.done, rank)):
                    self._copy(i)
            self._note_before()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        donations.last = self._outer
        self._end()

    def give_back(self) -> None:
        """Goes on with copies of what is taken."""
        taken = [i for i in self.which if self._cells[i].kept is None]
        self._end()
        for i in taken:
            self._copy(i)
        self._note_before()

    def lost(self) -> list[int]:
        """Of what there is no value any more, if the call has failed."""
        taken = [i for i in self.which if self._cells[i].kept is None]
        return [i for i in taken if self.values[i].is_deleted()]

    def _copy(self, i: int) -> None:
        copy = _jax.like_copy(self.values[i])
        if copy is None:
            raise OtherStateError
        self.values[i] = copy

    def _note_before(self) -> None:
        pairs = zip(self._cells, self.values, strict=True)
        self.before = [c.kept if isinstance(c, Kept) else value for c, value in pairs]

    def _end(self) -> None:
        for i in self.which:
            self._cells[i].put_back()
        if self._is_locked:
            self._is_locked = False
            writing.release()


def content(cell: Any) -> Any:
    """What a cell holds: None while that is written in its memory."""
    return cell.kept if isinstance(cell, Kept) else cell.value


class Donations(threading.local):
    """The donation of the innermost call in progress."""

    last: Donation | None = None


donations = Donations()


def lost(address: Address) -> str:
    """What to note with an error of the compiled program, such as that there is no memory."""
    return (
        f"The call was about to write {address} in its memory, and that value is lost. It has to be"
        " written as a whole before it is used again."
    )


def calls_host(jaxpr: Any) -> bool:
    """Whether it calls functions on the host: they may want what is taken out of its cell."""
    if jaxpr.effects - {state_effect}:
        return True
    return any(
        "callback" in e.primitive.name or any(map(calls_host, _jax.jaxprs_in(e.params)))
        for e in _jax.equations(jaxpr)
    )
