"""What was seen of one object, and of several."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Any

from jaxstate._src.tree import objects
from jaxstate._src.tree.graph import Entry, hashes
from jaxstate._src.tree.objects import parts_of, put


class Node:
    """One object as it was when it was looked at."""

    __slots__ = (
        "entries", "key_entries", "keys", "names", "object", "order", "parent", "place", "ranks",
        "values", "with_leaves",
    )  # fmt: skip

    def __init__(self, x: Any, parent: int, place: int) -> None:
        self.object = x
        self.parent = parent  # the number of the node of which it is a part, or -1
        self.place = place  # the number of the part, or of the root
        self.names: list[str] = []
        self.keys: Any = None
        self.key_entries: list[Entry] | None = None  # if there are objects among the keys
        self.values: list[Any] = []
        self.entries: list[Entry] = []
        self.order: list[int] | None = None  # in which the graph has the parts
        self.ranks: list[int] | None = None  # the places of the parts in this order
        self.with_leaves: list[int] = []  # the parts that are, or are made of, arrays

    def copy(self, x: Any) -> Node:
        """The same of another object."""
        other = Node(x, self.parent, self.place)
        other.names, other.keys, other.values = self.names, self.keys, self.values[:]
        other.entries, other.with_leaves = self.entries, self.with_leaves
        other.order, other.ranks, other.key_entries = self.order, self.ranks, self.key_entries
        return other

    @property
    def hashes(self) -> bool:
        """Whether it looks at the hashes of other objects: these are put together first."""
        return hashes(type(self.object), self.key_entries, self.entries)

    def entry_of(self, names: Any, keys: Any, place: int) -> Entry | None:
        """The entry of the part that is at number ``place`` of ``names`` and ``keys``."""
        try:
            if place < len(names):
                return self.entries[self.names.index(names[place])]
            place -= len(names)
            if not isinstance(keys, int):
                place = self.keys.index(keys[place])
            return self.entries[len(self.names) + place]
        except (ValueError, IndexError, AttributeError):
            return None

    def seen_now(self) -> Node:
        """The object with the parts that it has now."""
        other = Node(self.object, self.parent, self.place)
        other.names, other.keys, other.values = parts_of(self.object)
        return other

    def changed_part(self) -> str | None:
        """How a program writes a part of the object that is another one by now, or is gone."""
        names, keys, values = parts_of(self.object)
        if isinstance(keys, objects.Content) and keys != self.keys:
            return "[:]" if isinstance(self.object, (array, bytearray)) else ""
        before = {objects.label(self.names, self.keys, i): x for i, x in enumerate(self.values)}
        after = {objects.label(names, keys, i): x for i, x in enumerate(values)}
        parts = [p for p in {**before, **after} if before.get(p, self) is not after.get(p, self)]
        return parts[0] if parts else None

    def fill(self, values: list[Any]) -> None:
        objects.fill(self.object, self.names, self.keys, values)

    def put(self, i: int, value: Any) -> None:
        put(self.object, self.names, self.keys, i, value)


class Nodes(list[Node]):
    """Nodes by their numbers, which are found by their objects."""

    __slots__ = ("_numbers",)

    def __init__(self, nodes: Iterable[Node] = (), numbers: dict[int, int] | None = None) -> None:
        """``numbers`` are those of the objects by their ids, if they are known."""
        super().__init__(nodes)
        if numbers is None:
            numbers = {id(node.object): n for n, node in enumerate(self)}
        self._numbers = numbers

    def like(self, nodes: Iterable[Node]) -> Nodes:
        """Other nodes of the same objects."""
        return Nodes(nodes, self._numbers)

    def add(self, node: Node) -> int:
        number = self._numbers[id(node.object)] = len(self)
        self.append(node)
        return number

    def replace(self, number: int, x: Any) -> None:
        """Another object takes the place of one."""
        self._numbers = {k: n for k, n in self._numbers.items() if n != number}
        self._numbers[id(x)] = number
        self[number].object = x

    def number_of(self, x: Any) -> int | None:
        """The number of the node of an object, if it was seen."""
        number = self._numbers.get(id(x))
        return number if number is not None and self[number].object is x else None

    def find(self, x: Any) -> Node | None:
        """The node of an object, if it was seen."""
        number = self.number_of(x)
        return None if number is None else self[number]

    def rank(self, number: int, place: int) -> int:
        """The place that a part of an object has in the graph."""
        ranks = self[number].ranks if number >= 0 else None
        return ranks[place] if ranks else place
