"""scan and while: slots that a body writes are carried, slots that it only reads are constants.

A function of the loop may have captured a slot, as a constant, that another one writes. From the
second turn on that is not what the slot holds: such a constant becomes the carried value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxstate._src import _jax
from jaxstate._src.core.contents import Addresses, refreshed, state_of, state_of_all, superseded
from jaxstate._src.core.discharge import Layout, discharge, read_all, write_all
from jaxstate._src.core.discharged import carried_values
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.registry import register_rule
from jaxstate._src.core.slots import Address, any_open, where_unused


@register_rule(_jax.scan_p)
def _scan(args: Any, params: dict[str, Any]) -> list[Any]:
    """(consts, carry, xs) -> (reads + consts, writes + carry, xs).

    Slots with a value per step are further xs and ys.
    """
    state = state_of(params["jaxpr"])
    reads, xs = _split(state.reads)
    writes, ys = _split(state.writes)
    n_consts, _ = _jax.scan_arity(params)
    initialize(params["jaxpr"], [*args[:n_consts], *[None] * (len(args) - n_consts)], state.writes)
    slots = carried_values(reads, writes)
    steps = _read_steps(xs, params["length"])
    avals = [_jax.typeof(s) for s in slots] + [a.aval() for a in xs]
    consts = refreshed(params["jaxpr"], args[:n_consts], writes=writes)
    dropped = superseded(params["jaxpr"], writes)
    how = Layout(reads, writes, at=n_consts, out_at=0, lasts=xs, outs=ys, dropped=dropped)
    jaxpr = discharge(params["jaxpr"], how, avals)
    more_consts = len(reads) - len(dropped)
    threaded = _jax.scan_params_with(params, more_consts, len(writes), len(xs), len(ys))
    constants, carried = slots[: len(reads)], slots[len(reads) :]
    consts = _without(dropped, consts)
    outs = _jax.scan_p.bind(
        *constants, *consts, *carried, *args[n_consts:], *steps, **dict(threaded, jaxpr=jaxpr)
    )
    end = len(outs) - len(ys)
    write_all(writes, outs[: len(writes)])
    _write_steps(ys, outs[end:], params["length"])
    return outs[len(writes) : end]


def _split(addresses: Sequence[Address]) -> tuple[Addresses, Addresses]:
    """The addresses with one value for the whole loop, and those with one per step."""
    per_step = tuple(a for a in addresses if a.per_step is not None)
    return tuple(a for a in addresses if a.per_step is None), per_step


def _read_steps(addresses: Addresses, length: int) -> list[Any]:
    """The values of the body's slots, stacked over the steps, from the slots outside."""
    values: dict[Address, Any] = {}
    for outer, inner in _groups(addresses, length):
        (value,) = read_all([outer])
        for i, address in enumerate(inner):
            values[address] = value if len(inner) == 1 else value[:, i]
    return [values[a] for a in addresses]


def _write_steps(addresses: Addresses, values: Sequence[Any], length: int) -> None:
    """Writes the slots outside, from the values of the body's, stacked over the steps."""
    by_address = dict(zip(addresses, values, strict=True))
    outside, results = [], []
    for outer, inner in _groups(addresses, length):
        parts = [by_address[a] for a in inner]
        outside.append(outer)
        results.append(parts[0] if len(parts) == 1 else jnp.stack(parts, axis=1))
    write_all(outside, results)


def _groups(addresses: Addresses, length: int) -> Iterator[tuple[Address, list[Address]]]:
    """The slots of a body that are one outside, and that slot."""
    groups: dict[Any, list[Address]] = {}
    for address in addresses:
        groups.setdefault(address.per_step, []).append(address)
    for inner in groups.values():
        yield inner[0].over(length, *([len(inner)] if len(inner) > 1 else [])), inner


def _without(dropped: Sequence[int], operands: Sequence[Any]) -> list[Any]:
    return [x for i, x in enumerate(operands) if i not in dropped] if dropped else list(operands)


@register_rule(_jax.while_p)
def _while(args: Any, params: dict[str, Any]) -> list[Any]:
    """Slots go in front: ``reads`` of both kinds of constants, ``writes`` of the carry.

    A condition that only reads takes the carried slots as they are. A condition that writes is run
    once before the loop and again at the end of the body, and its verdict is carried too: the
    loop's own condition cannot hand anything on.
    """
    cond, body = params["cond_jaxpr"], params["body_jaxpr"]
    n_cond, n_body = params["cond_nconsts"], params["body_nconsts"]
    cond_consts, body_consts = args[:n_cond], args[n_cond : n_cond + n_body]
    carry = args[n_cond + n_body :]
    reads, writes = state_of_all((cond, body))
    initialize(cond, [*cond_consts, *[None] * len(carry)], writes)
    initialize(body, [*body_consts, *[None] * len(carry)], writes)
    slots = carried_values(reads, writes)
    avals = [_jax.typeof(s) for s in slots]
    constants, carried = slots[: len(reads)], slots[len(reads) :]
    cond_writes = bool(state_of(cond).writes)
    in_cond, in_body = superseded(cond, writes), superseded(body, writes)
    cond_consts = refreshed(cond, cond_consts, writes=writes)
    body_consts = refreshed(body, body_consts, writes=writes)

    how = Layout(reads, writes, at=n_body, out_at=0, dropped=in_body)
    body = discharge(body, how, avals)
    out_at = 0 if cond_writes else None
    how = Layout(reads, writes, at=n_cond, out_at=out_at, out=cond_writes, dropped=in_cond)
    cond = discharge(cond, how, avals)
    cond_consts, body_consts = _without(in_cond, cond_consts), _without(in_body, body_consts)
    n_cond, n_body = len(cond_consts), len(body_consts)
    if not cond_writes:
        outs = _jax.while_p.bind(
            *constants, *cond_consts, *constants, *body_consts, *carried, *carry,
            cond_nconsts=len(reads) + n_cond, cond_jaxpr=cond,
            body_nconsts=len(reads) + n_body, body_jaxpr=body,
        )  # fmt: skip
        _write_ended(writes, outs[: len(writes)], _jax.out_avals(cond)[-1])
        return outs[len(writes) :]

    *carried, verdict = _jax.eval_closed_jaxpr(cond, *constants, *cond_consts, *carried, *carry)
    body = _body_then_condition(body, cond, len(reads) + n_body, len(reads) + n_cond, len(writes))
    n_consts = 2 * len(reads) + n_body + n_cond
    outs = _jax.while_p.bind(
        *constants, *body_consts, *constants, *cond_consts, verdict, *carried, *carry,
        cond_nconsts=0, cond_jaxpr=_first_of(tuple(_jax.in_avals(body)[n_consts:])),
        body_nconsts=n_consts, body_jaxpr=body,
    )  # fmt: skip
    _write_ended(writes, outs[1 : 1 + len(writes)], _jax.out_avals(cond)[-1])
    return outs[1 + len(writes) :]


def _write_ended(writes: Addresses, values: Sequence[Any], verdict: Any) -> None:
    """Writes what a loop leaves. It differs by device if they end it at different turns."""
    axes = _jax.axes_of(verdict)
    if axes:
        pairs = zip(writes, values, strict=True)
        values = [_jax.vary(x, axes) if a.has_axes else x for a, x in pairs]
    write_all(writes, values)


def _run_in_python(while_loop: Callable[..., Any]) -> Callable[..., Any]:
    """``while_loop`` as it is under `jax.disable_jit`.

    JAX runs it in Python until the condition turns out to be traced; then it begins again, with the
    primitive. What condition and body have written by then would stay. So here the primitive goes
    on where Python has come to.
    """

    @functools.wraps(while_loop)
    def run(cond_fun: Any, body_fun: Any, init_val: Any) -> Any:
        if not _jax.jit_is_disabled():
            return while_loop(cond_fun, body_fun, init_val)
        if not any_open():
            return where_unused(
                lambda: while_loop(cond_fun, body_fun, init_val),
                lambda: run(cond_fun, body_fun, init_val),
            )
        value = init_val
        while True:
            value = jax.tree.map(jnp.asarray, value)
            verdict = cond_fun(value)
            if not _jax.is_known(verdict):
                break
            if not verdict:
                return value
            value = body_fun(value)

        def turn(carried: Any) -> Any:
            value = body_fun(carried[1])
            return cond_fun(value), value

        return while_loop(lambda carried: carried[0], turn, (verdict, value))[1]

    return run


_jax.wrap_while_loop(_run_in_python)


@_jax.weakref_lru_cache
def _body_then_condition(
    body: Any, cond: Any, n_body_consts: int, n_cond_consts: int, n_writes: int
) -> Any:
    """(body_consts, cond_consts, verdict, carry) -> (verdict, carry): a turn, the next verdict."""
    body_avals, cond_avals = _jax.in_avals(body), _jax.in_avals(cond)
    verdict_aval = _jax.out_avals(cond)[-1]

    def turn(*args: Any) -> list[Any]:
        body_consts, args = args[:n_body_consts], args[n_body_consts:]
        cond_consts, args = args[:n_cond_consts], args[n_cond_consts:]
        carry = _jax.eval_closed_jaxpr(body, *body_consts, *args[1:])
        *written, verdict = _jax.eval_closed_jaxpr(cond, *cond_consts, *carry)
        return [verdict, *written, *carry[n_writes:]]

    avals = [
        *body_avals[:n_body_consts],
        *cond_avals[:n_cond_consts],
        verdict_aval,
        *body_avals[n_body_consts:],
    ]
    return _jax.trace_flat(turn, avals)


@functools.lru_cache
def _first_of(avals: tuple[Any, ...]) -> Any:
    """The jaxpr that returns the first of its inputs."""
    return _jax.trace_flat(lambda *args: args[0], avals)
