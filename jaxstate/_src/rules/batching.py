"""custom_vmap: the function uses state as any other, and its rule for lanes reads the same.

Outside of a vmap the function is just called. Under a vmap JAX calls the user's rule instead, once,
with all lanes, and perhaps long after the values of this moment were written. What the function
reads comes in with its constants, which JAX keeps from the rule: there the rule finds the state.
But a rule has no way to say what becomes of a slot that the function writes. So under a vmap a
function that writes (a draw does) and a rule that uses other slots than its function are named
errors.

Where the lanes differ in what the function reads, each is a vmap over one lane.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core import slots
from jaxstate._src.core.contents import refreshed, state_of
from jaxstate._src.core.discharge import Layout, discharge, read_all, write_last
from jaxstate._src.core.initializers import initialize
from jaxstate._src.core.registry import register_rule
from jaxstate._src.core.slots import Address, Cell
from jaxstate._src.core.uses import captured_operands, own_use
from jaxstate._src.rules.derivatives import Given, only_reading, without_values
from jaxstate.errors import UnsupportedPrimitiveError, message


class _Given(Given):
    """The state of a rule: what the function reads."""

    def refused(self, address: Address) -> Exception:
        return _used_in_rule(address)


def _used_in_rule(address: Address) -> Exception:
    return _refused(
        f"A rule of custom_vmap uses {address}, which its function does not, or writes it."
    )


def _refused(what: str) -> Exception:
    return UnsupportedPrimitiveError(
        message(
            f"{what} The rule is called once for all lanes of a vmap, and has no way to take and"
            " return state. (The primitive is custom_vmap_call.)",
            fix="""
            @jax.custom_batching.custom_vmap
            def f(x, key): ...                # use the state before the call, pass it in
            f(x, jaxstate.next_key())
            """,
            used=_jax.user_location(),
        )
    )


class _Rule:
    """The user's rule, of a function with slots among its constants.

    It is called as ``rule(axis_size, (constants batched, operands batched), constants, operands)``.

    Attributes:
      more: how many constants in front are not the function's own.
      given: which slots the function reads, by the number of the constant that is its value.
      written: the slots that the function writes, behind its results.
    """

    def __init__(
        self,
        rule: Callable[..., Any],
        more: int,
        given: dict[int, Address],
        written: Sequence[Address],
    ) -> None:
        functools.update_wrapper(self, rule)  # JAX's errors say its name
        self.rule = rule
        self.more = more
        self.given = given
        self.written = written
        self.age = slots.next_age()
        self.below = without_values(slots.stack())

    def __call__(self, axis_size: int, batched: Any, consts: Any, args: Any) -> Any:
        if self.written:
            raise _refused(
                f"{self.written[0]} is written in a function with a rule of custom_vmap."
            )
        const_batched, arg_batched = batched
        if not any(const_batched):
            return self._call(axis_size, arg_batched, consts, args)
        axes = [0 if b else None for b in const_batched], _axes(arg_batched)
        out = jax.vmap(functools.partial(self._one_lane, arg_batched), axes)(consts, args)
        return out, jax.tree.map(lambda _: True, out)

    def _call(self, axis_size: int, batched: Any, consts: Any, args: Any) -> Any:
        cells = {address: Cell(consts[i]) for i, address in self.given.items()}
        state = _Given(None, self.below, cells, age=self.age)
        own = consts[self.more :]
        with only_reading(state, _used_in_rule):
            out = self.rule(axis_size, [[False] * len(own), batched], own, args)
            return jax.tree.map(_jax.resolved, out)

    def _one_lane(self, batched: Any, consts: Any, args: Any) -> Any:
        """The rule for a vmap over one lane, which has state of its own."""
        args = jax.tree.map(lambda b, x: x[None] if b else x, batched, args)
        out, batched = self._call(1, batched, consts, args)
        return jax.tree.map(lambda b, x: x[0] if b else x, batched, out)

    def __str__(self) -> str:
        return str(self.rule)


def _axes(batched: Any) -> Any:
    return jax.tree.map(lambda b: 0 if b else None, batched)


def _with_state_of_rule(bind: Callable[..., Any]) -> Callable[..., Any]:
    def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
        # (The rule of a derivative of such an operation is JAX's, and calls the one of here.)
        if slots.any_known() and _jax.is_vmap_rule(params["rule"]):
            params = dict(params, rule=_Rule(params["rule"], 0, captured_operands(), ()))
        return bind(trace, args, avals, params)

    return bind_with_trace


_jax.wrap_bind_with_trace(_jax.custom_vmap_p, _with_state_of_rule)


@register_rule(_jax.custom_vmap_p)
def _custom_vmap(args: Any, params: dict[str, Any]) -> list[Any]:
    """(consts, args) -> (slots + consts, args)."""
    reads, writes = state_of(params["call"])
    initialize(params["call"], args)
    args = refreshed(params["call"], args, writes=writes)
    values = read_all(reads + writes)
    avals = [_jax.typeof(v) for v in values]
    in_tree, out_tree = params["in_tree"], params["out_tree"]
    consts, operands = in_tree.unflatten(range(in_tree.num_leaves))
    n = len(values)
    given = dict(enumerate(reads)) | {n + i: a for i, a in captured_operands().items()}
    outs = out_tree.unflatten(range(out_tree.num_leaves))
    threaded = dict(
        params,
        call=discharge(params["call"], Layout(reads, writes), avals),
        rule=_Rule(params["rule"], n, given, writes),
        in_tree=_jax.operand_tree(([*values, *consts], operands)),
        out_tree=jax.tree.structure((outs, writes)) if writes else out_tree,
    )
    return write_last(writes, _jax.custom_vmap_p.bind(*values, *args, **threaded))


_jax.wrap_bind(_jax.custom_vmap_p, own_use)
