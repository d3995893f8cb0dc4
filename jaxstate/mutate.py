"""`mutate`: functions that assign to the parts of an object, made pure.

    def accumulate(metrics, loss):
        metrics.total += loss
        metrics.count += 1

    _, metrics = jaxstate.mutate(accumulate)(metrics, loss)      # a new object

1. The tree is copied, and the copy gets a *shadow* (`jaxstate.shadows`): the arrays are slots.
2. The function runs on the shadow. What it assigns, it writes to slots, from inside loops,
   branches and other transformations too.
3. The new tree is made of what the slots hold, by the class's own way of making objects from
   leaves: whatever the class ensures there holds for the new tree.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax

from jaxstate import _compat
from jaxstate.leaves import Leaves
from jaxstate.records import shadow_of
from jaxstate.shadows import plain, raw
from jaxstate.slots import open_holder, signature_changed

__all__ = ["mutate"]


def mutate(fn: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """Makes a pure function out of one that assigns to its first argument.

    Args:
      fn: called as ``fn(tree, *args, **kwargs)``; may assign to the attributes and items of
        ``tree`` and of its parts, call its methods, add and remove items. A method that is bound
        to an object has that object as its tree, and is called with the other arguments only.

    Returns:
      A function of ``(tree, *args, **kwargs)`` that returns ``(out, new_tree)``: what ``fn``
      returns, and the tree as ``fn`` leaves it. ``tree`` is any pytree with parts: dicts, lists,
      named tuples, dataclasses (frozen too) and other registered classes. It never changes.

    Raises:
      TypeError: if the tree has no parts.
      StructureChangeError: if ``fn`` adds or removes parts inside a loop, branch or jitted
        function.
      SlotTypeError: if ``fn`` changes the shape or dtype of an array there.
      LaneWriteError: if lanes of a vmap inside ``fn`` assign different values.
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
    owner, function = _owner(fn), fn
    if owner is not None:
        function = fn.__func__  # type: ignore[attr-defined]
    elif _owner(getattr(fn, "__wrapped__", None)) is not None:
        raise TypeError(
            f"mutate cannot see the object that {fn!r} is a method of.\n"
            "To mend it:\n    jax.jit(jaxstate.mutate(obj.method))"
        )

    @functools.wraps(fn)
    def mutated(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        tree, *rest = args if owner is None else (owner, *args)
        return _run(function, tree, rest, kwargs)

    return mutated


def _owner(fn: Any) -> Any:
    """The object that ``fn`` is a method of, if that is a pytree."""
    owner = getattr(fn, "__self__", None)
    if owner is None or not hasattr(fn, "__func__") or inspect.isclass(owner):
        return None
    return None if _compat.children_of(owner) is None else owner


def _run(function: Any, tree: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    tree = plain(tree)
    if tree is None or _compat.children_of(tree) is None:
        raise TypeError(
            f"mutate wants a tree with parts that can be assigned to, and was given {tree!r}.\n"
            'To mend it:\n    out, new = jaxstate.mutate(fn)({"value": value})'
        )
    leaves, structure = jax.tree.flatten(tree)
    holder = Leaves(_hashable(structure), _compat.user_location())
    with open_holder(holder):
        try:
            shadow = shadow_of(structure.unflatten(leaves), holder, "tree")
            holder.remember_originals(leaves, jax.tree.leaves(raw(shadow, lambda leaf: leaf)))
            signature_changed()
            out = plain(function(shadow, *args, **kwargs))
            new = raw(shadow, holder.result)
        finally:
            holder.close()
    leaves, structure = jax.tree.flatten(new)
    return out, structure.unflatten(leaves)


def _hashable(structure: Any) -> Any:
    """The structure, or something that equals nothing else if its static parts have no hash."""
    try:
        hash(structure)
    except TypeError:
        return object()
    return structure
