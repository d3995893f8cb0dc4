"""The looking: what objects there are, and where their arrays are.

`Walk` is one look at the objects. What it finds is a `Graph`, which is static, and a list of
arrays. To look again is cheap where little has changed: `Walk.is_current` compares the parts of
each object by identity, and takes over arrays that have been replaced by others of their type.
"""

from __future__ import annotations

import contextlib
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.tree import objects, problems
from jaxstate._src.tree.graph import (
    LEAF,
    Entry,
    Graph,
    Key,
    Record,
    Static,
    TraceNote,
    has_leaves,
    hashes,
    is_like,
    value_of,
)
from jaxstate._src.tree.objects import MADE, NODE, STATIC, children_names, kind_of, parts_of, put
from jaxstate._src.tree.references import (
    followed,
    is_iterator,
    is_weak_container,
    may_lead_back,
    position,
)


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
        before = {objects.label(self.names, self.keys, i): x for i, x in enumerate(self.values)}
        after = {objects.label(names, keys, i): x for i, x in enumerate(values)}
        parts = [p for p in {**before, **after} if before.get(p, self) is not after.get(p, self)]
        return parts[0] if parts else None

    def fill(self, values: list[Any]) -> None:
        objects.fill(self.object, self.names, self.keys, values)

    def put(self, i: int, value: Any) -> None:
        put(self.object, self.names, self.keys, i, value)


class Walk:
    """One look at the objects that are reached from ``roots``.

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
        "_before", "_children", "_clock", "_followed", "_keyed", "_memo", "_path", "avals", "graph",
        "has_links", "is_tree", "iterators", "leaves", "nodes", "notes", "places", "roots",
        "versions",
    )  # fmt: skip

    def __init__(
        self, roots: Sequence[Any], before: Walk | None = None, tree: bool = False
    ) -> None:
        self.roots = list(roots)
        self.leaves: list[Any] = []
        self.places: list[tuple[int, int]] = []
        self.nodes: list[Node] = []
        self.notes: list[tuple[int, int]] = []
        self.iterators: list[tuple[int, int, Any]] = []
        self.avals: list[Any] = []
        self.is_tree = True
        self.has_links = False
        self._children: set[int] = set()
        self._before = before
        self._memo: dict[int, int] = {}
        self._followed: list[tuple[Any, int, int, tuple[int, ...]]] = []
        self._keyed: list[int] = []  # the objects whose keys may be objects
        self._path: list[int] = []  # to a part of a value that is made of its parts
        entries = [self._entry(r, False, -1, i, tree) for i, r in enumerate(roots)]
        self._follow(entries, tree)
        self._find_keys(tree)
        self._follow(entries, tree)
        records = [self._record(node) for node in self.nodes]
        ranks = [node.ranks for node in self.nodes]
        places = tuple(
            [(n, ranks[n][i] if n >= 0 and ranks[n] else i) for n, i in self.places]  # type: ignore[index]
        )
        self.graph = Graph(tuple(records), tuple(entries), tuple(self.avals), places)
        self._before = None
        self._clock = 0 if before is None else before._clock + 1
        self.versions = [self._clock] * len(self.leaves)

    def _record(self, node: Node) -> Record:
        names, keys, entries = node.names, node.keys, node.entries
        if node.key_entries:
            keys = [Key(e, type(k).__name__) for e, k in zip(node.key_entries, keys, strict=True)]
        if node.order:
            n = len(names)
            entries = [entries[i] for i in node.order]
            if isinstance(keys, list):
                keys = [keys[i - n] for i in node.order[n:]]
            names = [names[i] for i in node.order[:n]]
        keys = tuple(keys) if isinstance(keys, list) else keys
        place = self._rank(node.parent, node.place)
        return Record(type(node.object), tuple(names), keys, tuple(entries), node.parent, place)

    def _rank(self, number: int, place: int) -> int:
        ranks = self.nodes[number].ranks if number >= 0 else None
        return ranks[place] if ranks else place

    def label_of_part(self, number: int, place: int) -> str:
        """How the program gets to the part number ``place`` of an object."""
        return self.graph.label_of_part(number, self._rank(number, place))

    def _entry(self, x: Any, static: bool, node: int, place: int, tree: bool) -> Entry:
        cls = type(x)
        if cls is str or x is None:
            return (STATIC, Static(x))
        if cls in _jax.plain_arrays:
            return self._leaf(x, x.aval, node, place)
        if isinstance(x, (jax.Array, _jax.Tracer)):
            return self._leaf(x, _jax.typeof(x), node, place)
        if isinstance(x, _NUMBERS) and not static:
            aval = None if isinstance(x, np.ndarray) and x.dtype == object else _jax.type_of(x)
            if aval is not None:
                return self._leaf(x, aval, node, place)
        kind = kind_of(x)
        if kind is NODE:
            return (NODE, self._node(x, static, node, place, tree))
        if kind is MADE:
            return self._made(*objects.taken_apart(x), static, node, place, tree)
        if isinstance(x, frozenset) and any(kind_of(part) is NODE for part in x):
            maker, parts = objects.taken_apart(x)
            parts = [parts[i] for i in self._order_of_members(parts)]
            return self._made(maker, parts, static, node, place, tree)
        if objects.is_trace_note(x):
            self.notes.append((node, place))
            return (STATIC, TraceNote(x))
        if is_iterator(x):
            self.iterators.append((node, place, x))
        if may_lead_back(x):
            self._followed.append((x, node, place, tuple(self._path)))
        return (STATIC, Static(x))

    def _made(
        self, maker: Any, parts: list[Any], static: bool, node: int, place: int, tree: bool
    ) -> Entry:
        entries = []
        for i, part in enumerate(parts):
            self._path.append(i)
            entries.append(self._entry(part, static, node, place, tree))
            self._path.pop()
        return (MADE, maker, tuple(entries))

    def _follow(self, entries: list[Entry], tree: bool) -> None:
        """What leads back to the objects leads to the objects, also in a copy."""
        found = True
        while found:
            found, todo, self._followed = False, self._followed, []
            for x, n, place, path in todo:
                if is_weak_container(x, self.find):
                    raise problems.held_weakly(type(x))
                how = followed(x, self.find)
                if how is None:
                    self._followed.append((x, n, place, path))
                    continue
                self._path = list(path)
                found, entry = True, self._made(*how, True, n, place, tree)
                there = entries if n < 0 else self.nodes[n].entries
                there[place] = _with_part(there[place], path, entry)
                if n >= 0 and has_leaves(entry) and place not in self.nodes[n].with_leaves:
                    self.nodes[n].with_leaves.append(place)

    def _find_keys(self, tree: bool) -> None:
        for number in self._keyed:
            node = self.nodes[number]
            keys = [self._key(k, number, len(node.names) + i) for i, k in enumerate(node.keys)]
            if any(key[0] is not STATIC for key in keys):
                node.key_entries = keys

    def _key(self, x: Any, node: int, place: int) -> Entry:
        """A key. An object is a part if it is one elsewhere, or equal to others of its class:
        otherwise it is a name, that stays what it is."""
        if type(x) is tuple:
            parts = [self._key(part, node, place) for part in x]
            if any(part[0] is not STATIC for part in parts):
                return (MADE, objects.Tuple(tuple, ()), tuple(parts))
        elif kind_of(x) is NODE:
            number = self.number_of(x)
            if number is None and type(x).__hash__ is not object.__hash__:
                number = self._node(x, True, node, place, False)
            if number is not None:
                return (NODE, number)
        return (STATIC, Static(x))

    def _leaf(self, x: Any, aval: Any, node: int, place: int) -> Entry:
        if getattr(aval, "weak_type", False):
            aval = self._type_of_place(x, aval.update(weak_type=False), node, place)
        self.leaves.append(x)
        self.places.append((node, place))
        self.avals.append(aval)
        return (LEAF, len(self.leaves) - 1)

    def _type_of_place(self, x: Any, aval: Any, node: int, place: int) -> Any:
        """A number takes the type of the array that was there before, if that can hold it."""
        if self._before is None or node < 0:
            return aval
        here = self.nodes[node]
        there = self._before.find(here.object)
        if there is None:
            return aval
        entry = there.entry_of(here.names, here.keys, place)
        if entry is None or entry[0] is not LEAF:
            return aval
        old = self._before.avals[entry[1]]
        return old if can_hold(old, x, aval) else aval

    def _node(self, x: Any, static: bool, parent: int, place: int, tree: bool) -> int:
        number = self._memo.get(id(x))
        if number is not None:
            is_child = not static and _jax.children_of(x) is not None
            if not is_child or number not in self._children:
                self.has_links = True
                if is_child:
                    self._children.add(number)
                return number
            if not tree:
                self.is_tree = False
                return number
        number = self._memo[id(x)] = len(self.nodes)
        if not static:
            self._children.add(number)
        node = Node(x, parent, place)
        self.nodes.append(node)
        node.names, node.keys, node.values = parts_of(x)
        if type(node.keys) is list and set(map(type, node.keys)) - _NAMES:
            self._keyed.append(number)
        path, self._path = self._path, []
        n = len(node.names)
        children = children_names(x, node.names, node.values) if n else ()
        order = _order(type(x), node.names, node.keys)
        if isinstance(x, set):
            order = order[:n] if order else list(range(n))
            order += [n + i for i in self._order_of_members(node.values[n:])]
        node.order = order
        if order:
            node.ranks = sorted(range(len(order)), key=order.__getitem__)
        node.entries = [(STATIC,)] * len(node.values)
        for i in order or range(len(node.values)):
            is_static = static or (i < n and node.names[i] not in children)
            node.entries[i] = entry = self._entry(node.values[i], is_static, number, i, tree)
            if entry[0] is LEAF or (entry[0] is MADE and has_leaves(entry)):
                node.with_leaves.append(i)
        self._path = path
        return number

    def _order_of_members(self, members: list[Any]) -> list[int]:
        """That in which they were seen before: the order of a set says nothing."""
        before, order = self._before, list(range(len(members)))
        if before is not None:
            numbers = {i: before.number_of(x) for i, x in enumerate(members)}
            order.sort(key=lambda i: len(before.nodes) if (n := numbers[i]) is None else n)
        return order

    def find(self, x: Any) -> Node | None:
        """The node of an object, if it was seen."""
        number = self._memo.get(id(x))
        if number is None or self.nodes[number].object is not x:
            return None
        return self.nodes[number]

    def number_of(self, x: Any) -> int | None:
        number = self._memo.get(id(x))
        return number if number is not None and self.nodes[number].object is x else None

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
            if isinstance(new, _NUMBERS):
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

    def replace(self, number: int, x: Any) -> None:
        """Another object takes the place of one, in what this walk knows."""
        self._memo = {k: n for k, n in self._memo.items() if n != number}
        self._memo[id(x)] = number
        self.nodes[number].object = x

    def with_leaves(self, leaves: list[Any], *, put: bool) -> Walk:
        """The same with other arrays, which are put into the objects if ``put``."""
        walk = self._like(leaves)
        walk._memo = self._memo
        for node in self.nodes:
            other = node.copy(node.object)
            walk.nodes.append(other)
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
        walk.nodes = [node.copy(objects.Blank.of(node.object).make()) for node in self.nodes]
        walk._memo = {id(node.object): n for n, node in enumerate(walk.nodes)}
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
        walk.has_links, walk._children = self.has_links, self._children
        walk._before, walk._followed, walk._keyed, walk._path = None, [], [], []
        walk._clock, walk.versions = self._clock, self.versions[:]
        walk.nodes, walk.iterators = [], self.iterators
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


_NAMES = {str, int, float, bool, bytes, type(None)}  # keys that are no objects
_NUMBERS = (bool, int, float, complex, np.ndarray, np.generic)


def _with_part(entry: Entry, path: Sequence[int], part: Entry) -> Entry:
    """A value that is made of its parts, with another one at a path."""
    if not path:
        return part
    kind, maker, entries = entry
    i, *rest = path
    return (kind, maker, (*entries[:i], _with_part(entries[i], rest, part), *entries[i + 1 :]))


def _is_same_static(entry: Entry, new: Any) -> bool:
    if entry[0] is not STATIC or type(new) is not type(entry[1].value):
        return False
    if type(entry[1]) is TraceNote:
        return True
    return kind_of(new) is STATIC and bool(entry[1] == Static(new))


def _order(cls: type, names: list[str], keys: Any) -> list[int] | None:
    """In what order to look at the parts of an object; None for that in which they are.

    The order of attributes says nothing about a structure, nor (for JAX) that of a dict.
    """
    n = len(names)
    order = sorted(range(n), key=names.__getitem__)
    items: Any = range(keys if isinstance(keys, int) else len(keys or ()))
    if not isinstance(keys, int) and (cls is dict or cls is defaultdict):
        with contextlib.suppress(TypeError):
            items = sorted(items, key=keys.__getitem__)
    order += [n + i for i in items]
    return None if order == list(range(len(order))) else order


def can_hold(old: Any, value: Any, found: Any) -> bool:
    """Whether a number, or a weakly typed array, becomes an array of type ``old`` as it is."""
    if found.shape != old.shape or _jax.is_typed_key(old):
        return False
    return bool(jnp.result_type(old.dtype, value) == old.dtype)


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
