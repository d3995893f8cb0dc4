"""Notes that live as long as a trace: what it knows of slots."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxstate._src import _jax
from jaxstate._src.core.slots import Address, AllLanes, Holder, Lane

__all__ = ["Boundaries", "Notes", "View", "lane_of", "lanes_of", "notes_of", "views_of"]


class Notes:
    """What jaxstate knows of one jaxpr under construction.

    Attributes:
      values: the current value of every slot that the jaxpr touched, as the jaxpr names the slot.
      written: the slots that the jaxpr wrote.
      refreshed: what captures of slots, as operands, are here, see `read_since`.
      extra: what clients note, by their own keys.
      place: where the program was when it first wrote one, for all such equations: nobody sees
        them, and to look takes long.
      lane_tables: see `lanes_of`.
      around: a holder, what was open (`slots.OpenHere`), and the `Boundaries` then. (What is open
        may be closed before the construction ends, and is not kept.)
    """

    __slots__ = ("around", "extra", "lane_tables", "place", "refreshed", "values", "written")

    def __init__(self) -> None:
        self.place: Any = None
        self.around: tuple[Holder, weakref.ref[Any], Boundaries] | None = None
        self.lane_tables: dict[int, Any] = {}
        self.values: dict[Address, Any] = {}
        self.written: set[Address] = set()
        self.refreshed: dict[Address, list[Any]] = {}
        self.extra: dict[Any, Any] = {}


notes_of: Callable[[Any], Notes] = functools.partial(_jax.notes_of, make=Notes)


def lanes_of(trace: Any, holder: Holder, base: Any) -> dict[Any, Any]:
    """What the lanes of a vmap have of their own, shared by re-entered copies of its trace.

    It lives with the jaxpr under construction around the vmap or, if there is none, with the
    holder, and not longer than the vmap. (Not with the trace: JAX's caches may keep it.)
    """
    tables = holder.lane_tables if base is None else notes_of(base).lane_tables
    tag = _jax.tag_of(trace)
    known = tables.get(id(tag))
    if known is not None and known[0]() is tag:
        return known[1]
    if base is None and not _splitting.depth:
        _drop_ended(tables)
    table: dict[Any, Any] = {}
    tables[id(tag)] = weakref.ref(tag, lambda _, key=id(tag): _drop(tables, key)), table
    return table


def views_of(trace: Any) -> dict[Any, Any]:
    """Written values as a differentiating trace sees them, shared by its re-entered copies.

    They live as long as the trace works: a tangent must not outlive it.
    """
    if isinstance(trace, _jax.LinearizeTrace):
        return notes_of(trace.tangent_trace).extra
    return _jax.tag_of(trace).__dict__.setdefault("_jaxstate", {})


class _Splitting(threading.local):
    """How many vmaps are getting their lanes' cells: the inner ones of nested vmaps are in progress
    while the outer ones, alone in the chain of traces then, get theirs."""

    depth = 0


_splitting = _Splitting()


def lane_of(address: Address, holder: Holder, trace: Any, base: Any) -> Lane | AllLanes | None:
    """What the lanes of the vmap of ``trace`` have of their own instead of the slot outside."""
    notes = lanes_of(trace, holder, base)
    _splitting.depth += 1
    try:
        return holder.lane(address, trace, notes)
    finally:
        _splitting.depth -= 1


def _drop(tables: dict[int, Any], key: int) -> None:
    if key in tables and tables[key][0]() is None:
        del tables[key]


def _drop_ended(tables: dict[int, Any]) -> None:
    """Forgets transformations that the program has left and that a cache of JAX keeps alive."""
    chain = _jax.chain(_jax.current_trace())
    active = {id(t.tag) for t in chain if getattr(t, "tag", None) is not None}
    for key in tables.keys() - active:
        del tables[key]


class Boundaries(list):
    """What stands between a place in the program and a holder, innermost first.

    A boundary is a jaxpr under construction, or a custom rule that is given its state as operands
    (`rules.derivatives`): names and addresses inside are relative to it.

    Attributes:
      outer: all but the first, as they are seen from the jaxpr around; None if that is not known.
      extra: what clients note, by their own keys.
    """

    def __init__(self, found: Sequence[Any], outer: Boundaries | None = None) -> None:
        super().__init__(found)
        self.outer = outer
        self.extra: dict[Any, Any] = {}


class View(NamedTuple):
    """The tangent of a written value, valid as long as ``stored`` is what is stored.

    Kept without its tracer, which would keep the trace.
    """

    tangent: Any
    stored: Any
