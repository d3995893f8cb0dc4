"""What happens to the objects of a session where a trace begins, and where it ends.

A frame is one such place that the program is in. There are two kinds:

* One that *stages*: a jaxpr is built, or a function with a custom rule is given its state as
  operands. At its beginning every array in the objects is replaced by an `Entry`. At its end the
  objects are compared with what they were: another array is a write to a slot, another structure a
  write to a `Shape`. Then everything is put back: the objects are what the trace outside sees, and
  change when the jaxpr is bound and its writes are made.
* One of a derivative or a vmap. The objects keep what is assigned; at the end, what belongs to the
  trace becomes what is left of it outside: the primal, or the value of all lanes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.arrays.array import Writable, snapshot
from jaxstate._src.core.capture import nowhere
from jaxstate._src.core.notes import notes_of
from jaxstate._src.core.slots import Holder
from jaxstate._src.tree import problems
from jaxstate._src.tree.addresses import FLAG, Change, LeafAddress, NewLeaf, Shape
from jaxstate._src.tree.entry import Entry
from jaxstate._src.tree.equations import Equations
from jaxstate._src.tree.graph import TraceNote
from jaxstate._src.tree.holding import is_held, is_reached
from jaxstate._src.tree.session import Session, publishes
from jaxstate._src.tree.walk import Walk, first_difference, fitted

# What JAX traces to run it once where it is called. Others are loops and branches.
_ONCE = {
    "jit", "checkpoint / remat", "remat", "checkpoint", "closure_convert", "make_jaxpr",
    "custom_jvp fun", "custom_vjp fun",
}  # fmt: skip

# Functions that get objects that are operands by reference. All others get copies.
_BY_REFERENCE = {
    "jit", "checkpoint / remat", "remat", "checkpoint", "scan", "while_body", "while_cond",
    "fori_loop", "cond", "switch",
}  # fmt: skip
_LOOPS = {"scan", "while_body", "while_cond", "fori_loop"}


class Frame:
    """A place that the program is in, and where the objects have to be put right at the end.

    Attributes:
      rule: the holder that gives a function its state, if it is one with a custom rule or one that
        devices run. It is asked, and told, instead of the jaxpr.
      function: what is traced, if this is a jaxpr.
      walk: the objects at the beginning.
      entries: what was put in the place of the arrays then.
      frozen: the objects that may not be assigned to, as the program outside was given them.
      writes: what the function has written, for the rule.
    """

    def __init__(self, session: Session, trace_: Any, rule: Holder | None = None) -> None:
        self.session = session
        self.trace = trace_
        self.rule = rule
        self.function = publishes.function
        self.stages = rule is not None or isinstance(trace_, _jax.StagingTrace)
        self.roots = list(session.roots)
        self.called = session.called
        self.walk = walk = session.refresh()
        self.detached = list(session.detached)
        if not walk.graph.has_structure_of(session.graph):
            raise problems.another_structure("the tree")
        self._positions = walk.positions()
        self._equations = Equations(trace_, walk)
        self._numbers: dict[int, int] | None = None
        self._copies = len(session.copies)
        self.writes: list[Any] = []
        self._addresses: dict[int, LeafAddress] = {}
        if self.stages and rule is None:
            notes_of(trace_)
        self.entries: list[Any] = walk.leaves
        if self.stages:
            self.entries = [
                x if isinstance(x, Writable) else Entry(self, i, aval)
                for i, (x, aval) in enumerate(zip(walk.leaves, walk.avals, strict=True))
            ]
        session.walk = walk.with_leaves(list(self.entries), put=self.stages)
        session.roots[:] = session.walk.roots[: len(self.roots)]
        self.renew_notes()
        self.frozen = list(session.frozen)
        session.frozen.accept()

    def looks(self) -> tuple[Walk | None, ...]:
        return self.walk, self.called

    def renew_notes(self) -> None:
        """What objects note about the trace that they are used in is about this one from now on."""
        for n, place in self.walk.notes:
            node = self.session.walk.nodes[n]
            node.values[place] = type(node.values[place])()
            node.put(place, node.values[place])

    # -- Reads -------------------------------------------------------------------------------

    def address(self, number: int, renewed: tuple[int, ...] = ()) -> LeafAddress:
        """The slot of an array that was there at the beginning."""
        if renewed:
            return LeafAddress(self.session.level, self.walk.graph, number, renewed)
        found = self._addresses.get(number)
        if found is None:
            found = LeafAddress(self.session.level, self.walk.graph, number)
            self._addresses[number] = found
        return found

    def read(self, number: int) -> Any:
        """What an array was at the beginning, for the trace of this frame."""
        if self.is_finished():
            raise problems.read_before(self.walk.graph.label(number))
        if self.rule is not None:
            with self._as_it_was():
                value = self.rule.cell(self.address(number)).value
                return fitted(value, self.walk.avals[number])
        return self._equations.read(number, self.address)

    def number_of(self, leaf: Any) -> int | None:
        """The number of an array that was there at the beginning."""
        if self._numbers is None:
            self._numbers = {id(entry): i for i, entry in enumerate(self.entries)}
        return self._numbers.get(id(leaf))

    def is_finished(self) -> bool:
        """Whether there is nothing to read any more. (A jaxpr is under construction for a little
        longer than its function runs.)"""
        return not self.entries if self.rule is not None else _jax.is_finished(self.trace)

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        before, self.session.reading = self.session.reading, self.walk
        try:
            yield
        finally:
            self.session.reading = before

    # -- The end -----------------------------------------------------------------------------

    def leave(self, failed: bool) -> None:
        try:
            if failed:
                self.restore()
                return
            replaced: list[int] = []
            try:
                self.session.frozen.check()
                for copy in self.session.copies[self._copies :]:
                    copy.check()
                if self.builds_jaxpr:
                    self._check_iterators()
                if self.stages:
                    replaced = self._write()
                    self._equations.add(self.address)
                else:
                    self._lower()
                    self.session.frozen.accept()
            except BaseException:
                self.restore()
                raise
            if self.stages:
                self.restore()
            for address, value in self.writes:  # which may be to the objects, as they are outside
                self.rule.cell(address).value = value  # type: ignore[union-attr]
            for n in replaced:
                if is_reached(self, n) if self.is_loop else is_held(self, n):
                    raise problems.held_outside(self.walk.graph.label_of_node(n))
        finally:
            self._equations.end()
            self.session.called, self.session.added = self.called, []
            self.writes, self.function = [], None
            del self.session.copies[self._copies :]
            if self.stages:
                self.entries = []  # or they would keep each other alive

    def restore(self) -> None:
        """Makes the objects what they were at the beginning."""
        session = self.session
        session.roots[:] = self.roots
        session.detached = self.detached
        session.frozen[:] = self.frozen
        for node in self.walk.nodes:
            node.fill(node.values)
        session.walk = self.walk if session.base else None

    def _check_iterators(self) -> None:
        found = zip(self.walk.iterators, self._positions, self.walk.positions(), strict=True)
        for (n, place, _), before, after in found:
            if before != after:
                raise problems.advanced(self.walk.label_of_part(n, place))

    def _write(self) -> list[int]:
        """Writes what has changed. Returns which objects were replaced by others like them."""
        session, entries = self.session, self.entries
        runs_once = self.runs_once
        before = self.walk
        after = session.walk
        if not after.is_current([*session.roots, *self.detached]):
            after = Walk([*session.roots, *self.detached], after)
            if runs_once:  # the program may hold what is no longer part of the tree
                lost = [n.object for n in before.nodes if after.number_of(n.object) is None]
                if lost:
                    after = Walk([*session.roots, *self.detached, *lost], after)
        self._read_replaced(after)
        pairs = list(zip(before.nodes, after.nodes, strict=False))
        replaced = [n for n, (a, b) in enumerate(pairs) if a.object is not b.object]
        if after.graph.has_structure_of(before.graph) and not (replaced and runs_once):
            changed = [i for i, e in enumerate(entries) if e is not after.leaves[i]]
            renewed = tuple(replaced)
            for i in changed or range(bool(renewed and entries)):
                self._write_leaf(after, i, renewed)
            return replaced
        if not runs_once:
            raise problems.structure_changed(first_difference(before, after))
        self._write_change(after)
        return []

    def _read_replaced(self, after: Walk) -> None:
        """What the program has read, and keeps, is what was there before anything is written."""
        n = len(after.leaves)
        for i in range(len(self.entries)):
            is_there = i < n and after.leaves[i] is self.entries[i]
            if not is_there and sys.getrefcount(self.entries[i]) > 2:
                _jax.canonicalize(self.entries[i])

    def _write_leaf(self, after: Walk, i: int, renewed: tuple[int, ...]) -> None:
        aval = self.walk.avals[i]
        value = after.leaves[i]
        if type(value) not in _jax.plain_arrays or value.aval is not aval:
            value = _jax.canonicalize(fitted(value, aval))
            if not _jax.same_type(value, aval):
                raise problems.type_changed(after.graph.label(i), value, aval)
        if isinstance(self.entries[i], Writable) and not self.runs_once:
            self.entries[i][...] = value  # the next turn reads it there
            return
        self._stage(self.address(i, renewed), value)

    def _write_change(self, after: Walk) -> None:
        level = self.session.level
        change = Change(self.walk, self.entries, after, len(self.session.roots))
        self._stage(Shape(level, change), FLAG)
        for j, i in enumerate(change.leaves):
            if i is None:
                value = _jax.canonicalize(fitted(after.leaves[j], after.avals[j]))
                self._stage(NewLeaf(level, change, j), value)

    def _stage(self, address: Any, value: Any) -> None:
        if self.rule is not None:
            self.writes.append((address, value))
            return
        self._equations.written[address] = value

    @property
    def runs_once(self) -> bool:
        return self.rule is None and _jax.traced_for(self.trace) in _ONCE

    @property
    def hands_copies(self) -> bool:
        """Whether the function gets copies of objects that are operands, and no references."""
        if self.rule is not None:
            return True
        if not self.stages:
            return False
        is_apart = self.function is not None and self.function is publishes.copies_for
        return is_apart or _jax.traced_for(self.trace) not in _BY_REFERENCE

    @property
    def has_other_arrays(self) -> bool:
        """Whether the arrays in copies of objects are others than in the objects."""
        return self.stages or isinstance(self.trace, _jax.PartialTrace)

    @property
    def is_loop(self) -> bool:
        return self.rule is None and _jax.traced_for(self.trace) in _LOOPS

    @property
    def builds_jaxpr(self) -> bool:
        return self.rule is None and isinstance(self.trace, _jax.StagingTrace)

    def _lower(self) -> None:
        session = self.session
        for n, place in self.walk.notes:
            node = self.walk.nodes[n]
            entry = node.entries[place]
            assert type(entry[1]) is TraceNote
            node.put(place, node.values[place])
        session.detached = self.detached  # what was made inside ends here
        walk = session.refresh()
        for i, leaf in enumerate(walk.leaves):
            x = snapshot(leaf)
            if isinstance(x, _jax.Tracer) and x._trace is not nowhere and self._owns(x):
                value = self._lowered(walk.graph.label(i), x)
                with _jax.set_current_trace(_jax.parent_of(self.trace)):
                    session.set(i, value)

    def _owns(self, x: Any) -> bool:
        return x._trace is self.trace or (
            getattr(self.trace, "tag", None) is not None
            and getattr(x._trace, "tag", None) is self.trace.tag
        )

    def _lowered(self, label: str, x: Any) -> Any:
        if not isinstance(self.trace, _jax.BatchTrace):
            return x.primal
        value, batch_dim = _jax.lane_value(self.trace, x)
        if batch_dim is not None:
            lanes = _jax.lane_count(self.trace)
            raise problems.lanes_differ(label, self.session.made, lanes)
        return value
