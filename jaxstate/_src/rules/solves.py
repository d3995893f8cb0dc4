"""custom_linear_solve and custom_root: the calls that the solve makes count, in their order.

Both primitives are made of several functions. One of them, ``solve``, computes the result. JAX runs
the others only for derivatives, at a time and as often as suits it. So

* ``solve`` takes the state where the primitive is called, and hands on what it leaves;
* the others start from the same state, and what they leave is forgotten.

That is what the program with the state passed by hand does: the state is part of what the functions
close over, and of the auxiliary results of ``solve`` (whose derivative JAX takes for zero).
"""

from __future__ import annotations

from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.contents import refreshed, state_of_all
from jaxstate._src.core.discharge import Layout, discharge, read_all, write_last
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.primitives import state_effect
from jaxstate._src.core.registry import register_hidden_rule, register_rule
from jaxstate._src.core.slots import any_open
from jaxstate._src.core.uses import one_use

# JAX wants as many auxiliary results of the transposed solve, and drops them.
_HANDING_ON = ("solve", "transpose_solve")

_jax.defer_transposes(any_open)


@register_rule(_jax.linear_solve_p)
def _linear_solve(args: Any, params: dict[str, Any]) -> list[Any]:
    return _with_state(_jax.linear_solve_of(args, params))


@register_hidden_rule(_jax.CustomRoot)
def _custom_root(args: Any, prim: Any) -> list[Any]:
    return _with_state(_jax.custom_root_of(args, prim))


@register_hidden_rule(_jax.RootLinearMap)
def _root_linear_map(args: Any, prim: Any) -> list[Any]:
    """The derivative of the function of a custom_root, or its transpose: nothing is handed on."""
    return _with_state(_jax.root_linear_map_of(args, prim))


@_jax.wrap_custom_root
def _custom_root_without_primitive(solve: _jax.Solve) -> list[Any]:
    """custom_root where it is not a primitive (jax < 0.11), at the place where it is called."""
    if not any(state_effect in jaxpr.effects for jaxpr in solve.functions.values()):
        return solve.bind(solve.functions, solve.consts)
    with one_use():
        return _with_state(solve)


def _with_state(solve: _jax.Solve) -> list[Any]:
    """(consts of each function, rest) -> (slots + consts of each, rest)."""
    reads, writes = state_of_all(solve.functions.values())
    for name, jaxpr in solve.functions.items():
        consts = solve.consts[name]
        initialize(jaxpr, [*consts, *[None] * (len(_jax.invars(jaxpr)) - len(consts))])
    slots = read_all(reads + writes)
    avals = [_jax.typeof(s) for s in slots]
    functions = {
        name: discharge(jaxpr, Layout(reads, writes, out=name in _HANDING_ON), avals)
        for name, jaxpr in solve.functions.items()
    }
    consts = {
        name: [*slots, *refreshed(solve.functions[name], values, writes)]
        for name, values in solve.consts.items()
    }
    outs = solve.bind(functions, consts)
    return write_last(writes, outs) if "solve" in functions else outs
