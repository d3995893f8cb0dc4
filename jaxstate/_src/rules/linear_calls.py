"""linear_call: what the function and its transpose read are residuals of both.

    y = linear_call[f, f_T] r x      -->      s = read;  y = linear_call[f, f_T] (r, s) x

JAX calls the transpose when the operation is transposed, perhaps long after the values of this
moment were written. A function that is transposed cannot hand on state, so none of the two writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxstate._src import _jax
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.contents import refreshed, settle, state_of_all
from jaxstate._src.core.discharge import Layout, discharge, read_all
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.registry import out_of_bind, register_rule
from jaxstate._src.core.slots import Address, any_known
from jaxstate._src.core.uses import captured_operands, own_use
from jaxstate._src.rules.derivatives import rule_touches_more, undifferentiated
from jaxstate.errors import UnsupportedPrimitiveError, message


def _with_state(bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        if not any_known() or isinstance(params["transpose_thunk"], Settled):
            return bind(trace, args, avals, params)
        captured = captured_operands()
        if captured or any(state_of_all([params["callee"]])):
            with _jax.set_current_trace(trace):
                args, params = _explicit(args, params, captured)
            avals = list(map(_jax.typeof, args))
        else:
            params = dict(params, transpose_thunk=without_state(params["transpose_thunk"]))
        return bind(trace, args, avals, params)

    return bind_with_trace


_jax.wrap_bind_with_trace(_jax.linear_call_p, _with_state)


@register_rule(_jax.linear_call_p)
def _linear_call(args: Any, params: dict[str, Any]) -> list[Any]:
    args, params = _explicit(args, params, captured_operands())
    return _jax.linear_call_p.bind(*args, **params)


_jax.wrap_bind(_jax.linear_call_p, own_use)


def _explicit(
    args: Sequence[Any], params: dict[str, Any], captured: dict[int, Address]
) -> tuple[list[Any], dict[str, Any]]:
    """The operands and parameters of the operation with the state as residuals."""
    callee, n, n_res = params["callee"], params["num_callee_consts"], params["num_res"]
    transpose, transpose_consts = traced(params["transpose_thunk"])
    reads, writes = state_of_all([callee, transpose])
    if writes:
        raise _written(writes[0])
    initialize(callee, args)
    args = refreshed(callee, args)
    captures = {i: c.address for i, c in enumerate(transpose_consts) if type(c) is StateTracer}
    read = (*captures.values(), *reads)
    settle((*captured.values(), *read), ())
    values = [*(args[i] for i in captured), *read_all(read)]
    values = list(map(undifferentiated, (*captured.values(), *read), values))
    avals = list(map(_jax.typeof, values))
    own = {i: slot for slot, i in enumerate(captured)}
    callee = _with_residuals(callee, own, reads, avals, n + n_res)
    own = {i: slot for slot, i in enumerate(captures, len(captured))}
    transpose = _with_residuals(transpose, own, reads, avals, len(transpose_consts) + n_res)
    kept = [c for i, c in enumerate(transpose_consts) if i not in captures]
    explicit = dict(
        params, callee=callee, num_callee_consts=n - len(captured), num_res=n_res + len(values),
        transpose_thunk=Settled(lambda: (transpose, kept)),
    )  # fmt: skip
    front = [x for i, x in enumerate(args[: n + n_res]) if i not in captured]
    return [*front, *values, *args[n + n_res :]], explicit


def _with_residuals(
    jaxpr: Any, own: dict[int, int], reads: tuple[Address, ...], avals: Sequence[Any], at: int
) -> Any:
    """The jaxpr with inputs of the types ``avals`` behind its first ``at`` inputs: for captures,
    and for ``reads``. Its own captures are not in front any more: ``own`` says what takes the place
    of which input."""
    n = len(avals) - len(reads)
    threaded = discharge(jaxpr, Layout(reads, ()), avals[n:])
    slots, inputs = _split(_jax.invars(threaded), len(reads))
    front, linear = _split(inputs, at)
    captures = list(map(_jax.Var, avals[:n]))
    for i, slot in own.items():
        captures[slot] = front[i]
    front = [v for i, v in enumerate(front) if i not in own]
    return _jax.remade(
        threaded, invars=[*front, *captures, *slots, *linear], outvars=_jax.outvars(threaded),
        eqns=_jax.equations(threaded), effs=threaded.effects,
    )  # fmt: skip


def _split(items: Sequence[Any], n: int) -> tuple[list[Any], list[Any]]:
    return list(items[:n]), list(items[n:])


class Settled:
    """What traces a function to (jaxpr, constants) when JAX needs it, if its state is settled."""

    def __init__(self, thunk: Callable[[], Any]) -> None:
        self._thunk = thunk

    def __call__(self) -> Any:
        return self._thunk()


def traced(thunk: Callable[[], Any]) -> Any:
    """What ``thunk`` traces: a function of the program, perhaps in the middle of a bind."""
    with out_of_bind():
        return thunk()


def without_state(thunk: Callable[[], Any]) -> Settled:
    """``thunk``, for a function that uses no state."""

    def checked() -> Any:
        jaxpr, consts = traced(thunk)
        reads, writes = state_of_all([jaxpr])
        for address in (*(c.address for c in consts if type(c) is StateTracer), *reads, *writes):
            raise rule_touches_more(address)
        return jaxpr, consts

    return Settled(checked)


def _written(address: Address) -> Exception:
    return UnsupportedPrimitiveError(
        message(
            f"{address} is written inside a linear_call (a draw writes the count of its stream)."
            " Such a function can be transposed, and cannot hand on state. (The primitive is"
            " linear_call.)",
            fix="""
            mask = jaxstate.random.bernoulli(0.5, x.shape)     # before, and pass it as a residual
            linear_call(f, transpose, mask, x)
            """,
            used=_jax.user_location(),
        )
    )
