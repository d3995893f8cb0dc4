"""Uses of a jaxpr: what each makes of what was made inside of it."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.slots import Address

__all__ = [
    "after_uses",
    "begin_use",
    "captured_operands",
    "current_use",
    "end_use",
    "one_use",
    "own_use",
    "recaptured",
]


class _Uses(threading.local):
    def __init__(self) -> None:
        # What each use of a jaxpr made of what was made inside of it, and its captured operands.
        self.stack: list[tuple[dict[Any, Any], dict[int, Address]]] = []


_uses = _Uses()


def current_use() -> dict[Any, Any] | None:
    """What the use of a jaxpr that is being bound makes of what was made inside that jaxpr."""
    return _uses.stack[-1][0] if _uses.stack else None


def captured_operands() -> dict[int, Address]:
    """Which operands of the bind that a rule stands for are captures, and of which slots."""
    return _uses.stack[-1][1] if _uses.stack else {}


def recaptured(operands: Sequence[Any]) -> list[Any]:
    """The operands of the bind in progress with its captures as captures, to be bound again."""
    captured = captured_operands()
    return [
        StateTracer(captured[i], _jax.typeof(x)) if i in captured else x
        for i, x in enumerate(operands)
    ]


def begin_use(operands: Sequence[Any]) -> list[Any]:
    """Begins one use of each jaxpr of an equation, which ends by `end_use` of the result."""
    captured: dict[int, Address] = {}
    if StateTracer in map(type, operands):
        tracers = ((i, x) for i, x in enumerate(operands) if type(x) is StateTracer)
        captured = {i: tracer.address for i, tracer in tracers}
    uses = _uses.stack
    uses.append(({}, captured))
    return uses


# Called when the outermost use of a jaxpr has ended.
after_uses: list[Callable[[], None]] = []


def end_use(uses: list[Any]) -> None:
    uses.pop()
    if not uses:
        for notice in after_uses:
            notice()


@contextmanager
def one_use(use: dict[Any, Any] | None = None) -> Iterator[None]:
    """One use of each jaxpr of an equation that a rule binds; ``use`` if it has begun already."""
    uses = begin_use(())
    if use is not None:
        uses[-1] = use, uses[-1][1]
    try:
        yield
    finally:
        end_use(uses)


def own_use(bind: Callable[..., Any]) -> Callable[..., Any]:
    """A bind with a use of its own, whatever its operands are: also where JAX binds the primitive
    again in the middle of another bind of it, `captured_operands` are its own."""

    @functools.wraps(bind)
    def bound(*args: Any, **params: Any) -> Any:
        uses = begin_use(args)
        try:
            return bind(*args, **params)
        finally:
            end_use(uses)

    return bound
