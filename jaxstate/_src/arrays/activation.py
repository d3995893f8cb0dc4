"""When arrays are writable: while an in-place function runs on this thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core import slots
from jaxstate._src.core.slots import Address, Holder
from jaxstate.errors import ClosedStateError, message

__all__ = ["Activation", "activated", "activation", "first_use", "is_array", "quiet", "thread"]


class Activation(Holder):
    """One call of an in-place function, open while it runs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.ended = False

    def knows(self, address: Address) -> bool:
        return False

    def signature(self) -> Any:
        """Inside, JAX traces again what it has traced outside: ``x += y`` means something else."""
        return Activation

    def escaped(self) -> Exception:
        return ClosedStateError(
            message(
                f"A writable array of the in-place function {self.name!r} is used after the"
                " function has ended.",
                fix="""
                return x                    # a result of the function is an ordinary array
                x = jaxstate.array(x)       # or make it outside, where it is used
                """,
                used=_jax.user_location(),
            )
        )


class _ThreadState(threading.local):
    def __init__(self) -> None:
        self.activations: list[Activation] = []
        self.quiet = 0


thread = _ThreadState()

# What is to be done before there is a writable array: what other parts of jaxstate ask.
first_use: list[Callable[[], None]] = []


def activation() -> Activation | None:
    """The innermost in-place function that runs on this thread."""
    return thread.activations[-1] if thread.activations else None


@contextmanager
def activated(new: Activation) -> Iterator[None]:
    """Runs an in-place function, whose inner functions JAX traces.

    If it called them instead (`jax.disable_jit`), they would write the arrays that they are given,
    and not arrays of their own.
    """
    _jax.IN_PLACE.begin()
    for begin in first_use:
        begin()
    thread.activations.append(new)
    tracing = jax.disable_jit(False) if _jax.jit_is_disabled() else nullcontext()
    try:
        with slots.open_holder(new), tracing:
            yield
    finally:
        thread.activations.remove(new)
        new.ended = True
        _jax.IN_PLACE.end()


@contextmanager
def quiet() -> Iterator[None]:
    """For work on the values themselves, which makes no arrays that a program could hold."""
    thread.quiet += 1
    try:
        here = _jax.current_trace()
        while getattr(here, "makes_writable", False):
            here = here.parent_trace
        with _jax.set_current_trace(here):
            yield
    finally:
        thread.quiet -= 1


def is_array(value: Any) -> bool:
    return isinstance(value, jax.Array) and isinstance(_jax.typeof(value), _jax.ShapedArray)
