"""`custom_jvp` and `custom_vjp` bound with rules that have slots as operands."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxstate._src import _jax
from jaxstate._src.core import slots
from jaxstate._src.core.contents import settle
from jaxstate._src.core.discharge import read_all, write_last
from jaxstate._src.core.slots import Address, Cell
from jaxstate._src.core.uses import one_use
from jaxstate._src.rules.derivatives import (
    Calls,
    Given,
    Touched,
    backward_writes,
    rule_touches_less,
    rule_touches_more,
    run_rule,
    undifferentiated,
    without_values,
)

__all__ = ["Explicit", "without_derivative"]


class Explicit:
    """A function and its rules with their state as leading operands and trailing outputs."""

    def __init__(self, touched: Sequence[Address], written: Sequence[Address]) -> None:
        self.touched = touched
        self.written = written
        self.n = len(touched)
        self.age = slots.next_age()
        # The holders of this moment, for names only: a rule may run after they are closed.
        self.below = without_values(slots.stack())

    def run(
        self, call: Callable[[], Any], values: Sequence[Any]
    ) -> tuple[Any, dict[Address, Cell]]:
        """What ``call()`` returns with the slots at ``values``, and the cells that it leaves."""
        return self._run(call, values, self.written, rule_touches_more)

    def run_backward(self, call: Callable[[], Any], values: Sequence[Any]) -> Any:
        """What ``call()`` returns, which may not write."""
        return self._run(call, values, (), backward_writes)[0]

    def _run(
        self,
        call: Callable[[], Any],
        values: Sequence[Any],
        written: Sequence[Address],
        refused: Callable[[Address], Exception],
    ) -> tuple[Any, dict[Address, Cell]]:
        # In an in-place function the operands are arrays that the function itself could write.
        before = dict(zip(self.touched, map(_jax.canonicalize, values), strict=True))
        cells = {a: Cell(v) for a, v in before.items()}
        state = Given(None, self.below, cells, self.written, self.age)
        with state.entered():
            out = call()
        for address, cell in cells.items():
            if address not in written and cell.value is not before.get(address):
                raise refused(address)
        return out, cells

    def results(self, cells: dict[Address, Cell]) -> list[Any]:
        """What is left in the written slots."""
        for address in self.written:
            if address not in cells:
                raise rule_touches_less(address)
        return [cells[a].value for a in self.written]

    def function(self, fun: Any) -> Any:
        def explicit(*args: Any) -> list[Any]:
            out, cells = self.run(lambda: run_rule(fun, args[self.n :]), args[: self.n])
            return [*out, *self.results(cells)]

        return _jax.wrap_rule_function(fun, explicit)

    def jvp(self, jvp: Any, symbolic_zeros: bool) -> Any:
        """``(state, primals, state tangents, tangents)`` to primals and tangents with state."""

        def explicit(*args: Any) -> list[Any]:
            half = len(args) // 2
            primals, tangents = args[:half], args[half:]
            given = tangents[self.n :]
            if not symbolic_zeros:
                given = map(_jax.instantiate_symbolic_zero, given)
            operands = (*primals[self.n :], *given)
            out, cells = self.run(lambda: run_rule(jvp, operands), primals[: self.n])
            written = self.results(cells)
            n_out = len(out) // 2
            zeros = [_jax.symbolic_zero_like(w) for w in written]
            return [*out[:n_out], *written, *out[n_out:], *zeros]

        return _jax.wrap_rule_function(jvp, explicit)

    def fwd(self, fwd: Any) -> Any:
        """``fwd`` takes (value, is it differentiated) for every operand, in turns."""

        def explicit(*args: Any) -> list[Any]:
            state, rest = args[: 2 * self.n : 2], args[2 * self.n :]
            out, cells = self.run(lambda: run_rule(fwd, rest), state)
            return [*out, *self.results(cells)]

        return _jax.wrap_rule_function(fwd, explicit)

    def out_trees(self, out_trees: Callable[[], Any]) -> Callable[[], Any]:
        """The state goes to ``bwd`` as residuals, which are operands passed on."""

        def explicit() -> Any:
            out_tree, res_tree, forwarded = out_trees()
            forwarded = [f if f is None else f + self.n for f in forwarded]
            res_tree = _jax.tree_with_leaves(res_tree, self.n)
            return out_tree, res_tree, [*forwarded, *range(self.n)]

        return explicit

    def bwd(self, bwd: Any, out_trees: Callable[[], Any]) -> Any:
        """(residuals, state, cotangents, cotangents of the written) to cotangents."""

        def explicit(*args: Any) -> Any:
            n_res = out_trees()[1].num_leaves
            residuals, state, cts = (
                args[:n_res],
                args[n_res : n_res + self.n],
                args[n_res + self.n : len(args) - len(self.written)],
            )
            out = self.run_backward(lambda: run_rule(bwd, (*residuals, *cts)), state)
            zeros = [_jax.zero_cotangent(_jax.typeof(s)) for s in state]
            return _jax.prepend_cotangents(zeros, out)

        return _jax.wrap_rule_function(bwd, explicit)


def _stateful(
    calls_params: Callable[[Calls, dict[str, Any]], dict[str, Any]],
    explicit_params: Callable[[Explicit, dict[str, Any]], dict[str, Any]],
    left: Callable[[Any], Any] = lambda value: value,
) -> Any:
    """The bind of a primitive with rules: see above.

    ``left(value)`` is what is written of a value that the function leaves in a slot.
    """

    def wrap(bind: Callable[..., Any]) -> Callable[..., Any]:
        def bind_with_trace(trace: Any, args: Any, avals: Any, params: Any, /) -> Any:
            if not slots.any_known() or _jax.is_rule_of_activation(params["subfuns"][1]):
                return bind(trace, args, avals, params)
            args = [*map(_jax.resolved, args)]
            if _jax.calls_functions(trace) or isinstance(trace, _jax.TransparentTrace):
                # A vmap around puts its own trace over the current one; the latter binds again.
                with _jax.set_current_trace(trace):
                    return bind(trace, args, avals, params)
            calls = Calls(trace, args)
            try:
                # Code in the function looks for the way to where an array was made.
                with _jax.set_current_trace(trace):
                    return bind(trace, args, avals, calls_params(calls, params))
            except Touched as ended:
                if ended.calls is not calls:
                    raise
                touched, written = calls.touched()
                args, use = calls.operands, calls.use
            finally:
                calls.finish()
            if not touched and not written:
                avals = list(map(_jax.typeof, args))
                return bind_with_trace(trace, args, avals, params)
            with one_use(use), _jax.set_current_trace(trace):
                settle(touched, written)
                values = list(map(undifferentiated, touched, read_all(touched)))
                explicit = Explicit(touched, written)
                operands = [*values, *args]
                out = bind(
                    trace, operands, [_jax.typeof(x) for x in operands],
                    explicit_params(explicit, params),
                )  # fmt: skip
                n = len(out) - len(written)
                return write_last(written, [*out[:n], *map(left, out[n:])])

        return bind_with_trace

    return wrap


def without_derivative(x: Any) -> Any:
    """What a function with a backward rule has written: the rule says nothing of it."""
    return jax.lax.stop_gradient(x) if _jax.has_tangent(_jax.typeof(x)) else x


def _jvp_calls(calls: Calls, params: dict[str, Any]) -> dict[str, Any]:
    return dict(params, subfuns=tuple(map(calls.function, params["subfuns"])))


def _vjp_calls(calls: Calls, params: dict[str, Any]) -> dict[str, Any]:
    fun, fwd, bwd = params["subfuns"]
    out_trees = params["out_trees"]
    functions = calls.function(fun), calls.fwd(fwd, out_trees), calls.bwd(bwd, out_trees)
    return dict(params, subfuns=functions, out_trees=calls.out_trees(out_trees))


def _jvp_params(explicit: Explicit, params: dict[str, Any]) -> dict[str, Any]:
    fun, jvp = params["subfuns"]
    functions = explicit.function(fun), explicit.jvp(jvp, params["symbolic_zeros"])
    return dict(params, subfuns=functions, symbolic_zeros=True)


def _vjp_params(explicit: Explicit, params: dict[str, Any]) -> dict[str, Any]:
    fun, fwd, bwd = params["subfuns"]
    out_trees = params["out_trees"]
    functions = explicit.function(fun), explicit.fwd(fwd), explicit.bwd(bwd, out_trees)
    return dict(params, subfuns=functions, out_trees=explicit.out_trees(out_trees))


_jax.wrap_bind_with_trace(_jax.custom_jvp_call_p, _stateful(_jvp_calls, _jvp_params))

# A backward rule says nothing of what is written: it does not depend on the operands. For JAX all
# results do.
_jax.wrap_bind_with_trace(
    _jax.custom_vjp_call_p, _stateful(_vjp_calls, _vjp_params, without_derivative)
)
