"""Objects of a session as operands and results: by reference.

A loop, a branch or a jitted function that is called with an object gives its function the object
itself, and hands the object itself back if the function returns it. JAX flattens operands and
results; there an object of a session is a `Reference`, a node without arrays. It stands for the
object with its number in the objects as they were when the function was called.

Results that JAX stacks or puts together of several values (the outputs of a scan, the aux of a
gradient, the results of two branches) are values, and so new objects. Where a loop does not carry
on with the object that it began with, that goes in as a copy; where two branches do not return one
object, they return values. This turns out while they are traced, and then they are traced again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core.registry import in_bind
from jaxstate._src.core.slots import signature_changed
from jaxstate._src.tree import copies
from jaxstate._src.tree.objects import NODE, kind_of
from jaxstate._src.tree.problems import closed
from jaxstate._src.tree.session import Session, is_object, publishes, sessions
from jaxstate._src.tree.walk import Walk


class Reference:
    """An object of a session.

    Attributes:
      level: of the session.
      number: of the object.
      is_new: whether the number is that in the objects after the call.
    """

    __slots__ = ("is_new", "level", "number")

    def __init__(self, level: int, number: int, is_new: bool = False) -> None:
        self.level = level
        self.number = number
        self.is_new = is_new

    def key(self) -> Any:
        return self.level, self.number, self.is_new

    def resolved(self) -> Any:
        """The object, or the reference itself while a call is dispatched."""
        here = sessions()
        if _calls.dispatched_in == _number_of_frames(here):
            _calls.unresolved = True
            return self
        for session in here:
            if session.level == self.level:
                return (
                    session.added[self.number]
                    if self.is_new
                    else session.called.object_of(self.number)  # type: ignore[union-attr]
                )
        raise closed("the tree")


jax.tree_util.register_pytree_node(
    Reference,
    lambda r: ((), r.key()),
    lambda aux, _: Reference(*aux).resolved(),
)


class Copy:
    """An object of a session that goes into a loop by value, since it does not come out again."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


jax.tree_util.register_pytree_node(
    Copy, lambda c: ((c.value,), None), lambda _, children: _noted_copy(children[0])
)


def _noted_copy(value: Any) -> Any:
    """The copy that the body of a loop is given: what it assigns to that would be lost."""
    outside = _calls.stack[-1].frames if _calls.stack else []
    for session in sessions():
        if session.frames and session.frames[-1] not in outside:
            session.copies += [copies.Copy(None, "tree", n) for n in Walk([value]).nodes]
            break
    return value


class _Call:
    """A call of a loop or a branch.

    Attributes:
      name: "scan", "while_loop", "cond" or "switch".
      carry: what a loop begins with, by reference.
      by_value: the paths of the parts of it that go in by value.
      first: the structure of the result of the first branch.
      frames: those that the program was in.
    """

    def __init__(self, name: str, by_value: frozenset[Any] = frozenset()) -> None:
        self.name = name
        self.carry: Any = None
        self.by_value = by_value
        self.first: Any = None
        self.frames = [f for s in sessions() for f in s.frames]


class _Calls(threading.local):
    """What this thread is in the middle of.

    Attributes:
      stack: calls of loops and branches.
      dispatched_in: the number of frames that the program is in, if a jitted function is called
        there by JAX's dispatch, which takes results apart and puts them together.
      unresolved: whether there are references in its results.
    """

    def __init__(self) -> None:
        self.stack: list[_Call] = []
        self.dispatched_in: int | None = None
        self.unresolved = False


_calls = _Calls()


class _Differs(Exception):
    """The carry of a loop, or the result of a branch, is not the object that it was elsewhere."""

    def __init__(self, paths: frozenset[Any]) -> None:
        super().__init__()
        self.paths = paths


Number = Callable[[Any, Any], Any]


def referred(tree: Any, number_of: Number, path: Any = ()) -> Any:
    """A pytree with references in the place of objects of sessions."""
    found = number_of(tree, path)
    if found is not None:
        return found
    pairs = _pairs(tree)
    if pairs is None:
        return tree
    parts = [referred(x, number_of, (*path, key)) for key, x in pairs]
    if all(a is x for a, (_, x) in zip(parts, pairs, strict=True)):
        return tree
    return _like(tree, parts)


def _pairs(tree: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a pytree with their keys; None for a leaf."""
    if type(tree) is dict:
        return list(tree.items())
    children = _jax.children_of(tree)
    return None if children is None else list(enumerate(children))


def _like(tree: Any, parts: list[Any]) -> Any:
    if type(tree) is dict:
        return dict(zip(tree, parts, strict=True))
    return jax.tree.structure(tree, is_leaf=lambda x: x is not tree).unflatten(parts)


def as_copies(tree: Any) -> Any:
    """Objects that a loop goes along: each turn gets parts of their arrays."""

    def copy(x: Any, _: Any) -> Any:
        if isinstance(x, Copy):
            return x
        return Copy(x) if is_object(x) else None

    return referred(tree, copy)


def as_operands(tree: Any, by_value: frozenset[Any] = frozenset()) -> Any:
    """Objects that a function is going to be called with, by reference."""
    here = sessions()
    for session in here:
        session.called = session.refresh()

    def number_of(x: Any, path: Any) -> Any:
        if isinstance(x, (Reference, Copy)):
            return x
        if kind_of(x) is not NODE:
            return None
        for session in here:
            number = session.called.number_of(x)  # type: ignore[union-attr]
            if number is not None:
                return Copy(x) if path in by_value else Reference(session.level, number)
        return None

    return referred(tree, number_of)


def as_results(tree: Any) -> Any:
    """What a function returns, whose frame is the innermost, by reference."""
    here = [(s, s.frames[-1].walk, s.refresh()) for s in sessions() if s.frames]

    def number_of(x: Any, path: Any) -> Any:
        if kind_of(x) is not NODE:
            return None
        for session, before, now in here:
            number = before.number_of(x)
            if number is not None:
                return Reference(session.level, number)
            number = now.number_of(x)
            if number is not None:
                is_new = not now.graph.has_structure_of(before.graph)
                return Reference(session.level, number, is_new)
        return None

    return referred(tree, number_of)


def _as_carry(first: Any, result: Any, path: Any, differs: list[Any]) -> Any:
    """The result of a turn of a loop: by reference where the loop began with that object."""
    if isinstance(first, Copy):
        return Copy(result)
    if isinstance(first, Reference):
        found = as_results(result)
        if not isinstance(found, Reference) or found.key() != first.key():
            differs.append(path)
        return found
    pairs, firsts = _pairs(result), _pairs(first)
    if type(first) is not type(result) or pairs is None or firsts is None:
        return result
    firsts_by_key = dict(firsts)
    if firsts_by_key.keys() != dict(pairs).keys():
        return result
    parts = [_as_carry(firsts_by_key[k], x, (*path, k), differs) for k, x in pairs]
    return _like(result, parts)


def _number_of_frames(here: list[Session]) -> int:
    return sum(len(s.frames) for s in here)


def dispatched(call: Callable[[], Any]) -> Any:
    """The results of a call by JAX's dispatch, which come by reference, as objects."""
    before = _calls.dispatched_in, _calls.unresolved
    _calls.dispatched_in, _calls.unresolved = _number_of_frames(sessions()), False
    try:
        results = call()
        unresolved = _calls.unresolved
    finally:
        _calls.dispatched_in, _calls.unresolved = before
    if not unresolved:
        return results
    return jax.tree.map(
        lambda x: x.resolved() if isinstance(x, Reference) else x,
        results,
        is_leaf=lambda x: isinstance(x, Reference),
    )


# -- Results of traced functions -------------------------------------------------------------

_LOOPS = ("scan", "while_body", "fori_loop")
_BRANCHES = ("cond", "switch")
_OTHERS = ("jit", "checkpoint / remat", "remat", "checkpoint")


def result_of_trace(kind: str, result: Any) -> Any:
    """What a function has returned that JAX traces for ``kind``, as JAX is to see it."""
    if kind in _LOOPS:
        return _result_of_loop(result)
    if publishes.by_value:
        return result
    if kind in _BRANCHES and _calls.stack:
        result, structure = as_results(result), jax.tree.structure(as_results(result))
        call = _calls.stack[-1]
        if call.first is not None and call.first != structure:
            raise _Differs(frozenset())
        call.first = structure
        return result
    return as_results(result) if kind in _OTHERS else result


def _result_of_loop(result: Any) -> Any:
    if not _calls.stack or _calls.stack[-1].carry is None:
        return result
    call = _calls.stack[-1]
    differs: list[Any] = []
    if call.name == "while_loop":
        result = _as_carry(call.carry, result, (), differs)
    elif type(result) is tuple and len(result) == 2:
        result = _as_carry(call.carry, result[0], (), differs), result[1]
    if differs:
        raise _Differs(frozenset(differs))
    return result


# -- Calls of loops and branches -------------------------------------------------------------

_CARRIES = {"scan": (1, "init"), "while_loop": (2, "init_val"), "fori_loop": (3, "init_val")}
_OPERANDS = {"cond": 3, "switch": 2}


def around_control_flow(name: str, plain: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """A call of a loop or of branches, with objects of sessions by reference where that can be."""
    if not sessions() or in_bind():
        return plain(*args, **kwargs)
    if _jax.jit_is_disabled() and name != "scan":
        return plain(*args, **kwargs)  # Python calls the functions with what they are given
    if name in _CARRIES:
        return _loop(name, plain, args, kwargs, frozenset())
    return _branches(name, plain, args, kwargs)


def _loop(name: str, plain: Any, args: Any, kwargs: Any, paths: frozenset[Any]) -> Any:
    place, keyword = _CARRIES[name]
    call = _Call(name, paths)
    if name == "scan" and len(args) > 2:
        args = (*args[:2], as_copies(args[2]), *args[3:])
    elif name == "scan" and "xs" in kwargs:
        kwargs = {**kwargs, "xs": as_copies(kwargs["xs"])}
    if len(args) > place:
        call.carry = as_operands(args[place], paths)
        new_args, new_kwargs = (*args[:place], call.carry, *args[place + 1 :]), kwargs
    elif keyword in kwargs:
        call.carry = as_operands(kwargs[keyword], paths)
        new_args, new_kwargs = args, {**kwargs, keyword: call.carry}
    else:
        return plain(*args, **kwargs)
    try:
        return _run(call, plain, new_args, new_kwargs)
    except _Differs as differs:
        if _calls.stack and _calls.stack[-1].name == "fori_loop":
            raise  # which calls this loop, with what it was given as the last part of the carry
        more = differs.paths
    if name == "fori_loop":
        more = frozenset(path[1:] for path in more)
    return _loop(name, plain, args, kwargs, paths | more)


def _branches(name: str, plain: Any, args: Any, kwargs: Any) -> Any:
    first = _OPERANDS[name]
    args = (*args[:first], *as_operands(args[first:]))
    kwargs = {k: as_operands(v) if k == "operand" else v for k, v in kwargs.items()}
    try:
        return _run(_Call(name), plain, args, kwargs)
    except _Differs:
        pass
    with by_value():
        return _run(_Call(name), plain, args, kwargs)


def _run(call: _Call, plain: Any, args: Any, kwargs: Any) -> Any:
    _calls.stack.append(call)
    try:
        return plain(*args, **kwargs)
    finally:
        _calls.stack.pop()


class by_value:
    """While this is entered, what is called hands objects back by value.

    A function that ``copies_for`` is given gets objects by value too.
    """

    def __init__(self, copies_for: Any = None) -> None:
        self.copies_for = copies_for

    def __enter__(self) -> None:
        publishes.by_value += 1
        self.before, publishes.copies_for = publishes.copies_for, self.copies_for
        signature_changed()

    def __exit__(self, *_: object) -> None:
        publishes.by_value -= 1
        publishes.copies_for = self.before
        signature_changed()
