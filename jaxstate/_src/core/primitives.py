"""The primitives of a jaxpr whose state is not threaded yet: `state_read` and `state_write`."""

from __future__ import annotations

from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.slots import Address
from jaxstate.errors import UnsupportedPrimitiveError, message

__all__ = ["StateEffect", "read_p", "state_effect", "write_p"]


class StateEffect(_jax.Effect):
    """What a jaxpr has whose state is not threaded yet. No such jaxpr is ever compiled."""

    def __repr__(self) -> str:
        return (
            "a use of jaxstate state inside a higher-order primitive for which jaxstate has no"
            " rule (jaxstate.UnsupportedPrimitiveError; see jaxstate.extend.register_rule)"
        )

    def __reduce__(self) -> str:
        return "state_effect"  # there is one only

    def __lt__(self, other: object) -> bool:
        return False


state_effect = StateEffect()
_jax.allow_effect_everywhere_but_in_compiled_code(StateEffect)

read_p = _jax.Primitive("state_read")
read_p.multiple_results = True
write_p = _jax.Primitive("state_write")
write_p.multiple_results = True

# A read with an operand is one of a single slot, and the operand is the capture of that slot: see
# `resolve._read_staged`.
read_p.def_effectful_abstract_eval(
    lambda *captured, addresses, avals, version: (list(avals), {state_effect})
)
write_p.def_effectful_abstract_eval(lambda *values, addresses: ([], {state_effect}))


def _refuse_to_compile(ctx: Any, *args: Any, addresses: tuple[Address, ...], **params: Any) -> Any:
    raise UnsupportedPrimitiveError(
        message(
            f"{addresses[0]} is used inside a higher-order primitive for which jaxstate has no"
            " rule, and cannot be compiled.",
            fix="""
            jaxstate.extend.register_rule(primitive)(rule)    # makes the primitive stateful
            k = jaxstate.next_key()                           # or: take it out, pass it in
            """,
            used=_jax.user_location(),
        )
    )


_jax.register_lowering(read_p, _refuse_to_compile)
_jax.register_lowering(write_p, _refuse_to_compile)
