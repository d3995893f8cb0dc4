"""What becomes of a jaxpr whose operations a trace has processed."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from jaxstate._src import _jax
from jaxstate._src.core.primitives import read_p, state_effect
from jaxstate._src.core.refs import Slot, new_slot
from jaxstate._src.core.resolve import read_at
from jaxstate._src.traces.state import Spec
from jaxstate.errors import TraceStateError, message


class Processed(NamedTuple):
    """A jaxpr with the operations of a trace in it.

    Attributes:
      end: the form of the state that it leaves.
      constants: slots that it reads what the trace closes over from.
    """

    jaxpr: Any
    end: Spec
    constants: tuple[Slot, ...]


def with_one_condition(args: Any, params: Any) -> tuple[Any, Any]:
    """A while loop over lanes, each with a condition of its own, as a loop with one for all.

    A vmap makes such loops. JAX runs them as long as a lane wants to go on, and lets the others
    stay; but then all that the loop carries needs the axis of the lanes, and the state has none.
    """
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    if not _jax.out_avals(cond)[0].shape:
        return args, params
    n, m = params["cond_nconsts"], params["body_nconsts"]
    cond, body = _one_condition(cond, body, n, m)
    params = dict(params, cond_jaxpr=cond, body_jaxpr=body, body_nconsts=n + m)
    return [*args[:n], *args], params


@_jax.weakref_lru_cache
def _one_condition(cond: Any, body: Any, n: int, m: int) -> tuple[Any, Any]:
    def any_lane(*args: Any) -> Any:
        return jax.numpy.any(*_jax.eval_closed_jaxpr(cond, *args))

    def lanes_that_go_on(*args: Any) -> list[Any]:
        carry = args[n + m :]
        [goes_on] = _jax.eval_closed_jaxpr(cond, *args[:n], *carry)

        def chosen(new: Any, old: Any) -> Any:
            dims = range(goes_on.ndim)
            return jax.lax.select(jax.lax.broadcast_in_dim(goes_on, new.shape, dims), new, old)

        return [*map(chosen, _jax.eval_closed_jaxpr(body, *args[n:]), carry)]

    avals = _jax.in_avals(cond)[:n] + _jax.in_avals(body)
    return (
        _jax.trace_flat(any_lane, _jax.in_avals(cond)),
        _jax.trace_flat(lanes_that_go_on, avals),
    )


def constants_in_slots(jaxpr: Any, may_close: bool) -> tuple[Any, tuple[Slot, ...]]:
    """The jaxpr without constants that are tracers: it reads them from slots instead.

    `process_primitive` may close over anything, and most primitives have no operand for it. A jaxpr
    that may not close over values, one that is to be opened or that of a checkpoint, has none.
    """

    def moves(constant: Any) -> bool:
        return not may_close or _jax.is_tracer(constant)

    constants = [c for c in _jax.consts_of(jaxpr) if moves(c)]
    if not constants:
        return jaxpr, ()
    slots = tuple(new_slot(c, name="a value that a trace closes over") for c in constants)
    hoisted = _jax.hoist_constants(jaxpr, moves)

    def run(*args: Any) -> list[Any]:
        return _jax.eval_closed_jaxpr(hoisted, *(read_at(s.address) for s in slots), *args)

    return _jax.trace_flat(run, _jax.in_avals(jaxpr)), slots


def without_unused_reads(jaxpr: Any) -> Any:
    """The jaxpr without reads of state that it then does nothing with."""
    if state_effect not in jaxpr.effects:
        return jaxpr
    eqns = _jax.equations(jaxpr)
    used = {v for eqn in eqns for v in eqn.invars if isinstance(v, _jax.Var)}
    used.update(v for v in _jax.outvars(jaxpr) if isinstance(v, _jax.Var))
    kept = [e for e in eqns if e.primitive is not read_p or not used.isdisjoint(e.outvars)]
    if len(kept) == len(eqns):
        return jaxpr
    effects = jaxpr.effects
    if not any(state_effect in eqn.effects for eqn in kept):
        effects -= {state_effect}
    invars, outvars = _jax.invars(jaxpr), _jax.outvars(jaxpr)
    return _jax.remade(jaxpr, invars=invars, outvars=outvars, eqns=kept, effs=effects)


def check_results(primitive: Any, before: Any, after: Any) -> None:
    """The jaxprs of a loop or a branch return what they returned before."""
    for a, b in zip(_jax.out_avals(before), _jax.out_avals(after), strict=True):
        if not _jax.same_aval(a, b):
            raise TraceStateError(
                message(
                    f"process_primitive made a value of type {b.str_short()} out of one of type"
                    f" {a.str_short()}, inside a {primitive.name} that has to return the latter.",
                    fix=f"""
                    out = super().process_primitive(primitive, args, params)
                    out = out.astype(jnp.{a.dtype})      # the type that the operation has
                    """,
                    used=_jax.user_location(),
                )
            )
