"""jit, checkpoint and other calls: the operands of the equation are the inputs of its jaxpr.

y = jit[f] x      -->      s = read;  s', y = jit[f threaded] s x;  write s'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxstate import _compat
from jaxstate.births import bear
from jaxstate.capture import CapturedOperand, StateTracer
from jaxstate.errors import AheadOfTimeError, message
from jaxstate.thread import (
    Thread,
    read_all,
    register_rule,
    settle_jaxprs,
    state_of,
    thread,
    uses_of,
    write_last,
)
from jaxstate.trace import one_use, resolve


@register_rule(_compat.jit_p)
def _jit(args: Any, params: dict[str, Any]) -> list[Any]:
    return _threaded_jit(args, params, lambda a, p: _compat.jit_p.bind(*a, **p))


def _threaded_jit(
    args: Any, params: dict[str, Any], run: Callable[[Any, dict[str, Any]], list[Any]]
) -> list[Any]:
    reads, writes, outs = uses_of([params["jaxpr"]])
    bear(params["jaxpr"], args)
    slots = read_all(reads + writes)
    avals = [_compat.typeof(s) for s in slots]
    more_in, more_out = len(slots), len(writes + outs)
    threaded = dict(
        params,
        jaxpr=thread(params["jaxpr"], Thread(reads, writes, outs=outs, once=True), avals),
        in_shardings=(_compat.UNSPECIFIED,) * more_in + params["in_shardings"],
        in_layouts=(None,) * more_in + params["in_layouts"],
        donated_invars=(False,) * more_in + params["donated_invars"],
        out_shardings=params["out_shardings"] + (_compat.UNSPECIFIED,) * more_out,
        out_layouts=params["out_layouts"] + (None,) * more_out,
    )
    return write_last(writes + outs, run([*slots, *args], threaded))


@_compat.wrap_top_level_jit
def _top_level_jit(call: Callable[..., Any]) -> Callable[..., Any]:
    """A jitted call at top level does not bind ``jit_p``. This is the bind wrapper of that path.

    A call that uses state runs its threaded jaxpr, compiled once, and gives JAX no executable: the
    C++ fast path would store the call with the state of this time as a constant.
    """

    def wrapped(*args: Any, **params: Any) -> Any:
        captured = any(type(x) is CapturedOperand for x in args)
        state = state_of(params["jaxpr"])
        if not captured and not state:
            return call(*args, **params)
        with one_use():
            args = tuple(resolve(x.tracer) if type(x) is CapturedOperand else x for x in args)
            run = _compat.run_jit_primitive
            if not state:
                return run(args, params), None, None, []
            settle_jaxprs([params["jaxpr"]])
            outs = _threaded_jit(args, params, run)
        return outs, None, None, []

    return wrapped


@_compat.wrap_ahead_of_time
def _refuse_state_from_outside(jaxpr: Any, constants: Sequence[Any]) -> None:
    """What is compiled ahead of time is called without JAX's Python: none could pass the state."""
    reads, writes = state_of(jaxpr)
    captured = [x.tracer if type(x) is CapturedOperand else x for x in constants]
    used = [*writes, *reads, *(x.address for x in captured if isinstance(x, StateTracer))]
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
                used=_compat.user_location(),
            )
        )


def _call(primitive: Any, name: str) -> Callable[[Any, dict[str, Any]], list[Any]]:
    """The rule of a primitive whose parameter ``name`` is its jaxpr; no other parameter counts
    operands, and only ``out_memory_spaces`` counts results."""

    def rule(args: Any, params: dict[str, Any]) -> list[Any]:
        reads, writes, outs = uses_of([params[name]])
        bear(params[name], args)
        slots = read_all(reads + writes)
        how = Thread(reads, writes, outs=outs, once=True)
        jaxpr = thread(params[name], how, [_compat.typeof(s) for s in slots])
        threaded = dict(params, **{name: jaxpr})
        if "out_memory_spaces" in params:
            spaces = (jax.memory.Space.Device,) * len(writes + outs)
            threaded["out_memory_spaces"] = params["out_memory_spaces"] + spaces
        return write_last(writes + outs, primitive.bind(*slots, *args, **threaded))

    return rule


for _primitive, _name in (
    (_compat.remat_p, "jaxpr"),
    (_compat.call_p, "call_jaxpr"),
    (_compat.compute_on_p, "jaxpr"),
    (_compat.xla_metadata_call_p, "jaxpr"),
):
    if _primitive is not None:
        register_rule(_primitive)(_call(_primitive, _name))
