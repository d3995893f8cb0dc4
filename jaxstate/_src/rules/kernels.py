"""Functions that become a kernel: the computation of a reduction, Pallas, custom_partitioning.

How often such a function runs, and in which order, is not defined, and it takes no further
operands. So state from outside of it is refused where the function uses it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core import slots
from jaxstate._src.core.slots import Address, Holder
from jaxstate.errors import UnsupportedPrimitiveError, message


class _NoState(Holder):
    """Answers for all state from outside of a kernel: with an error."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def knows(self, address: Address) -> bool:
        owner = address.own_holder and address.own_holder()
        if owner is not None and owner.age > self.age:
            return False
        raise UnsupportedPrimitiveError(
            message(
                f"{address} is used inside {self.kind}, which is a kernel: how often it runs, and"
                " in which order, is not defined.",
                fix="""
                k = jaxstate.next_key()      # outside, and pass what is made of it as an operand
                """,
                used=_jax.user_location(),
            )
        )


@_jax.wrap_kernels
def _without_state(kind: str, trace: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(trace)
    def trace_kernel(*args: Any, **kwargs: Any) -> Any:
        if not slots.any_known():
            return trace(*args, **kwargs)
        args, kwargs = jax.tree.map(_jax.resolved, (args, kwargs))
        with slots.open_holder(_NoState(kind)):
            return trace(*args, **kwargs)

    return trace_kernel


slots.on_open.append(_jax.LATER.look)
