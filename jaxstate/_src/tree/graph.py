"""The static part of some objects: what there is, and where arrays are.

Of the parts of an object an *entry* says what they are: ``(LEAF, number)`` for an array, ``(NODE,
number)`` for an object with parts of its own, ``(MADE, maker, entries)`` for a value that is made
of its parts, ``(STATIC, value)`` for anything else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jaxstate._src.tree import objects
from jaxstate._src.tree.objects import MADE, NODE, STATIC

LEAF = "leaf"
Entry = tuple[Any, ...]


class Static:
    """A value that is no array: equal to another of its type that it equals, or to itself only."""

    __slots__ = ("key", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        try:
            hash(value)
            self.key = (type(value), value)
        except TypeError:
            self.key = (type(value), id(value))

    def made(self) -> Any:
        """What stands for it in an object that is made here."""
        return self.value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and (self.value is other.value or self._equals(other))

    def _equals(self, other: Static) -> bool:
        return self.key[0] is other.key[0] and bool(self.key[1] == other.key[1])

    def __hash__(self) -> int:
        return hash(self.key)


class TraceNote(Static):
    """What an object notes about the trace that it is used in (`flax.nnx` does)."""

    __slots__ = ()

    def __init__(self, value: Any) -> None:
        self.value, self.key = value, (type(value), None)

    def made(self) -> Any:
        return type(self.value)()


class Key(NamedTuple):
    """A key, where objects are among the keys."""

    entry: Entry
    kind: str

    def __repr__(self) -> str:
        return repr(self.entry[1].value) if self.entry[0] is STATIC else f"<{self.kind}>"


class Record(NamedTuple):
    """The static part of one object: its class, the names of its parts, and their entries.

    Attributes:
      parent, place: the number of the object that it is a part of, and of the part.
    """

    cls: type
    names: tuple[str, ...]
    keys: Any
    entries: tuple[Entry, ...]
    parent: int
    place: int


class Graph:
    """The static part of some objects: hashable, and a key of caches.

    Attributes:
      nodes: a `Record` per object.
      roots: the entries of the objects that the others were reached from.
      avals: the types of the arrays.
      places: for each array, the number of its object and of the part there.
    """

    __slots__ = ("_hash", "avals", "nodes", "places", "roots")

    def __init__(self, nodes: Any, roots: Any, avals: Any, places: Any) -> None:
        self.nodes: tuple[Record, ...] = nodes
        self.roots: tuple[Entry, ...] = roots
        self.avals: tuple[Any, ...] = avals
        self.places: tuple[tuple[int, int], ...] = places
        self._hash: int | None = None

    def label(self, i: int) -> str:
        """How the program gets to an array."""
        return self.label_of_part(*self.places[i])

    def label_of_part(self, number: int, place: int) -> str:
        if number < 0:
            return "tree"
        record = self.nodes[number]
        return self.label_of_node(number) + objects.label(record.names, record.keys, place)

    def label_of_node(self, number: int) -> str:
        record = self.nodes[number]
        return self.label_of_part(record.parent, record.place)

    def has_structure_of(self, other: Graph) -> bool:
        return self is other or (self.nodes == other.nodes and self.roots == other.roots)

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Graph)
            and hash(self) == hash(other)
            and self.avals == other.avals
            and self.has_structure_of(other)
        )

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.nodes, self.avals))
        return self._hash


def has_leaves(entry: Entry) -> bool:
    return entry[0] is LEAF or (entry[0] is MADE and any(map(has_leaves, entry[2])))


def statics(entry: Entry) -> Iterator[Any]:
    """The static values that an entry stands for, or that it is made of."""
    if entry[0] is STATIC:
        yield entry[1].value
    elif entry[0] is MADE:
        for part in entry[2]:
            yield from statics(part)


def hashes(cls: type, keys: Any, entries: Any) -> bool:
    """Whether an object with such keys and parts looks at the hashes of others."""
    if keys or objects.layout_of(cls).items is set:
        return True
    return any(map(_has_members, [e for e in entries if e[0] is MADE]))


def _has_members(entry: Entry) -> bool:
    if entry[0] is not MADE:
        return False
    return isinstance(entry[1], objects.Members) or any(map(_has_members, entry[2]))


def mentions(entry: Entry, number: int) -> bool:
    """Whether an object is a part of what an entry stands for."""
    if entry[0] is NODE:
        return bool(entry[1] == number)
    return entry[0] is MADE and any(mentions(e, number) for e in entry[2])


def value_of(entry: Entry, leaf: Callable[[int], Any], node: Callable[[int], Any]) -> Any:
    """What an entry stands for, with given arrays and objects."""
    kind = entry[0]
    if kind is LEAF:
        return leaf(entry[1])
    if kind is NODE:
        return node(entry[1])
    if kind is STATIC:
        return entry[1].made()
    return entry[1].make([value_of(e, leaf, node) for e in entry[2]])


def is_like(a: Entry, b: Entry) -> bool:
    """Whether two entries are equal but for the numbers of what they mention."""
    if a[0] is not b[0] or (a[0] in (STATIC, MADE) and a[1] != b[1]):
        return False
    return a[0] is not MADE or all(map(is_like, a[2], b[2]))
