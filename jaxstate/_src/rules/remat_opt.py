"""The forward rule of ``defvjp(..., optimize_remat=True)``: state goes in and out as of a branch.

JAX makes one operation of the rule, and where nobody needs its residuals it runs the function
instead. So the two are the branches of a ``cond``, of which it chooses one later:

    r, y = remat_opt[fwd, f] x      -->      s = read;  r, y, s' = remat_opt[fwd, f] s x;  write s'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.contents import Uses, settle, uses_of
from jaxstate._src.core.discharge import Layout, discharge, read_all, write_last
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.registry import register_rule
from jaxstate._src.core.slots import any_known
from jaxstate._src.core.uses import captured_operands, own_use
from jaxstate._src.rules.linear_calls import Settled, traced, without_state


def _with_state(bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        if not any_known() or isinstance(params["fun_jaxpr_thunk"], Settled):
            return bind(trace, args, avals, params)
        if not captured_operands():
            thunk = without_state(params["fun_jaxpr_thunk"])
            return bind(trace, args, avals, dict(params, fun_jaxpr_thunk=thunk))
        with _jax.set_current_trace(trace):
            args, params, uses = _explicit(args, params)
            return write_last(uses.results, bind(trace, args, list(map(_jax.typeof, args)), params))

    return bind_with_trace


_jax.wrap_bind_with_trace(_jax.remat_opt_p, _with_state)


@register_rule(_jax.remat_opt_p)
def _remat_opt(args: Any, params: dict[str, Any]) -> list[Any]:
    args, params, uses = _explicit(args, params)
    return write_last(uses.results, _jax.remat_opt_p.bind(*args, **params))


_jax.wrap_bind(_jax.remat_opt_p, own_use)


def _explicit(args: Any, params: dict[str, Any]) -> tuple[list[Any], dict[str, Any], Uses]:
    """The operands and parameters with slots in front of the operands that both functions take."""
    n, fwd = params["num_consts"], params["fwd_jaxpr"]
    fun = _jax.closed(*traced(params["fun_jaxpr_thunk"]))
    captured = tuple(c.address for c in _jax.consts_of(fun) if type(c) is StateTracer)
    fun = _jax.hoist_constants(fun, lambda c: type(c) is StateTracer)
    uses = uses_of([fwd, fun])
    initialize(fwd, args)
    settle((*captured, *uses.ins), uses.results)
    captures, slots = read_all(captured), read_all(uses.ins)
    avals = list(map(_jax.typeof, slots))
    unused = [_jax.Var(_jax.typeof(c)) for c in captures]
    fwd = _threaded(fwd, uses, avals, lambda slots, rest: [*rest[:n], *unused, *slots, *rest[n:]])
    m = len(captures)
    fun = _threaded(fun, uses, avals, lambda slots, rest: [*rest[:m], *slots, *rest[m:]])
    explicit = dict(params, fwd_jaxpr=fwd, fun_jaxpr_thunk=Settled(lambda: _jax.separated(fun)))
    return [*args[:n], *captures, *slots, *args[n:]], explicit, uses


def _threaded(
    jaxpr: Any,
    uses: Uses,
    avals: Sequence[Any],
    order: Callable[[list[Any], list[Any]], list[Any]],
) -> Any:
    """The jaxpr with slots as inputs, in the order ``order(slots, other inputs)``, and outputs."""
    how = Layout(uses.reads, uses.writes, outs=uses.outs, once=True)
    threaded = discharge(jaxpr, how, avals)
    inputs, n = list(_jax.invars(threaded)), len(avals)
    return _jax.remade(
        threaded, invars=order(inputs[:n], inputs[n:]), outvars=_jax.outvars(threaded),
        eqns=_jax.equations(threaded), effs=threaded.effects,
    )  # fmt: skip
