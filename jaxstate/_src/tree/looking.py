"""The looking: objects become nodes, and what they are made of becomes entries of a `Graph`."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
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
)
from jaxstate._src.tree.node import Node, Nodes
from jaxstate._src.tree.objects import MADE, NODE, STATIC, children_names, kind_of, parts_of
from jaxstate._src.tree.references import followed, is_iterator, is_weak_container, may_lead_back


class Looking:
    """One look at the objects that are reached from ``roots``, in progress.

    Args:
      before: the `Walk` of the look before, from which numbers take the types of arrays.
      tree: whether an object in two places of a pytree is two objects.

    Attributes: see `tree.walk.Walk`.
    """

    def __init__(self, roots: Sequence[Any], before: Any, tree: bool) -> None:
        self.leaves: list[Any] = []
        self.places: list[tuple[int, int]] = []
        self.nodes = Nodes()
        self.notes: list[tuple[int, int]] = []
        self.iterators: list[tuple[int, int, Any]] = []
        self.avals: list[Any] = []
        self.is_tree = True
        self.has_links = False
        self._before = before
        self._children: set[int] = set()
        self._followed: list[tuple[Any, int, int, tuple[int, ...]]] = []
        self._keyed: list[int] = []  # the objects whose keys may be objects
        self._path: list[int] = []  # to a part of a value that is made of its parts
        self._entries = [self._entry(r, False, -1, i, tree) for i, r in enumerate(roots)]
        self._follow(self._entries, tree)
        self._find_keys(tree)
        self._follow(self._entries, tree)

    def graph(self) -> Graph:
        """The static part of what was seen."""
        records, rank = [self._record(node) for node in self.nodes], self.nodes.rank
        places = tuple([(n, rank(n, i)) for n, i in self.places])
        return Graph(tuple(records), tuple(self._entries), tuple(self.avals), places)

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
        place = self.nodes.rank(node.parent, node.place)
        return Record(type(node.object), tuple(names), keys, tuple(entries), node.parent, place)

    def _entry(self, x: Any, static: bool, node: int, place: int, tree: bool) -> Entry:
        cls = type(x)
        if cls is str or x is None:
            return (STATIC, Static(x))
        if cls in _jax.plain_arrays:
            return self._leaf(x, x.aval, node, place)
        if isinstance(x, (jax.Array, _jax.Tracer)):
            return self._leaf(x, _jax.typeof(x), node, place)
        if isinstance(x, NUMBERS) and not static:
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
                if is_weak_container(x, self.nodes.find):
                    raise problems.held_weakly(type(x))
                how = followed(x, self.nodes.find)
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
            number = self.nodes.number_of(x)
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
        number = self.nodes.number_of(x)
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
        node = Node(x, parent, place)
        number = self.nodes.add(node)
        if not static:
            self._children.add(number)
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


_NAMES = {str, int, float, bool, bytes, type(None)}  # keys that are no objects
NUMBERS = (bool, int, float, complex, np.ndarray, np.generic)


def _with_part(entry: Entry, path: Sequence[int], part: Entry) -> Entry:
    """A value that is made of its parts, with another one at a path."""
    if not path:
        return part
    kind, maker, entries = entry
    i, *rest = path
    return (kind, maker, (*entries[:i], _with_part(entries[i], rest, part), *entries[i + 1 :]))


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
