"""Whether the program holds an object that a loop or a branch has replaced.

It would be another object from the second turn on. What the objects refer to themselves, and what
is known of them here, does not count.
"""

from __future__ import annotations

import gc
import sys
import types
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.tree.graph import mentions
from jaxstate._src.tree.objects import MADE
from jaxstate._src.tree.walk import Walk


def is_reached(frame: Any, n: int) -> bool:
    """Whether the function that was traced has an object, and not from the objects."""
    x = frame.walk.nodes[n].object
    return any(y is x for y in _reached(frame.function, frame.walk))


def is_held(frame: Any, n: int) -> bool:
    """Whether anything but the objects, and what is known of them here, refers to an object."""
    x = frame.walk.nodes[n].object
    sessions = list(frame.session.family())
    frames = [frame, *(f for session in sessions for f in session.frames)]
    looks = _each_once(look for y in (*sessions, *frames) for look in y.looks() if look)
    nodes = [node for look in looks for node in look.nodes]
    nodes += [node for y in (*sessions, *frames) for _, node in y.frozen]
    nodes = _each_once(nodes)
    known = 2  # the argument and the variable
    known += sum(node.object is x for node in nodes)
    known += sum(value is x for node in nodes for value in node.values)
    known += sum(root is x for look in looks for root in look.roots)
    known += sum(added is x for session in sessions for added in session.added)
    tuples: set[int] = set()
    for node in frame.walk.nodes:
        for value, entry in zip(node.values, node.entries, strict=True):
            known += value is x
            if entry[0] is MADE and mentions(entry, n):
                known += _count(value, x, tuples)
    known += sum(r is x for r in frame.roots) * 2
    return sys.getrefcount(x) > known


def _each_once(things: Iterable[Any]) -> list[Any]:
    return list({id(x): x for x in things}.values())


_OPAQUE = (type, types.ModuleType, types.BuiltinFunctionType, jax.Array, _jax.Tracer, str)


def _reached(function: Any, walk: Walk) -> Iterator[Any]:
    """What a function has in its closure, its defaults and its globals, but for what it has through
    the objects."""
    todo, seen = [function], {id(walk), id(walk.nodes)}
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, _OPAQUE):
            continue
        seen.add(id(x))
        yield x
        if walk.number_of(x) is not None:
            continue
        if isinstance(x, weakref.ref):
            todo.append(x())
        if not isinstance(x, types.FunctionType):
            todo += gc.get_referents(x)
            continue
        names = (n for n in x.__code__.co_names if n in x.__globals__)
        todo += (x.__closure__, x.__defaults__, x.__kwdefaults__, x.__dict__)
        todo += (x.__globals__[n] for n in names if not callable(x.__globals__[n]))


def _count(value: Any, x: Any, seen: set[int]) -> int:
    """How often an object is in a tuple, and in the tuples in it."""
    if not isinstance(value, tuple) or id(value) in seen:
        return 0
    seen.add(id(value))
    return sum((part is x) + _count(part, x, seen) for part in value)
