"""What objects there are, and where their arrays are.

A `Walk` is what was seen in one look at the objects: a `Graph`, which is static, and a list of
arrays. To look again is cheap where little has changed: `Walk.is_current` compares the parts of
each object by identity, and takes over arrays that have been replaced by others of their type.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.tree import objects
from jaxstate._src.tree.graph import (
    LEAF,
    Entry,
    Static,
    TraceNote,
    has_leaves,
    is_like,
    value_of,
)
from jaxstate._src.tree.looking import NUMBERS, Looking, can_hold
from jaxstate._src.tree.node import Node, Nodes
from jaxstate._src.tree.objects import STATIC, kind_of, parts_of
from jaxstate._src.tree.references import position


class Walk:
    """The objects that are reached from ``roots``, as they were when they were looked at.

    Attributes:
      leaves: the arrays.
      places: for each array, the number of its node and of the part there; (-1, root) for roots.
      nodes: a `Node` per object.
      is_tree: whether no object of a class that JAX knows is a part of a pytree in two places.
      has_links: whether an object was reached twice all the same.
      notes: where objects note the trace that they are used in, as in ``places``.
      iterators: those of Python among the parts, behind where they are, as in ``places``.
    """

    __slots__ = (
        "_clock", "avals", "graph", "has_links", "is_tree", "iterators", "leaves", "nodes",
        "notes", "places", "roots", "versions",
    )  # fmt: skip

    def __init__(
        self, roots: Sequence[Any], before: Walk | None = None, tree: bool = False
    ) -> None:
        seen = Looking(roots, before, tree)
        self.roots = list(roots)
        self.leaves, self.avals, self.places = seen.leaves, seen.avals, seen.places
        self.nodes, self.notes, self.iterators = seen.nodes, seen.notes, seen.iterators
        self.is_tree, self.has_links = seen.is_tree, seen.has_links
        self.graph = seen.graph()
        self._clock = 0 if before is None else before._clock + 1
        self.versions = [self._clock] * len(self.leaves)

    def label_of_part(self, number: int, place: int) -> str:
        """How the program gets to the part number ``place`` of an object."""
        return self.graph.label_of_part(number, self.nodes.rank(number, place))

    def find(self, x: Any) -> Node | None:
        """The node of an object, if it was seen."""
        return self.nodes.find(x)

    def number_of(self, x: Any) -> int | None:
        return self.nodes.number_of(x)

    def is_current(self, roots: Sequence[Any]) -> bool:
        """Whether the objects are what they were; other arrays of the same types are taken over."""
        if len(roots) != len(self.roots) or not all(map(operator.is_, roots, self.roots)):
            return False
        for node in self.nodes:
            names, keys, values = parts_of(node.object)
            before = node.values
            if len(values) != len(before) or names != node.names or keys != node.keys:
                return False
            if all(map(operator.is_, values, before)):
                continue
            for i, (old, new) in enumerate(zip(before, values, strict=True)):
                if old is not new and not self._takes(node, i, new):
                    return False
        return True

    def _takes(self, node: Node, i: int, new: Any) -> bool:
        entry = node.entries[i]
        if entry[0] is LEAF:
            aval = self.avals[entry[1]]
            if isinstance(new, NUMBERS):
                found = None if isinstance(new, np.ndarray) else _jax.type_of(new)
                if found is None or not can_hold(aval, new, found):
                    return False
            elif not isinstance(new, (jax.Array, _jax.Tracer)):
                return False
            elif (found := _jax.typeof(new)) is not aval and found != aval:
                weak = getattr(found, "weak_type", False)
                if not weak or not can_hold(aval, new, found):
                    return False
            self.replace_leaf(entry[1], new)
        elif not _is_same_static(entry, new):
            return False
        node.values[i] = new
        return True

    def replace_leaf(self, i: int, x: Any) -> None:
        self.leaves[i] = x
        self._clock += 1
        self.versions[i] = self._clock

    def with_leaves(self, leaves: list[Any], *, put: bool) -> Walk:
        """The same with other arrays, which are put into the objects if ``put``."""
        walk = self._like(leaves)
        walk.nodes = self.nodes.like([node.copy(node.object) for node in self.nodes])
        for node, other in zip(self.nodes, walk.nodes, strict=True):
            if put and node.with_leaves:
                made = self.values_of([node.entries[i] for i in node.with_leaves], leaves)
                for i, value in zip(node.with_leaves, made, strict=True):
                    other.values[i] = value
                other.fill(other.values)
        walk.roots = [
            self.values_of([e], leaves)[0] if put and has_leaves(e) else r
            for e, r in zip(self.graph.roots, self.roots, strict=True)
        ]
        return walk

    def copied(self, leaf: Callable[[Any, Any], Any]) -> Walk:
        """The objects again, with what ``leaf(x, type)`` makes of the arrays."""
        walk = self._like([leaf(x, aval) for x, aval in zip(self.leaves, self.avals, strict=True)])
        walk.nodes = Nodes([n.copy(objects.Blank.of(n.object).make()) for n in self.nodes])
        walk.put_together()
        walk.roots = walk.values_of(self.graph.roots)
        return walk

    def put_together(self) -> None:
        """Makes the objects of their parts."""
        for node in sorted(self.nodes, key=operator.attrgetter("hashes")):
            node.values = self.values_of(node.entries)
            if node.key_entries:
                node.keys = self.values_of(node.key_entries)
            node.fill(node.values)

    def _like(self, leaves: list[Any]) -> Walk:
        walk = object.__new__(Walk)
        walk.leaves, walk.places, walk.notes = leaves, self.places, self.notes
        walk.graph, walk.avals, walk.is_tree = self.graph, self.avals, self.is_tree
        walk.has_links, walk.iterators = self.has_links, self.iterators
        walk._clock, walk.versions = self._clock, self.versions[:]
        return walk

    def positions(self) -> tuple[Any, ...]:
        """Where the iterators are."""
        return tuple([position(x) for _, _, x in self.iterators])

    # -- What stands where -------------------------------------------------------------------

    def values_of(self, entries: Sequence[Entry], leaves: list[Any] | None = None) -> list[Any]:
        """What entries stand for, with these arrays or others."""
        arrays = self.leaves if leaves is None else leaves
        return [
            arrays[e[1]] if e[0] is LEAF else value_of(e, arrays.__getitem__, self.object_of)
            for e in entries
        ]

    def object_of(self, number: int) -> Any:
        return self.nodes[number].object


def _is_same_static(entry: Entry, new: Any) -> bool:
    if entry[0] is not STATIC or type(new) is not type(entry[1].value):
        return False
    if type(entry[1]) is TraceNote:
        return True
    return kind_of(new) is STATIC and bool(entry[1] == Static(new))


def fitted(value: Any, aval: Any) -> Any:
    """The array that a number in the place of an array of type ``aval`` stands for."""
    found = getattr(value, "aval", None)
    if found is aval or (found is not None and not getattr(found, "weak_type", False)):
        return value
    if isinstance(value, (bool, int, float, complex)) or getattr(value, "weak_type", False):
        array = _jax.as_array(value)
        holds = can_hold(aval, value, _jax.typeof(array))
        return jax.lax.convert_element_type(array, aval.dtype if holds else array.dtype)
    return _jax.as_array(value)


def first_difference(before: Walk, after: Walk) -> str:
    """How a program gets to the first part whose structure is another one than before."""
    pairs = list(enumerate(zip(before.graph.nodes, after.graph.nodes, strict=False)))
    for n, (old, new) in pairs:
        for walk, x, y in ((before, old, new), (after, new, old)):
            names = [*x.names, *(x.keys if isinstance(x.keys, tuple) else ())]
            others = [*y.names, *(y.keys if isinstance(y.keys, tuple) else ())]
            for i, name in enumerate(names):
                if name not in others:
                    return walk.graph.label_of_part(n, i)
        if old.cls is not new.cls or old.keys != new.keys:
            return before.graph.label_of_node(n)
        for i, (a, b) in enumerate(zip(old.entries, new.entries, strict=True)):
            if not is_like(a, b):
                return before.graph.label_of_part(n, i)
    n = next((n for n, (old, new) in pairs if old != new), None)
    return "tree" if n is None else before.graph.label_of_node(n)
