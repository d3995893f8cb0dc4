"""The errors of `mutate`."""

from __future__ import annotations

from typing import Any

from jaxstate._src import _jax
from jaxstate.errors import (
    ClosedStateError,
    CopyWriteError,
    FrozenPartError,
    LaneWriteError,
    SlotTypeError,
    StructureChangeError,
    message,
)


def structure_changed(label: str) -> Exception:
    return StructureChangeError(
        message(
            f"The structure of {label} was changed inside a loop or a branch, which has to leave it"
            " one structure.",
            fix="""
            tree.part = value       # before the loop
            """,
            used=_jax.user_location(),
        )
    )


def advanced(label: str) -> Exception:
    return StructureChangeError(
        message(
            f"{label} is an iterator of Python, and was advanced inside a loop, a branch or a"
            " jitted function, which Python runs once, when it is traced.",
            fix="""
            x = next(tree.part)     # before, and outside of it
            """,
            used=_jax.user_location(),
        )
    )


def hidden(label: str, cls: type) -> Exception:
    return TypeError(
        f"{label} ({cls.__name__}) leads to an object of the tree, which jaxstate.mutate copies,"
        f" and cannot be made to lead to the copy.\nTo mend it:\n    {label} = None"
        "      # before mutate; and make it in the function"
    )


def held_outside(label: str) -> Exception:
    return ClosedStateError(
        message(
            f"{label} was assigned anew inside a loop or a branch, and the program holds the object"
            " that was there before, which would be another one from the second turn on.",
            fix="""
            before = copy.copy(tree.part)      # a copy, before the loop
            """,
            used=_jax.user_location(),
        )
    )


def type_changed(label: str, value: Any, aval: Any) -> Exception:
    return SlotTypeError(
        message(
            f"{label} has type {aval.str_short()}, and was assigned a value of type"
            f" {_jax.typeof(value).str_short()} inside a loop, a branch or a jitted function,"
            " which has to leave it one type.",
            fix="""
            tree.x = jnp.asarray(value, dtype)
            """,
            used=_jax.user_location(),
        )
    )


def closed(label: str) -> Exception:
    return ClosedStateError(
        message(
            f"{label} is part of the object that a function under jaxstate.mutate was given, and"
            " is used after that function has ended.",
            fix="""
            out, tree = jaxstate.mutate(fn)(tree)      # the new tree: use this
            """,
            used=_jax.user_location(),
        )
    )


def another_structure(label: str) -> Exception:
    return ClosedStateError(
        message(
            f"{label} is used by a function that was traced before (by jax.closure_convert or"
            " jax.make_jaxpr, or to be differentiated), when the tree had another structure.",
            fix="""
            tree.part = value                           # first,
            f, consts = jax.closure_convert(f, x)       # then what traces the function
            """,
            used=_jax.user_location(),
        )
    )


def read_before(label: str) -> Exception:
    return ClosedStateError(
        message(
            f"The value of {label} was read inside a loop, a branch or another transformed"
            " function, and is used after that has ended.",
            fix="""
            return tree.x           # from the body, as a result
            """,
            used=_jax.user_location(),
        )
    )


def tracer_left(label: str, value: Any) -> Exception:
    return ClosedStateError(
        message(
            f"{label} holds a value of a transformed function that has ended"
            f" ({type(value).__name__}): it was put where jaxstate.mutate cannot see it, into an"
            " object of a class that keeps its parts in C, or from another thread.",
            fix="""
            tree.part = value       # an attribute, or an item of a dict, list or deque
            """,
            used=_jax.user_location(),
        )
    )


def held_weakly(cls: type) -> Exception:
    return TypeError(
        f"mutate copies the objects of the tree, and cannot copy a {cls.__name__} of them.\n"
        "To mend it:\n    parent.child = weakref.ref(child)      # a weak reference, or a plain"
        " container"
    )


def frozen_part(label: str) -> Exception:
    return FrozenPartError(
        message(
            f"{label} was assigned, and mutate(deep=False) lets a function assign to the parts of"
            " its tree only, and not to the parts of these.",
            fix="""
            tree.part = dataclasses.replace(tree.part, x=value)     # another part
            jaxstate.mutate(fn)(tree)                               # or parts on all levels
            """,
            used=_jax.user_location(),
        )
    )


def lanes_differ(label: str, made: str, lanes: int) -> Exception:
    return LaneWriteError(
        message(
            f"Lanes of a vmap wrote different values to leaf {label}, which they share.",
            fix="""
            tree.total = values.sum()                     # one value: outside, from all lanes
            jax.vmap(jaxstate.mutate(fn))(trees, xs)      # or a tree per lane
            """,
            made=made,
            used=_jax.user_location(),
            under=f"vmap over {lanes} lanes",
        )
    )


def copy_written(label: str) -> Exception:
    return CopyWriteError(
        message(
            f"{label} was assigned, but the object is a copy that the function was given as an"
            " argument, and does not return: the assignment would be lost.",
            fix="""
            jax.vmap(jaxstate.mutate(fn))(tree)      # a tree per lane,
            jax.grad(lambda w: loss(w, tree))(w)     # or what is assigned to is no argument,
            return part.x + 1                        # or the new value is a result
            """,
            used=_jax.user_location(),
        )
    )
