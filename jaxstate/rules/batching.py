"""custom_vmap: the function uses state as any other, and its rule for lanes uses none.

Outside of a vmap the function is just called. Under a vmap JAX calls the user's rule instead, once,
with all lanes. The rule is called like the user wrote it: what the function only reads comes in
with its constants, which JAX keeps from the rule. But a rule has no way to say what becomes of a
slot that the function writes, and JAX may call it long after the values of this moment were
written. So under a vmap a function that writes (a draw does), a rule that uses slots itself, and a
function whose parameters differ from lane to lane are named errors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax

from jaxstate import _compat, slots
from jaxstate.births import bear
from jaxstate.errors import UnsupportedPrimitiveError, message
from jaxstate.slots import Address, Holder
from jaxstate.thread import (
    Thread,
    read_all,
    refreshed,
    register_rule,
    state_of,
    thread,
    write_last,
)


class _NoSlots(Holder):
    """Answers for every slot from outside of a rule: with an error."""

    def knows(self, address: Address) -> bool:
        owner = address.own_holder and address.own_holder()
        if not address.threaded or (owner is not None and owner.age > self.age):
            return False
        _refuse(f"A rule of custom_vmap uses {address}.")


def _refuse(what: str) -> NoReturn:
    raise UnsupportedPrimitiveError(
        message(
            f"{what} The rule is called once for all lanes of a vmap, and has no way to take and"
            " return state. (The primitive is custom_vmap_call.)",
            fix="""
            @jax.custom_batching.custom_vmap
            def f(x, key): ...                # use the state before the call, pass it in
            f(x, jaxstate.next_key())
            """,
            used=_compat.user_location(),
        )
    )


class _Rule:
    """The user's rule, for a function with slots in front of its constants and behind its results.

    It is called as ``rule(axis_size, (constants batched, operands batched), constants, operands)``.
    """

    def __init__(
        self, rule: Callable[..., Any], slots: Sequence[Address], written: Sequence[Address]
    ) -> None:
        functools.update_wrapper(self, rule)  # JAX's errors say its name
        self.rule = rule
        self.slots = slots
        self.written = written

    def __call__(self, axis_size: int, batched: Any, consts: Any, args: Any) -> Any:
        if self.written:
            _refuse(f"{self.written[0]} is written in a function with a rule of custom_vmap.")
        const_batched, arg_batched = batched
        if any(jax.tree.leaves(const_batched)):
            _refuse("A function with a rule of custom_vmap closes over state of each lane.")
        n = len(self.slots)
        with slots.open_holder(_NoSlots()):
            return self.rule(axis_size, [const_batched[n:], arg_batched], consts[n:], args)

    def __str__(self) -> str:
        return str(self.rule)


def _guarding_the_rule(bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        # (The rule of a derivative of such an operation is JAX's, and calls the one of here.)
        if slots.any_open() and _compat.is_vmap_rule(params["rule"]):
            params = dict(params, rule=_Rule(params["rule"], (), ()))
        return bind(trace, args, avals, params)

    return bind_with_trace


_compat.wrap_bind_with_trace(_compat.custom_vmap_p, _guarding_the_rule)


@register_rule(_compat.custom_vmap_p)
def _custom_vmap(args: Any, params: dict[str, Any]) -> list[Any]:
    """(consts, args) -> (slots + consts, args)."""
    reads, writes = state_of(params["call"])
    bear(params["call"], args)
    args = refreshed(params["call"], args, writes=writes)
    values = read_all(reads + writes)
    avals = [_compat.typeof(v) for v in values]
    in_tree, out_tree = params["in_tree"], params["out_tree"]
    consts, operands = in_tree.unflatten(range(in_tree.num_leaves))
    outs = out_tree.unflatten(range(out_tree.num_leaves))
    threaded = dict(
        params,
        call=thread(params["call"], Thread(reads, writes), avals),
        rule=_Rule(params["rule"], reads + writes, writes),
        in_tree=_compat.operand_tree(([*values, *consts], operands)),
        out_tree=jax.tree.structure((outs, writes)) if writes else out_tree,
    )
    return write_last(writes, _compat.custom_vmap_p.bind(*values, *args, **threaded))
