"""`jit(f).lower(...)`: state from outside is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.contents import state_of
from jaxstate.errors import AheadOfTimeError, message

__all__ = []


@_jax.wrap_ahead_of_time
def _refuse_state_from_outside(jaxpr: Any, constants: Sequence[Any]) -> None:
    """What is compiled ahead of time is called without JAX's Python: none could pass the state."""
    reads, writes = state_of(jaxpr)
    captures = [c.address for c in constants if isinstance(c, StateTracer)]
    used = [*writes, *reads, *captures]
    if used:
        raise AheadOfTimeError(
            message(
                f"A function that uses {used[0]} was compiled ahead of time, and that state is"
                " open outside of it: the compiled function has nowhere to take it from when it"
                " is called.",
                fix="""
                def g(key, x):
                    with jaxstate.rng_stream(key):        # open the state inside,
                        return f(x)
                jax.jit(g).lower(key, x).compile()        # (net.apply does so), pass what it needs
                """,
                used=_jax.user_location(),
            )
        )
