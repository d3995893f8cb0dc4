"""jit: slots go in front of the operands, and behind the results.

    y = jit[f] x      -->      s = read;  y, s' = jit[f threaded] s x;  write s'

Inside a transformation a jitted call is an equation like others. At top level there is none: JAX's
C++ dispatch looks for an executable for operands of these types, and asks Python where it has none.
There `_call_at_top_level` sees the jaxpr first:

* The function has no state: JAX goes on, and the next such call stays in C++.
* It has state: a `_ThreadedCall` makes the call. That is the threaded function on a C++ dispatch of
  its own, so what is left to do in Python is to read the cells, call it, and write the cells.

Which slots a call uses is known when JAX has traced the function for the types of its operands, but
to ask JAX takes longer than the call. So the threaded call that was right for the last call is
tried before (`_call_like_last`): its dispatch has executables only for types for which it is right,
and asks for others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import jax

from jaxstate import _jax
from jaxstate.core.capture import StateTracer
from jaxstate.core.discharge import (
    Addresses,
    Layout,
    Uses,
    captured_inputs,
    check_type,
    discharge,
    in_order,
    read_all,
    read_as_stored,
    refreshed,
    register_rule,
    settle,
    state_of,
    uses_of,
    write_all,
    write_last,
)
from jaxstate.core.initializers import has_inits, initialize
from jaxstate.core.resolve import begin_use, check_captured, end_use
from jaxstate.core.slots import Address, any_open
from jaxstate.errors import AheadOfTimeError, HostCallbackError, message


@register_rule(_jax.jit_p)
def _jit(args: Any, params: dict[str, Any]) -> list[Any]:
    uses = uses_of([params["jaxpr"]])
    initialize(params["jaxpr"], args)
    args = refreshed(params["jaxpr"], args, writes=uses.results)
    slots = read_all(uses.ins)
    threaded = _threaded(params, uses, [_jax.typeof(s) for s in slots])
    return write_last(uses.results, _jax.jit_p.bind(*slots, *args, **threaded))


def _threaded(params: dict[str, Any], uses: Uses, avals: Sequence[Any]) -> dict[str, Any]:
    """The parameters of a ``jit`` equation that also takes slots of the types ``avals``."""
    reads, writes, outs = uses
    more_in, more_out = len(avals), len(uses.results)
    return dict(
        params,
        jaxpr=discharge(params["jaxpr"], Layout(reads, writes, outs=outs, once=True), avals),
        in_shardings=(_jax.UNSPECIFIED,) * more_in + params["in_shardings"],
        in_layouts=(None,) * more_in + params["in_layouts"],
        donated_invars=(False,) * more_in + params["donated_invars"],
        out_shardings=params["out_shardings"] + (_jax.UNSPECIFIED,) * more_out,
        out_layouts=params["out_layouts"] + (None,) * more_out,
    )


# -- At top level ----------------------------------------------------------------------------


# Asked first about a call at top level: ``client(jitted, args, kwargs)`` returns its results, or
# `NotImplemented`.
first: list[Callable[[_jax.Jitted, Any, Any], Any]] = []


def call_now(jitted: _jax.Jitted, args: Any, kwargs: Any) -> Any:
    """The results of a call of which JAX keeps no executable."""
    call = jitted.infer(args, kwargs)
    results = _call_at_top_level(jitted, call, args, kwargs)
    if results is NotImplemented:
        outs = _jax.jit_p.bind(*call.consts, *call.operands, **call.params)
        results = jax.tree.unflatten(call.out_tree, outs)
    return results


def _call_like_last(jitted: _jax.Jitted, args: Any, kwargs: Any) -> Any:
    """The results of a call that uses the state of the last one; else `NotImplemented`."""
    if not any_open():
        return NotImplemented
    for client in first:
        results = client(jitted, args, kwargs)
        if results is not NotImplemented:
            return results
    threaded = _calls_of(jitted.fun, jitted.info).last
    return NotImplemented if threaded is None else threaded.try_here(args, kwargs)


def _call_at_top_level(jitted: _jax.Jitted, call: _jax.JitCall, args: Any, kwargs: Any) -> Any:
    """The results of a call that uses state; `NotImplemented` if the call is JAX's."""
    if _looks_at_operands(call):
        outs = _jax.jit_p.bind(*call.consts, *call.operands, **call.params)
        return jax.tree.unflatten(call.out_tree, outs)
    state = _state_of_call(call)
    if not state:
        return NotImplemented
    return _calls_of(jitted.fun, jitted.info).threaded(jitted, state)(args, kwargs)


_jax.wrap_jitted_calls(_call_like_last, _call_at_top_level)


def _looks_at_operands(call: _jax.JitCall) -> bool:
    """Whether the operands say what the state is: an initializer's data, or a tracer among them.

    (A function that somebody has converted to an object has its captures in the object. And arrays
    that can be written are tracers.) Or whether it is known only when operations are expanded.
    Such a call is bound, as an equation is.
    """
    jaxpr = call.params["jaxpr"]
    if has_inits(jaxpr) or any(map(_jax.is_tracer, call.operands)):
        return True
    if _jax.is_high(jaxpr) and any_open():
        return True
    if any(c.at >= len(call.consts) for c in captured_inputs(jaxpr)):
        return True
    return any(_jax.is_tracer(c) and type(c) is not StateTracer for c in call.consts)


class _OtherStateError(Exception):
    """A threaded call was tried, and the call uses other state."""


class _Calls:
    """The threaded calls of one jitted function, by the state that they use: the last few."""

    ENOUGH = 64

    def __init__(self) -> None:
        self.last: _ThreadedCall | None = None
        self._by_state: dict[_StateOfCall, _ThreadedCall] = {}

    def threaded(self, jitted: _jax.Jitted, state: _StateOfCall) -> _ThreadedCall:
        threaded = self._by_state.get(state)
        if threaded is None:
            for oldest in list(self._by_state)[: 1 - self.ENOUGH or None]:
                self._by_state.pop(oldest, None)
            threaded = self._by_state.setdefault(state, _ThreadedCall(jitted, state))
        self.last = threaded  # (another thread may have another one)
        return threaded


@_jax.weakref_lru_cache
def _calls_of(fun: Any, info: Any) -> _Calls:
    return _Calls()


_jax.wrap_clear_cache(_calls_of.evict_weakref)


class _StateOfCall(NamedTuple):
    """The slots that a call uses, captured and threaded, and where they are.

    Two jaxprs of one function may use slots of one module under other modules or scopes. Their
    addresses are equal, and mean other slots.
    """

    captured: Addresses
    uses: Uses
    order: Addresses  # of first use
    paths: tuple[Hashable, ...]  # to the captured ones, and to those in `order`

    def __bool__(self) -> bool:
        return bool(self.captured or self.order)


def _state_of_call(call: _jax.JitCall) -> _StateOfCall:
    jaxpr = call.params["jaxpr"]
    captured = tuple(c.address for c in call.consts if isinstance(c, StateTracer))
    order = in_order(jaxpr)
    paths = tuple([address.path_to() for address in (*captured, *order)])
    return _StateOfCall(captured, uses_of([jaxpr]), order, paths)


class _ThreadedCall:
    """A jitted function as one that is given the slots it reads, and returns those it writes."""

    def __init__(self, jitted: _jax.Jitted, state: _StateOfCall) -> None:
        self._state = state
        captured, uses, order, _ = state
        self._aliases = tuple(a for a in order if a.may_alias)
        self._slots = (*uses.ins, *captured, *uses.outs)
        self._run = _jax.dispatched(jitted, self._prepare)

    def try_here(self, args: Any, kwargs: Any) -> Any:
        """The results; `NotImplemented` if a cell is not here, or if the call uses other state."""
        cells: list[Any] = [address.cell_here() for address in self._slots]
        if None in cells or (self._aliases and len(set(map(id, cells))) < len(cells)):
            return NotImplemented
        captured, uses, _, _ = self._state
        reads, writes, _ = uses
        n = len(reads) + len(writes)
        n_in = n + len(captured)
        values = [c.value for c in cells[:n_in]]
        try:
            outs, written = self._run(values, *args, **kwargs)
        except _OtherStateError:
            return NotImplemented
        for i in range(len(reads), n):
            if cells[i].value is not values[i]:
                raise _written_meanwhile(self._slots[i])
        results = zip((*cells[len(reads) : n], *cells[n_in:]), uses.results, written, strict=True)
        for cell, address, value in results:
            address.note_write()
            cell.value = value
        return outs

    def __call__(self, args: Any, kwargs: Any) -> Any:
        captured, uses, _, _ = self._state
        use = begin_use(())
        try:
            captures = read_as_stored(captured)
            settle(self._aliases, uses.results)
            slots = read_as_stored(uses.ins)
            outs, written = self._run([*slots, *captures], *args, **kwargs)
            for address, before, now in zip(
                uses.writes, slots[len(uses.reads) :], read_as_stored(uses.writes), strict=True
            ):
                if now is not before:
                    raise _written_meanwhile(address)
            write_all(uses.results, written)
        finally:
            end_use(use)
        return outs

    def _prepare(
        self, jitted: _jax.Jitted, values: list[Any], args: Any, kwargs: Any
    ) -> _jax.JitCall:
        """The call with slots, for operands of new types. (The dispatch knows types, not slots.)"""
        call = jitted.infer(args, kwargs)
        if _looks_at_operands(call) or _state_of_call(call) != self._state:
            raise _OtherStateError
        uses = uses_of([call.params["jaxpr"]])
        n = len(uses.ins)
        slots, captures = values[:n], values[n:]
        for address, value in zip(uses.ins, slots, strict=True):
            check_type(address, address.wanted, value)
        tracers = [c for c in call.consts if isinstance(c, StateTracer)]
        for tracer, value in zip(tracers, captures, strict=True):
            check_captured(tracer, value)
        call = _jax.with_constants_inside(call, lambda c: not isinstance(c, StateTracer))
        avals = [_jax.typeof(_jax.canonicalize(s)) for s in slots]
        return call._replace(
            params=_threaded(call.params, uses, avals),
            consts=[*slots, *captures],
            names=([str(a) for a in (*uses.ins, *self._state.captured)], call.names[1]),
            out_tree=_jax.tree_with_leaves(call.out_tree, len(uses.results)),
        )


def _written_meanwhile(address: Address) -> Exception:
    return HostCallbackError(
        message(
            f"A slot ({address}) was changed while a jitted call that uses it was running:"
            " by a function that the call runs on the host. The call would overwrite that.",
            fix="""
            key = jaxstate.next_key()                     # use the state in the jitted function,
            y = jax.pure_callback(f, shape, x, key)       # and give the host what it needs
            """,
            used=_jax.user_location(),
        )
    )


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
