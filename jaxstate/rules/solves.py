"""custom_linear_solve: the four functions of a solve may read state, not write it.

Parameters need no rule: they are captured, and JAX makes them constants of the four functions. A
draw or a write would have to happen as often as a solver chooses to call its operator, and again in
the transposed solve, which has no answer to give.
"""

from __future__ import annotations

from typing import Any

from jaxstate import _compat
from jaxstate.births import bear
from jaxstate.errors import UnsupportedPrimitiveError, message
from jaxstate.thread import Thread, read_all, register_rule, state_of_all, thread


@register_rule(_compat.linear_solve_p)
def _linear_solve(args: Any, params: dict[str, Any]) -> list[Any]:
    """Reads become constants: (consts of each function, b) -> (reads + consts of each, b)."""
    jaxprs, lengths = params["jaxprs"], params["const_lengths"]
    present = [name for name in jaxprs._fields if getattr(jaxprs, name) is not None]
    reads, writes = state_of_all(getattr(jaxprs, name) for name in present)
    if writes:
        raise UnsupportedPrimitiveError(
            message(
                f"{writes[0]} is written inside a function given to custom_linear_solve (a draw of"
                " a random key writes the count of its stream). How often a solver calls its"
                " functions is its own business, so there is no right number of draws.",
                fix="""
                k = jaxstate.next_key()                             # before the solve
                jax.lax.custom_linear_solve(lambda x: f(x, k), b, solve)
                """,
                used=_compat.user_location(),
            )
        )
    operands, rest = {}, list(args)
    for name in present:
        n = getattr(lengths, name)
        operands[name], rest = rest[:n], rest[n:]
        jaxpr = getattr(jaxprs, name)
        bear(jaxpr, [*operands[name], *[None] * (len(_compat.invars(jaxpr)) - n)])
    slots = read_all(reads)
    avals = [_compat.typeof(s) for s in slots]
    threaded = {n: thread(getattr(jaxprs, n), Thread(reads, ()), avals) for n in present}
    longer = {name: getattr(lengths, name) + len(slots) for name in present}
    constants = [x for name in present for x in [*slots, *operands[name]]]
    jaxprs, lengths = jaxprs._replace(**threaded), lengths._replace(**longer)
    return _compat.linear_solve_p.bind(
        *constants, *rest, **dict(params, jaxprs=jaxprs, const_lengths=lengths)
    )
