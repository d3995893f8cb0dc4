"""The slots of objects, as they stand in a jaxpr: its arrays, and its structure.

* `LeafAddress`: an array that was there when the jaxpr began.
* `Shape`: the structure, which is only written, and never in a loop or a branch. Writing it makes
  the objects what they are at the end of the jaxpr.
* `NewLeaf`: an array that such a change adds. It is written behind the `Shape`.

The objects of the calls of `mutate` that are open are told apart by how deep these are nested, so
that a jitted function which was traced in one call can be used in the next one.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxstate._src import _jax
from jaxstate._src.core.slots import Address
from jaxstate._src.tree import problems
from jaxstate._src.tree.graph import Entry, Graph
from jaxstate._src.tree.objects import Blank
from jaxstate._src.tree.walk import Walk, first_difference


class TreeAddress(Address, tuple):
    """A slot of the objects of a call of `mutate`: a tuple, which Python compares by itself, of all
    that tells it from others in one jaxpr."""

    graph: Graph
    level: int = property(operator.itemgetter(1))  # type: ignore[assignment]

    in_objects = True
    may_be_written = True  # type: ignore[assignment]

    def __new__(cls, level: int, graph: Graph, *key: Any) -> Any:
        self = tuple.__new__(cls, (cls, level, *key))
        self.graph = graph
        return self

    def missing(self) -> Exception:
        return problems.closed(self.label)

    @property
    def label(self) -> str:
        """How a program gets to it."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"leaf {self.label}"


class LeafAddress(TreeAddress):
    """One array.

    Attributes:
      renewed_objects: the numbers of the objects that a loop replaces by others like them.
    """

    number: int = property(operator.itemgetter(2))  # type: ignore[assignment]
    renewed_objects: tuple[int, ...] = ()

    def __new__(cls, level: int, graph: Graph, number: int, renewed: tuple[int, ...] = ()) -> Any:
        self = super().__new__(cls, level, graph, number)
        if renewed:
            self.renewed_objects = renewed
        return self

    @property
    def label(self) -> str:
        return self.graph.label(self.number)

    def _session(self) -> Any:
        holder = super().known_holder()
        return holder if hasattr(holder, "address_at_entry") else None  # or devices have it

    def known_holder(self) -> Any:
        session = self._session()
        if session is None:
            return super().known_holder()
        # A function with a custom rule has what it was given.
        return None if session.is_given() else session

    def version(self) -> int:
        session = self._session()
        return 0 if session is None else session.version(self.number)

    def note_read(self) -> None:
        session = self._session()
        if session is not None:
            session.refresh()  # the program may have assigned it since

    def path_to(self) -> Any:
        return self.graph  # a number means an array in objects of one structure

    def seen_from(self, boundary: Any) -> Any:
        session = self._session()
        return self if session is None else session.address_at_entry(self, boundary) or self

    def is_written_in(self, trace: Any, written: Any) -> bool:
        session = self._session()
        return session is None or session.address_at_entry(self, trace) is None


class Parts(NamedTuple):
    """What an object is at the end of a jaxpr: see `tree.walk.Node`."""

    names: tuple[str, ...]
    keys: Any
    key_entries: list[Entry] | None
    entries: tuple[Entry, ...]
    hashes: bool


class Change:
    """How a jaxpr changes the structure of the objects.

    Attributes:
      before, after: the objects at the beginning and the end.
      objects: for each object at the end, its number at the beginning, or None for a new one.
      blanks: for each object at the end, what makes one like it.
      parts: for each object at the end, its names, keys and entries.
      leaves: for each array at the end, its number at the beginning, or None for a new one.
      label: how a program gets to what is changed.
      roots: how many of the roots are the program's. (Behind them come detached objects.)
    """

    def __init__(self, before: Walk, entries: list[Any], after: Walk, roots: int) -> None:
        numbers = {id(entry): i for i, entry in enumerate(entries)}
        self.before: Graph = before.graph
        self.after: Graph = after.graph
        self.objects = [before.number_of(node.object) for node in after.nodes]
        self.blanks = [Blank.of(node.object) for node in after.nodes]
        self.parts = [
            Parts(
                tuple(n.names),
                None if n.key_entries else n.keys,
                n.key_entries,
                tuple(n.entries),
                n.hashes,
            )
            for n in after.nodes
        ]
        self.leaves = [numbers.get(id(x)) for x in after.leaves]
        self.roots = roots
        self.label = first_difference(before, after)


class Shape(TreeAddress):
    """The structure of the objects, for a jaxpr that changes it."""

    change: Change
    threaded = True

    def __new__(cls, level: int, change: Change) -> Any:
        self = super().__new__(cls, level, change.after, id(change))
        self.change = change
        return self

    @property
    def label(self) -> str:
        return self.change.label

    def __repr__(self) -> str:
        return f"the structure of {self.label}"

    def check_repeats(self) -> None:
        raise problems.structure_changed(self.label)

    def check_absence(self, others: Sequence[Address]) -> None:
        self.check_repeats()


class NewLeaf(TreeAddress):
    """An array that a change of the structure adds."""

    change: Change
    number: int = property(operator.itemgetter(3))  # type: ignore[assignment]
    threaded = True

    def __new__(cls, level: int, change: Change, number: int) -> Any:
        self = super().__new__(cls, level, change.after, id(change), number)
        self.change = change
        return self

    @property
    def label(self) -> str:
        return self.graph.label(self.number)


FLAG = np.bool_(True)  # what is written to a `Shape`
FLAG_TYPE = _jax.typeof(FLAG)
