"""custom_vmap: the function may read state, not write it."""

from __future__ import annotations

from typing import Any

from jaxstate import _compat
from jaxstate.errors import UnsupportedPrimitiveError, message
from jaxstate.thread import register_rule, state_of


@register_rule(_compat.custom_vmap_p)
def _custom_vmap(args: Any, params: dict[str, Any]) -> list[Any]:
    """The user's rule for lanes knows nothing of a state that comes in and goes out."""
    reads, writes = state_of(params["call"])
    raise UnsupportedPrimitiveError(
        message(
            f"{(writes + reads)[0]} is used inside a function with a rule of custom_vmap, and the"
            " rule says nothing about it. (The primitive is custom_vmap_call.)",
            fix="""
            @jax.custom_batching.custom_vmap
            def f(x, key): ...                # use the state before the call, pass it in
            f(x, jaxstate.next_key())
            """,
            used=_compat.user_location(),
        )
    )
