"""custom_jvp and custom_vjp where JAX traces the function before it binds anything.

So JAX's next implementations of both do (``jax_custom_jvp3``, ``jax_custom_vjp3``), which are also
those of ``defvjp(..., generic_batching=True)``. The function is one operation, and its rules run
when that operation is transformed, perhaps much later. What JAX has traced says which state the
function uses. If it uses any, another such function is called in its place:

    f(x)      -->      y, s' = f_explicit(s, x);  write s'

Its rules are the user's, which find the state in a holder that answers from the argument ``s``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core.capture import StateTracer
from jaxstate._src.core.contents import captured_inputs, refreshed, settle, state_of
from jaxstate._src.core.discharge import Layout, discharge, read_all, write_all
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.slots import Address, any_known
from jaxstate._src.core.uses import one_use
from jaxstate._src.rules.derivatives import undifferentiated
from jaxstate._src.rules.explicit import Explicit, without_derivative


def _call(function: Any, args: tuple[Any, ...], traced: _jax.Traced) -> Any:
    captured = tuple(c.address for c in traced.consts if isinstance(c, StateTracer))
    reads, writes = state_of(traced.jaxpr)
    touched = tuple(dict.fromkeys((*captured, *reads, *writes)))
    if not touched and not captured_inputs(traced.jaxpr):
        return NotImplemented
    with one_use():
        initialize(traced.jaxpr, [*traced.consts, *traced.operands])
        args = _refreshed(args, traced)
        settle(touched, writes)
        values = list(map(undifferentiated, touched, read_all(touched)))
        rules = _Rules(function, Explicit(touched, writes))
        given = traced._replace(operands=())  # JAX may keep the function
        call = _jax.like_traced_rules(
            function, functools.partial(_explicit, given, touched), len(touched), rules.wrapped
        )
        out, written = call(*values, *args)
        # The derivative of what is written is zero. (For JAX all results of a custom_vjp have one.)
        write_all(writes, map(without_derivative, written))
    return out


_jax.wrap_traced_rules(any_known, _call)


def _refreshed(args: tuple[Any, ...], traced: _jax.Traced) -> tuple[Any, ...]:
    """The arguments, with captures among them as they are now."""
    operands = refreshed(traced.jaxpr, [*traced.consts, *traced.operands])[len(traced.consts) :]
    dynamic = [i for i in range(len(args)) if i not in traced.statics]
    tree = jax.tree.structure([args[i] for i in dynamic])
    new = dict(zip(dynamic, jax.tree.unflatten(tree, operands), strict=True))
    return tuple(new.get(i, x) for i, x in enumerate(args))


def _explicit(traced: _jax.Traced, touched: Sequence[Address], *args: Any) -> Any:
    """The function with the state as further arguments in front, and with what it writes as one
    more result."""
    state, args = args[: len(touched)], args[len(touched) :]
    reads, writes = uses = state_of(traced.jaxpr)
    values = dict(zip(touched, state, strict=True))
    slots = [values[address] for addresses in uses for address in addresses]
    jaxpr = discharge(traced.jaxpr, Layout(reads, writes, once=True), list(map(_jax.typeof, slots)))
    consts = [values[c.address] if isinstance(c, StateTracer) else c for c in traced.consts]
    operands = jax.tree.leaves([x for i, x in enumerate(args) if i not in traced.statics])
    outs = _jax.eval_closed_jaxpr(jaxpr, *slots, *consts, *operands)
    n = traced.out_tree.num_leaves
    return jax.tree.unflatten(traced.out_tree, outs[:n]), outs[n:]


class _Rules:
    """The rules of a function with the state as further arguments, and with what they write."""

    def __init__(self, function: Any, explicit: Explicit) -> None:
        self._function = function
        self._explicit = explicit
        self._n = explicit.n
        self._n_statics = len(function.static_argnums)

    def wrapped(self, name: str, rule: Callable[..., Any]) -> Callable[..., Any]:
        """The rule ``name`` of JAX's function."""
        return functools.partial(getattr(self, "_" + name), rule)

    def _jvp_fun(self, jvp: Callable[..., Any], *args: Any) -> Any:
        *statics, primals, tangents = args
        state, primals, tangents = primals[: self._n], primals[self._n :], tangents[self._n :]
        out, written = self._run(state, jvp, *statics, primals, tangents)
        if not _is_pair(out):
            return out
        zeros = [_jax.symbolic_zero_like(w) for w in written]
        return (out[0], written), (out[1], zeros)

    def _fwd(self, fwd: Callable[..., Any], *args: Any) -> Any:
        state, args = args[: self._n], args[self._n :]
        if self._function.symz:
            state = [x.value for x in state]
        out, written = self._run(state, fwd, *args)
        return ((out[0], written), (out[1], state)) if _is_pair(out) else out

    def _bwd(self, bwd: Callable[..., Any], *args: Any) -> Any:
        n = self._n_statics
        statics, ((residuals, state), (cts, _), *accumulators) = args[:n], args[n:]
        out = self._run_backward(state, bwd, *statics, residuals, cts, *accumulators[self._n :])
        return (
            out
            if accumulators
            else self._with_cotangents(out, getattr(self._function, "with_logs", False))
        )

    def _remat_fwd(self, fwd: Callable[..., Any], *args: Any) -> Any:
        state, args = args[: self._n], args[self._n :]
        out, written = self._run(state, fwd, *args)
        return ((out[0], written), out[1]) if _is_pair(out) else out

    def _rem(self, rem: Callable[..., Any], residuals: Any, *args: Any) -> Any:
        state, args = args[: self._n], args[self._n :]
        out, written = self._run(state, rem, residuals, *args)
        return ((out[0], written), (out[1], state)) if _is_pair(out) else out

    def _remat_bwd(self, bwd: Callable[..., Any], *args: Any) -> Any:
        n = self._n_statics
        statics, ((residuals, state), (cts, _)) = args[:n], args[n:]
        out = self._run_backward(state, bwd, *statics, residuals, cts)
        return self._with_cotangents(out, self._function.remat_rules[3])

    def _run(self, state: Any, rule: Callable[..., Any], *args: Any) -> tuple[Any, list[Any]]:
        out, cells = self._explicit.run(lambda: _resolved(rule(*args)), state)
        return out, self._explicit.results(cells)

    def _run_backward(self, state: Any, rule: Callable[..., Any], *args: Any) -> Any:
        return self._explicit.run_backward(lambda: _resolved(rule(*args)), state)

    def _with_cotangents(self, out: Any, with_logs: bool) -> Any:
        """The result of a backward rule with that of the state: none."""
        if with_logs and _is_pair(out):
            return self._with_cotangents(out[0], False), out[1]
        return (*[None] * self._n, *out) if isinstance(out, (tuple, list)) else out


def _is_pair(out: Any) -> bool:
    """If a rule does not return one, JAX says what is wrong."""
    return isinstance(out, (tuple, list)) and len(out) == 2


def _resolved(out: Any) -> Any:
    return jax.tree.map(_jax.resolved, out)
