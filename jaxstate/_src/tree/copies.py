"""Copies of objects, which JAX makes when it calls a function with them.

A derivative, a vmap, a function with a rule of its own, one that devices run or that is converted:
these get arguments that JAX puts together of other arrays. What a function assigns to such a copy
would be lost, unless it returns the copy.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxstate._src import _jax
from jaxstate._src.tree import problems
from jaxstate._src.tree.entry import Entry
from jaxstate._src.tree.graph import LEAF
from jaxstate._src.tree.node import Node
from jaxstate._src.tree.session import Session, sessions
from jaxstate._src.tree.walk import Walk


class Copy(NamedTuple):
    """One copy.

    Attributes:
      call: the frame of Python of the function of JAX that calls the function with it.
      label: how the program gets to the object.
      node: the copy, as it was when the function was called.
    """

    call: Any
    label: str
    node: Node

    def check(self) -> None:
        part = self.node.changed_part()
        if part is not None:
            raise problems.copy_written(self.label + part)


def note_arguments(session: Session, arguments: Any, call: Any) -> None:
    """JAX calls a function with these arguments. Copies of objects among them are noted."""
    frame = session.frames[-1] if session.frames else None
    if frame is not None and frame.stages and not frame.hands_copies:
        return
    found = Walk([arguments])
    if not any(node.with_leaves for node in found.nodes):
        return
    walk = session.refresh()
    nodes = [n for n in found.nodes if n.with_leaves and not walk.find(n.object)]
    if call is not None and _jax.runs_backward(call):
        nodes = [n for n in nodes if type(n.object) in session.residuals]
    classes = {type(n.object) for n in nodes}
    known = [
        (walk.graph.label_of_node(i), n)
        for i, n in reversed(list(enumerate(walk.nodes)))  # the first counts, if some are alike
        if n.with_leaves and type(n.object) in classes
    ]
    labels = {_contents(walk, n): label for label, n in known}
    if frame is not None and frame.has_other_arrays:
        labels |= {_structure(n): label for label, n in known}
    copies = []
    for n in nodes:
        label = labels.get(_contents(found, n)) or labels.get(_structure(n))
        if label is not None:
            copies.append(Copy(call, label, n))
    session.copies += copies
    if frame is None or not frame.stages:  # functions that are traced inside may use them
        session.detached = [*session.detached, *[c.node.object for c in copies]]


def note_result(session: Session, result: tuple[Any, ...], call: Any) -> None:
    """A function that was called with copies has returned."""
    if result[1] is not None:  # residuals, which a backward rule is called with
        walk = session.refresh()
        session.residuals.update(
            type(n.object) for n in Walk([result[1]]).nodes if walk.find(n.object)
        )
    copies = [c for c in session.copies if c.call is call]
    if not copies:
        return
    session.copies = [c for c in session.copies if c.call is not call]
    ids = {id(c.node.object) for c in copies}
    session.detached = [x for x in session.detached if id(x) not in ids]
    returned = Walk([result])
    for copy in copies:
        if not returned.find(copy.node.object):
            copy.check()


class Checked:
    """A function that runs on the host, and gets copies of objects there.

    Attributes:
      labels: for each object among the arguments, how the program gets to it, or None if it is not
        one of a session.
    """

    def __init__(self, function: Any, labels: tuple[str | None, ...]) -> None:
        self.function, self.labels = function, labels
        self.__name__ = getattr(function, "__name__", type(function).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        nodes = Walk([args, kwargs]).nodes
        result = self.function(*args, **kwargs)
        if len(nodes) == len(self.labels):
            for label, node in zip(self.labels, nodes, strict=True):
                if label is not None:
                    Copy(None, label, node).check()
        return result

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Checked) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> Any:
        return self.function, self.labels


def checked(function: Any, arguments: Any) -> Any:
    """A function that is going to be called on the host, which raises if it assigns to copies."""
    here = [session.refresh() for session in sessions()]
    if not here:
        return function
    found = [
        next(
            (w.graph.label_of_node(n) for w in here if (n := w.number_of(node.object)) is not None),
            None,
        )
        for node in Walk(arguments).nodes
    ]
    return Checked(function, tuple(found)) if any(found) else function


def _contents(walk: Walk, node: Node) -> Any:
    """What an object and a copy of it have in common: the class, and the arrays it is made of."""
    leaves = [e[1] for e in node.entries if e[0] is LEAF]
    contents = [_jax.content(walk.leaves[i]) for i in leaves]
    contents = [x.value_if_used() if isinstance(x, Entry) else x for x in contents]
    return type(node.object), frozenset(map(id, contents))  # (JAX puts dicts in another order)


def _structure(node: Node) -> Any:
    """The same where the arrays are operands: all but the sizes of these, since devices have parts
    of them."""
    leaves, structure = jax.tree.flatten(node.object)
    types = [_jax.type_of(x) for x in leaves]
    return structure, tuple((getattr(t, "ndim", None), getattr(t, "dtype", None)) for t in types)
