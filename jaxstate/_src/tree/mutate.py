"""`mutate`: functions that assign to the parts of an object, made pure.

    def accumulate(metrics, loss):
        metrics.total += loss
        metrics.count += 1

    _, metrics = jaxstate.mutate(accumulate)(metrics, loss)      # a new object

1. The objects are copied: real objects of their classes, with the same arrays.
2. The function runs on the copy. Where JAX calls functions of the program under a trace, what the
   objects are is compared with what they were (`tree.frames`), so that what was assigned
   in loops, branches and other transformations becomes inputs and outputs of these.
3. The new tree is copied from what the objects are then, and made by the class's own way of making
   objects from leaves: whatever the class ensures there holds for the new tree.
"""

from __future__ import annotations

import functools
import gc
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.arrays.activation import activation
from jaxstate._src.arrays.array import Writable, snapshot
from jaxstate._src.core.slots import open_holder
from jaxstate._src.tree import boundaries, objects, problems
from jaxstate._src.tree.entry import Ended, Entry
from jaxstate._src.tree.frozen import permit_assignments
from jaxstate._src.tree.graph import LEAF, mentions, statics, value_of
from jaxstate._src.tree.objects import NODE, STATIC, kind_of, parts_of
from jaxstate._src.tree.session import Session, writable
from jaxstate._src.tree.walk import Walk, fitted
from jaxstate.errors import called_as, check_runs_when_called

__all__ = ["mutate"]

P = ParamSpec("P")
R = TypeVar("R")


@called_as("out, tree = jaxstate.mutate(fn)(tree)")
def mutate(fn: Callable[P, R], *, deep: bool = True) -> Callable[P, tuple[R, Any]]:
    """Makes a pure function out of one that assigns to its first argument.

    Args:
      fn: called as ``fn(tree, *args, **kwargs)``; may assign to the attributes and items of
        ``tree`` and of its parts, call its methods, add and remove items. A method that is bound
        to an object has that object as its tree, and is called with the other arguments only.
      deep: if False, ``fn`` may assign to the attributes and items of ``tree`` itself, and not to
        those of its parts.

    Returns:
      A function of ``(tree, *args, **kwargs)`` that returns ``(out, new_tree)``: what ``fn``
      returns, and the tree as ``fn`` leaves it. ``tree`` is a dict, a list, a dataclass (frozen
      too), an object of any other class of the program, or a tuple of such. It never changes.

    Raises:
      TypeError: if ``fn`` is no function, or the tree has no parts.
      StructureChangeError: if ``fn`` adds or removes parts inside a loop or a branch.
      SlotTypeError: if ``fn`` changes the shape or dtype of an array there.
      LaneWriteError: if lanes of a vmap inside ``fn`` assign different values.
      FrozenPartError: if ``fn`` assigns to a part of a part, and not ``deep``.
      CopyWriteError: if ``fn`` assigns to a copy that a transformation has made of the tree.
      ClosedStateError: if what ``fn`` was given is used after it has returned.

    >>> import jax, jax.numpy as jnp, jaxstate
    >>> def count(tree, n):
    ...     def body(i, _):
    ...         tree["total"] += i
    ...     jax.lax.fori_loop(0, n, body, None)
    >>> tree = {"total": jnp.int32(0)}
    >>> _, new = jaxstate.mutate(count)(tree, 4)
    >>> int(new["total"]), int(tree["total"])
    (6, 0)
    """
    check_runs_when_called(fn, "mutate")
    owner, function = _owner(fn), fn
    if owner is not None:
        function = fn.__func__  # type: ignore[attr-defined]
    elif _owner(getattr(fn, "__wrapped__", None)) is not None:
        raise TypeError(
            f"mutate cannot see the object that {fn!r} is a method of.\n"
            "To mend it:\n    jax.jit(jaxstate.mutate(obj.method))"
        )

    @functools.wraps(fn)
    def mutated(*args: P.args, **kwargs: P.kwargs) -> tuple[R, Any]:
        if owner is None and not args:
            raise TypeError(
                "mutate: the tree is the first positional argument, and there is none.\n"
                "To mend it:\n    out, new = jaxstate.mutate(fn)(tree, *args)"
            )
        tree, *rest = args if owner is None else (owner, *args)
        return _run(function, tree, rest, kwargs, deep)

    return mutated


def _owner(fn: Any) -> Any:
    """The object that ``fn`` is a method of, if that can be a tree."""
    owner = getattr(fn, "__self__", None)
    if owner is None or not hasattr(fn, "__func__") or inspect.isclass(owner):
        return None
    return owner if kind_of(owner) is NODE else None


def _run(function: Any, tree: Any, args: Any, kwargs: Any, deep: bool) -> tuple[Any, Any]:
    if kind_of(tree) is STATIC:
        raise TypeError(
            f"mutate wants a tree with parts that can be assigned to, and was given {tree!r}.\n"
            'To mend it:\n    out, new = jaxstate.mutate(fn)({"value": value})'
        )
    with boundaries.hooks():
        return _run_on_copies(function, tree, args, kwargs, deep)


def _run_on_copies(function: Any, tree: Any, args: Any, kwargs: Any, deep: bool) -> tuple[Any, Any]:
    given = _Given()
    walk = Walk([tree], tree=True)
    _check_statics(walk)
    session = Session(walk.copied(given.copy), _jax.user_location())
    permit_assignments(session.walk)
    if not deep:
        session.frozen.freeze(session.walk)
    with open_holder(session):
        try:
            out = _called(function, session.roots[0], args, kwargs)
            walk = session.refresh()
            session.frozen.check()
        finally:
            session.is_open = False
    _check_leaves(walk)
    is_tree = walk.is_tree and len(walk.roots) == 1
    tree = walk if is_tree else Walk(session.roots, walk, tree=True)
    copied = tree.copied(given.back)
    new = _remade(copied.roots[0])
    if copied.has_links:
        _link(copied, new)
    out = _without_objects_of(walk, out)
    _end(session, walk)
    return out, new


def _called(function: Any, tree: Any, args: Any, kwargs: Any) -> Any:
    try:
        return function(tree, *args, **kwargs)
    except (AttributeError, TypeError) as error:
        if _is_about_a_tuple(str(error)):
            error.add_note(
                "A tuple cannot be assigned to, in jaxstate.mutate as anywhere.\nTo mend it:\n"
                "    tree.part = tree.part._replace(x=value)     # assign another tuple\n"
                "    tree = [*tree]                              # or use a list"
            )
        raise


def _is_about_a_tuple(text: str) -> bool:
    return "does not support item" in text or text.startswith("can't set attribute")


# -- Copies ----------------------------------------------------------------------------------


class _Given:
    """The arrays of the tree as they were given: what is not assigned comes out as it went in."""

    def __init__(self) -> None:
        self._given: dict[int, tuple[Any, Any]] = {}
        self._of_numpy: dict[int, tuple[Any, Any]] = {}  # an array in two places is one array
        self._is_in_place = activation() is not None

    def copy(self, x: Any, _: Any) -> Any:
        """A program can write into an array of NumPy, or of an in-place function."""
        copied = x
        if self._is_in_place or type(x) not in _jax.plain_arrays:
            if isinstance(x, np.ndarray):
                copied, _ = self._of_numpy.setdefault(id(x), (x.copy(), x))
            else:
                copied = writable(snapshot(x))
        self._given[id(copied)] = copied, x
        return copied

    def back(self, x: Any, aval: Any) -> Any:
        copied, original = self._given.get(id(x), (None, None))
        if copied is None:
            return fitted(x, aval)
        if not isinstance(copied, np.ndarray):
            return copied
        if not np.array_equal(copied, original, equal_nan=_may_be_nan(copied)):
            return copied
        return original


def _may_be_nan(x: Any) -> bool:
    return x.dtype.kind in "fc"


def _remade(tree: Any) -> Any:
    """The tree as its classes make it of leaves."""
    try:
        leaves, structure = jax.tree.flatten(tree)
    except ValueError:
        leaves, structure = jax.tree.flatten(tree, is_leaf=_has_no_order)
        for x in leaves:
            if _has_no_order(x):
                x.update({k: _remade(v) for k, v in x.items()})
    return structure.unflatten(leaves)


def _link(walk: Walk, new: Any) -> None:
    """What leads to the objects of a tree leads to those that their classes have made of them."""
    made: dict[int, Any] = {}
    todo = [(walk.roots[0], new)]
    while todo:
        x, y = todo.pop()
        if x is not y:
            number = walk.number_of(x)
            if number is not None:
                made.setdefault(number, y)
            pairs = zip(_jax.children_of(x) or (), _jax.children_of(y) or (), strict=False)
            todo += [(a, b) for a, b in pairs if type(a) is type(b)]

    def made_of(entry: Any) -> Any:
        return value_of(entry, walk.leaves.__getitem__, node)

    def node(number: int) -> Any:
        return made.get(number, walk.object_of(number))

    for number, old in enumerate(walk.nodes):
        entries = [*old.entries, *(old.key_entries or ())]
        if not any(mentions(entry, n) for entry in entries for n in made):
            continue
        y = made.get(number)
        if y is None:
            keys = [made_of(e) for e in old.key_entries] if old.key_entries else old.keys
            objects.fill(old.object, old.names, keys, [made_of(e) for e in old.entries])
            continue
        children, there = _jax.children_of(old.object) or (), parts_of(y)[0]
        for name, value, entry in zip(old.names, old.values, old.entries, strict=False):
            if name in there and not any(value is child for child in children):
                objects.put_attribute(y, name, made_of(entry))


def _has_no_order(x: Any) -> bool:
    """Whether ``x`` is a dict that is no node for JAX, which cannot sort its keys."""
    if not isinstance(x, dict):
        return False
    try:
        sorted(x)
    except TypeError:
        return True
    return False


# -- The end ---------------------------------------------------------------------------------


def _without_objects_of(walk: Walk, out: Any) -> Any:
    """A result, with copies of the objects that end here."""
    found = Walk([out])
    _check_leaves(found)
    if all(walk.find(node.object) is None for node in found.nodes):
        return out
    return Walk([out], tree=True).copied(lambda x, _: x).roots[0]


def _check_leaves(walk: Walk) -> None:
    """Raises if a tracer is left in the objects that is worth nothing from here on."""
    here = _jax.current_trace()
    for i, x in enumerate(walk.leaves):
        if isinstance(x, _jax.Tracer) and x._trace is not here and _has_ended(x):
            raise problems.tracer_left(walk.graph.label(i), x)
    for number, place, value in _opaque_parts(walk):
        hidden = next((x for x in _inside(value, _jax.Tracer) if _has_ended(x)), None)
        if hidden is not None:
            raise problems.tracer_left(walk.label_of_part(number, place), hidden)


def _check_statics(walk: Walk) -> None:
    """Raises if an object is reached in another way than through parts: the copy would not be."""
    for number, place, value in _opaque_parts(walk):
        if not isinstance(value, _OPAQUE) and any(map(walk.find, _inside(value, object))):
            raise problems.hidden(walk.label_of_part(number, place), type(value))


def _opaque_parts(walk: Walk) -> Iterator[tuple[int, int, Any]]:
    """Where values are which may keep parts where only Python's memory manager sees them."""
    for number, node in enumerate(walk.nodes):
        for place, entry in enumerate(node.entries):
            if entry[0] is not LEAF:
                for value in statics(entry):
                    if gc.is_tracked(value):
                        yield number, place, value


def _has_ended(x: Any) -> bool:
    if isinstance(x, Writable):
        return False  # it says so itself
    if isinstance(x, (Entry, Ended)):
        return not x.is_alive()
    return _jax.has_ended(x) or _jax.is_of_finished_jaxpr(x)


_OPAQUE = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.FrameType)


def _inside(value: Any, kind: type, depth: int = 3) -> Iterator[Any]:
    """What an object holds of a kind where only Python's memory manager sees it."""
    for x in gc.get_referents(value):
        if isinstance(x, kind):
            yield x
        if depth and gc.is_tracked(x) and not isinstance(x, (*_OPAQUE, _jax.Tracer)):
            yield from _inside(x, kind, depth - 1)


def _end(session: Session, walk: Walk) -> None:
    """Takes the arrays out of the copies: the program may have kept them."""
    ended = [Ended(walk.graph, i, aval) for i, aval in enumerate(walk.avals)]
    for node in walk.nodes:
        if node.with_leaves and id(node.object) in session.own:
            node.fill(walk.values_of(node.entries, ended))
    session.walk = None
    session.roots = []
