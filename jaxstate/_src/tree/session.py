"""The objects of one call of `mutate`: they answer for the slots that their parts are.

There is no value of a slot beside the objects: they hold what the current trace sees. So the
anchor of a session is the trace that is current.
"""

from __future__ import annotations

import copy
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.arrays.activation import activation, is_array
from jaxstate._src.arrays.array import Writable, fresh, snapshot
from jaxstate._src.core import slots
from jaxstate._src.core.slots import Address, Holder, holders
from jaxstate._src.tree.addresses import FLAG_TYPE, Change, LeafAddress, Shape
from jaxstate._src.tree.graph import LEAF, Entry, Graph, value_of
from jaxstate._src.tree.objects import NODE, Blank, fill, kind_of
from jaxstate._src.tree.one_level import FrozenParts
from jaxstate._src.tree.problems import another_structure, structure_changed
from jaxstate._src.tree.walk import Walk, fitted


class Session(Holder):
    """The objects of one call of `mutate`.

    Attributes:
      roots: a list with the tree.
      detached: objects that are no longer part of the tree, and that somebody holds.
      own: the ids of the objects that are copies. (Others the program has put into the tree.)
      base: the traces that the call is made under.
      frames: the boundaries that the program is in (`tree.frames`), outermost first.
      copies: of objects, which functions were called with (`tree.copies`).
      residuals: the classes of objects that were handed to backward rules.
      reading: the objects as they were, for reads while that is set.
      called: the objects as they were when something was last called with some of them.
      renewed: the objects that the bind in progress has replaced.
      added: the objects after the last change of the structure, by their numbers in that change.
      frozen: the objects that may not be assigned to. (One list for all sessions of a call.)
      original: the session that this is one of, for functions that run later, if it is there yet.
    """

    def __init__(self, walk: Walk, made: str) -> None:
        super().__init__()
        self.made = made
        self.level = sum(isinstance(h, Session) for h in holders())
        self.roots = list(walk.roots)
        self.detached: list[Any] = []
        self.own = {id(node.object) for node in walk.nodes}
        self.base = list(_jax.chain(_jax.current_trace()))
        self.frames: list[Any] = []
        self.copies: list[Any] = []
        self.residuals: set[type] = set()
        self.reading: Walk | None = None
        self.called: Walk | None = None
        self.renewed: Any = None
        self.added: list[Any] = []
        self.frozen = FrozenParts()
        self.original: Callable[[], Session | None] = lambda: None
        self._checked: Any = None
        self.is_open = True
        self._graph: Any = None
        self._pending: _PendingChange | None = None
        self._walk: Walk | None = walk

    @property
    def anchor(self) -> Any:
        return _jax.current_trace() if self.is_open else None

    @anchor.setter
    def anchor(self, value: Any) -> None:
        pass

    def knows(self, address: Address) -> bool:
        return address.in_objects and address.level == self.level  # type: ignore[attr-defined]

    @property
    def opened_under(self) -> Any:
        """The trace that `mutate` was called under."""
        return self.base[0] if self.base else None

    def cell(self, address: Any) -> Any:
        if not isinstance(address, LeafAddress):
            return _ChangeCell(self, address)
        graph = (self.reading or self.walk).graph
        if address.graph is not graph:
            self._check_graph(address, graph)
        return _LeafCell(self, address)

    def is_given(self) -> bool:
        """Whether a function runs that was given the arrays that it uses."""
        return any(f.rule is not None and f.rule.is_boundary for f in self.frames)

    def _check_graph(self, address: LeafAddress, graph: Graph) -> None:
        """An array is meant by its number in objects of one structure."""
        if self._checked == (id(address.graph), id(graph)):
            return
        if not graph.has_structure_of(address.graph):
            raise another_structure(address.label)
        self._checked = id(address.graph), id(graph)

    def version(self, number: int) -> int:
        """Another number when an array has been replaced."""
        versions = self.refresh().versions
        return versions[number] if number < len(versions) else -1

    def address_at_entry(self, address: LeafAddress, trace: Any) -> LeafAddress | None:
        """An array as it was at the beginning of the jaxpr that ``trace`` builds.

        None if it was not there then.
        """
        frame = next((f for f in self.frames if f.trace is trace and f.builds_jaxpr), None)
        if frame is None or address.number >= len(self.walk.leaves):
            return None
        number = frame.number_of(self.walk.leaves[address.number])
        return None if number is None else frame.address(number)

    def aval(self, address: Any) -> Any:
        if isinstance(address, LeafAddress):
            return self.graph.avals[address.number]
        return (
            FLAG_TYPE if isinstance(address, Shape) else address.change.after.avals[address.number]
        )

    def without_values(self) -> Session:
        rest = copy.copy(self)
        rest.frames, rest.base, rest.reading, rest.called, rest.added = [], [], None, None, []
        rest.extra, rest.lane_tables, rest.copies = {}, {}, []
        rest._graph, rest._walk, rest._pending = self.refresh().graph, None, None
        rest.is_open = True
        rest.original = weakref.ref(self)
        return rest

    def signature(self) -> Any:
        # While functions of JAX are traced, their caches need not know the objects.
        if not publishes.graphs:
            return ("mutate", *publishes.way_of_objects)
        return (
            "mutate",
            *publishes.way_of_objects,
            self.graph,
            closed_over(publishes.function, self),
        )

    @property
    def graph(self) -> Any:
        if self._graph is not None or self._walk is None:
            return self._graph
        return self._walk.graph

    @property
    def walk(self) -> Walk:
        """The objects as they were when they were last looked at."""
        if self._walk is None:
            self._walk = Walk(self.everything())
        return self._walk

    @walk.setter
    def walk(self, walk: Walk | None) -> None:
        self._walk = walk

    def everything(self) -> list[Any]:
        return [*self.roots, *self.detached]

    def family(self) -> Iterator[Session]:
        """This one, and those that it is one of."""
        session: Session | None = self
        while session is not None:
            yield session
            session = session.original()

    def looks(self) -> tuple[Walk | None, ...]:
        return self._walk, self.called

    def refresh(self) -> Walk:
        """Looks at the objects: those of the tree, and detached ones that somebody holds."""
        before = self._walk
        if self._pending is not None or (before and before.is_current(self.everything())):
            assert before is not None
            return before
        del before
        outside, publishes.jax_only = publishes.jax_only, True  # (a class may compute its children)
        try:
            return self._look_again()
        finally:
            publishes.jax_only = outside

    def _look_again(self) -> Walk:
        before = self._walk
        self.called = None
        if self._graph is not None:  # without values: nothing of it may be another one
            self._walk = Walk(self.everything())
            return self._walk
        walk = Walk(self.roots, before)
        known = {id(n.object) for f in self.frames for n in f.walk.nodes}
        others = {id(x): x for x in self.detached}
        if before is not None:
            others.update((id(n.object), n.object) for n in before.nodes)
        held = [x for x in others.values() if walk.number_of(x) is None]
        self.detached = []
        if held:
            avals = walk
            del before, walk, others, self._walk
            for i in reversed(range(len(held))):
                if sys.getrefcount(held[i]) <= 2 and id(held[i]) not in known:
                    del held[i]
            self.detached = held
            walk = Walk(self.everything(), avals)
        if not self.frames:
            self.own.intersection_update(id(node.object) for node in walk.nodes)
        self._walk = walk
        return walk

    def get(self, number: int) -> Any:
        walk = self.reading or self.walk
        return fitted(walk.leaves[number], walk.avals[number])

    def set(self, number: int, value: Any) -> None:
        walk = self.walk
        walk.replace_leaf(number, writable(value))
        n, place = walk.places[number]
        if n < 0:
            (made,) = walk.values_of([walk.graph.roots[place]])
            walk.roots[place] = self.roots[place] = made
            return
        node = walk.nodes[n]
        entry = node.entries[place]
        made = walk.leaves[number] if entry[0] is LEAF else walk.values_of([entry])[0]
        with self.frozen.written():
            node.values[place] = made
            node.put(place, made)

    def map_leaves(self, change: Callable[[Any], Any]) -> None:
        """Puts ``change(array)`` in the place of every array."""
        walk = self.refresh()
        with self.frozen.written():
            self._walk = walk.with_leaves([change(x) for x in walk.leaves], put=True)
            self.roots[:] = self._walk.roots[: len(self.roots)]

    def renew(self, numbers: Any) -> None:
        """Replaces objects by others like them, which the program has not seen."""
        walk = self.walk
        self.renewed = numbers
        with self.frozen.written():
            for n in numbers:
                made = Blank.of(walk.nodes[n].object).make()
                self.own.add(id(made))
                walk.nodes.replace(n, made)
            walk.put_together()
        walk.roots = walk.values_of(walk.graph.roots)
        self.roots[:] = walk.roots[: len(self.roots)]
        self.detached = walk.roots[len(self.roots) :]

    def begin_change(self, change: Change) -> None:
        self._pending = _PendingChange(change, self.walk)
        self._finish_change()

    def add_leaf(self, number: int, value: Any) -> None:
        assert self._pending is not None
        self._pending.add_leaf(number, writable(value))
        self._finish_change()

    def _finish_change(self) -> None:
        pending = self._pending
        assert pending is not None
        if pending.missing:
            return
        self._pending = None
        with self.frozen.written():
            pending.make()
        self.roots[:], self.detached = pending.roots()
        self.added = pending.nodes
        self._walk = Walk(self.everything())


class _PendingChange:
    """A change of the structure that waits for the arrays that it adds.

    Attributes:
      nodes: the objects after the change, by their numbers.
      missing: the numbers of the arrays that it waits for.
    """

    def __init__(self, change: Change, before: Walk) -> None:
        self._change = change
        self.nodes = [
            blank.make() if i is None else before.nodes[i].object
            for i, blank in zip(change.objects, change.blanks, strict=True)
        ]
        self._leaves = [None if i is None else before.leaves[i] for i in change.leaves]
        self.missing = {j for j, i in enumerate(change.leaves) if i is None}

    def add_leaf(self, number: int, value: Any) -> None:
        self._leaves[number] = value
        self.missing.discard(number)

    def make(self) -> None:
        """Makes the objects what they are after the change."""
        pairs = list(zip(self.nodes, self._change.parts, strict=True))
        for x, part in sorted(pairs, key=lambda pair: pair[1].hashes):
            keys = self._values(part.key_entries) if part.key_entries else part.keys
            fill(x, part.names, keys, self._values(part.entries))

    def roots(self) -> tuple[list[Any], list[Any]]:
        """Those of the program, and the objects that are detached."""
        made, n = self._values(self._change.after.roots), self._change.roots
        return made[:n], made[n:]

    def _values(self, entries: Sequence[Entry]) -> list[Any]:
        leaf, node = self._leaves.__getitem__, self.nodes.__getitem__
        return [value_of(e, leaf, node) for e in entries]


# -- In-place arrays -------------------------------------------------------------------------


def writable(value: Any) -> Any:
    """An array, as one that can be written where an in-place function runs."""
    if activation() is None or isinstance(value, Writable) or not is_array(value):
        return value
    return fresh(snapshot(_jax.canonicalize(value)))


@contextmanager
def all_writable(inside: Any) -> Iterator[None]:
    """In an in-place function, which is called ``inside`` another one or None, the arrays of the
    objects can be written."""
    made: dict[int, Any] = {}  # so that what is not written stays what it was

    def box(x: Any) -> Any:
        boxed = writable(x)
        if boxed is not x:
            made[id(boxed)] = boxed, boxed._own_buffer().state(), x
        return boxed

    def unbox(x: Any) -> Any:
        boxed, state, original = made.get(id(x), (None, None, None))
        return original if boxed is x and x._own_buffer().state() == state else snapshot(x)

    here = sessions()
    for session in here:
        session.map_leaves(box)
    try:
        yield
    finally:
        if inside is None:
            for session in here:
                session.map_leaves(unbox)


def is_object(x: Any) -> bool:
    """Whether ``x`` is an object of an open session."""
    return kind_of(x) is NODE and any(s.refresh().number_of(x) is not None for s in sessions())


# -- Cells -----------------------------------------------------------------------------------


class _LeafCell:
    """The value of an array, which is in the objects."""

    __slots__ = ("address", "session")

    def __init__(self, session: Session, address: LeafAddress) -> None:
        self.session = session
        self.address = address

    @property
    def value(self) -> Any:
        return self.session.get(self.address.number)

    @value.setter
    def value(self, value: Any) -> None:
        session, renewed = self.session, self.address.renewed_objects
        if renewed and session.renewed is not renewed:
            session.renew(renewed)
        session.set(self.address.number, value)


class _ChangeCell:
    """What is written when the structure of the objects changes."""

    __slots__ = ("address", "session")

    def __init__(self, session: Session, address: Any) -> None:
        self.session = session
        self.address = address

    @property
    def value(self) -> Any:
        raise structure_changed(self.address.label)

    @value.setter
    def value(self, value: Any) -> None:
        if isinstance(self.address, Shape):
            self.session.begin_change(self.address.change)
        else:
            self.session.add_leaf(self.address.number, value)


# -- The sessions of a thread ----------------------------------------------------------------


class _Publishes(threading.local):
    """What the signature of a session says, which is part of the keys of JAX's caches.

    Attributes:
      graphs: whether it says the structure of the objects.
      jax_only: whether a function is traced that calls none of the program.
      function: what is traced next.
      by_value: how many of the calls in progress hand back objects by value.
      copies_for: a jitted function that is called with copies of objects, since its jaxpr is wanted
        and no call is made.
    """

    graphs = False
    jax_only = False
    function: Any = None
    by_value = 0
    copies_for: Any = None

    @property
    def way_of_objects(self) -> tuple[int, bool]:
        return self.by_value, self.copies_for is not None


publishes = _Publishes()


def closed_over(function: Any, session: Session) -> tuple[int, ...]:
    """The numbers of the objects that a function has in its closure, as it is now: a name in it may
    be that of another object when the function is called again."""
    found = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            x = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
        for part in x if type(x) in (list, tuple) and len(x) < 20 else (x,):
            number = session.walk.number_of(part)
            if number is not None:
                found.append(number)
    return tuple(found)


def sessions() -> list[Session]:
    """The open sessions of this thread, outermost first."""
    return [h for h in slots.stack() if type(h) is Session]
