"""A function as a list of operations on values, with what is known of each of them.

Jitted functions, checkpoints and functions with custom derivatives are the operations in them, and
so is a loop over layers, turn by turn. A loop over time is one operation, with a value for each
turn. What does not depend on the input is computed right here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxstate._src import _jax
from jaxstate._src.causal.knowledge import Facts, lean
from jaxstate.errors import NotCausalError, message

CALLS = {
    "jit", "pjit", "closed_call", "core_call", "eval_jaxpr", "checkpoint", "remat", "remat2",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call",
    "xla_metadata_call", "composite",
}  # fmt: skip
RUNNING = {"cumlogsumexp", "cummax", "cummin", "cumprod", "cumsum"}
_NOT_ASKED = object()
MOST_TURNS = 256  # of a loop that becomes the operations in it


class Value:
    """A value of the program.

    Attributes:
      stamps: when its elements are known, lean.
      array: the value itself, if it does not depend on the input.
      operation, place: whose result it is, and which of them.
      run: a function that computes it while tracing, if that can be done.
    """

    def __init__(self, aval: Any, stamps: np.ndarray, array: Any = None):
        self.shape, self.dtype = tuple(aval.shape), aval.dtype
        self.stamps = stamps
        self.array = array
        self.operation: Operation | None = None
        self.place = 0
        self.run: Callable[[], Any] | None = None
        self._concrete: Any = _NOT_ASKED
        self._facts: Any = _NOT_ASKED

    @property
    def depends(self) -> bool:
        return self.array is None

    @property
    def is_known(self) -> bool:
        """Whether the array can be known while tracing."""
        return not self.depends and (self.run is not None or not _jax.is_tracer(self.array))

    def concrete(self) -> Any:
        """The array, if it can be known while tracing."""
        if self._concrete is _NOT_ASKED:
            self._concrete = None
            if not _jax.is_tracer(self.array):
                self._concrete = self.array
            elif self.run is not None:
                self._concrete = self.run()
        return self._concrete

    def facts(self) -> Facts | None:
        if self._facts is _NOT_ASKED:
            self._facts = None
            if self.operation is not None:
                self._facts = self.operation.rule.facts(self.operation, self.place)
            elif self.is_known and not jnp.issubdtype(self.dtype, jax.dtypes.extended):
                value = lean(np.asarray(self.concrete()))
                self._facts = Facts(np.ones((1,) * value.ndim, bool), value)
        return self._facts


class Operation:
    """An operation whose operands depend on the input.

    Attributes:
      ins: its operands, each a `Value`.
      outs: its results.
      rule: of this operation.
      number: in the order of the program.
    """

    def __init__(self, eqn: Any, params: Any, ins: Sequence[Value], avals: Sequence[Any]):
        self.eqn = eqn
        self.primitive = eqn.primitive
        self.name = eqn.primitive.name
        self.params = params
        self.ins = ins
        self.avals = avals
        self.outs: list[Value] = []
        self.rule: Any = None
        self.number = 0

    def bind(self, args: Sequence[Any], **params: Any) -> list[Any]:
        """Runs it, with some other parameters."""
        out = self.primitive.bind(*args, **{**self.params, **params})
        return list(out) if self.primitive.multiple_results else [out]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{x.dtype}{list(x.shape)}" for x in self.ins)
        place = _jax.location_of(self.eqn)
        return f"{self.name} of {shapes}" + (f" at {place}" if place else "")


def run_equation(eqn: Any, args: Sequence[Any]) -> list[Any]:
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


class Program:
    """The operations of a function.

    Args:
      rule_of: the rule of an operation.
      loop_over_time: the rule of a scan whose turns are in the order of the input.
    """

    def __init__(self, rule_of: Callable[[Operation], Any], loop_over_time: Any):
        self.operations: list[Operation] = []
        self.rule_of = rule_of
        self.loop_over_time = loop_over_time

    def constant(self, array: Any) -> Value:
        aval: Any = _jax.typeof(array)
        return Value(aval, np.zeros((1,) * len(aval.shape), np.int32), array)

    def trace(self, jaxpr: Any, args: Sequence[Value]) -> list[Value]:
        """The results of a jaxpr."""
        jaxpr = _jax.close(jaxpr)
        env: dict[Any, Value] = {}

        def read(atom: Any) -> Value:
            if not isinstance(atom, _jax.Var):
                aval: Any = atom.aval
                return self.constant(np.asarray(atom.val, aval.dtype))
            return env[atom]

        env.update(
            zip(_jax.constvars(jaxpr), map(self.constant, _jax.consts_of(jaxpr)), strict=True)
        )
        env.update(zip(_jax.invars(jaxpr), args, strict=True))
        for eqn in _jax.equations(jaxpr):
            outs = self.equation(eqn, [read(x) for x in eqn.invars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(x) for x in _jax.outvars(jaxpr)]

    def call(self, fun: Callable[..., Any], *args: Value) -> list[Value]:
        """The results of a function of JAX."""
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
        return self.trace(jax.make_jaxpr(fun)(*avals), args)

    def equation(self, eqn: Any, ins: list[Value]) -> list[Value]:
        name, params = eqn.primitive.name, eqn.params
        fixed = not any(x.depends for x in ins)
        if fixed and (name not in CALLS or all(x.is_known for x in ins)):
            return self._fixed(eqn, ins)
        if name in CALLS:
            return self.trace(next(iter(_jax.jaxprs_in(params))), ins)
        if name == "custom_linear_solve":
            solve, known = _jax.linear_solve_of(ins, params), sum(params["const_lengths"])
            return self.trace(solve.functions["solve"], [*solve.consts["solve"], *ins[known:]])
        if name == "cond":
            return self._branches(params["branches"], ins)
        if name == "scan":
            return self._scan(eqn, ins)
        if name in RUNNING and params["reverse"]:
            return self._from_the_end(eqn, ins)
        if eqn.effects:
            raise NotCausalError(_effect(Operation(eqn, params, ins, ())))
        return self.add(Operation(eqn, params, ins, [v.aval for v in eqn.outvars]))

    def add(self, operation: Operation, rule: Any = None) -> list[Value]:
        operation.rule = rule or self.rule_of(operation)
        operation.number = len(self.operations)
        self.operations.append(operation)
        stamps = operation.rule.stamps(operation)
        for place, (aval, when) in enumerate(zip(operation.avals, stamps, strict=True)):
            value = Value(aval, lean(np.asarray(when, np.int32)))
            value.operation, value.place = operation, place
            operation.outs.append(value)
        # What has no elements depends on nothing.
        return [
            self.constant(jnp.zeros(x.shape, x.dtype)) if 0 in x.shape else x
            for x in operation.outs
        ]

    def _fixed(self, eqn: Any, ins: list[Value]) -> list[Value]:
        """Runs what does not depend on the input; what can be known of it while tracing is."""
        outs = [self.constant(x) for x in run_equation(eqn, [x.array for x in ins])]
        done: list[Any] = []

        def run(place: int) -> Any:
            if not done:
                with jax.ensure_compile_time_eval():
                    done.extend(run_equation(eqn, [x.concrete() for x in ins]))
            return done[place]

        is_known = all(x.is_known for x in ins) and not eqn.effects
        operation = Operation(eqn, eqn.params, ins, [v.aval for v in eqn.outvars])
        for place, value in enumerate(outs):
            if is_known:
                value.run = functools.partial(run, place)
            elif not eqn.effects:
                operation.rule = operation.rule or self.rule_of(operation)
                value.operation, value.place = operation, place
        return outs

    def _from_the_end(self, eqn: Any, ins: list[Value]) -> list[Value]:
        """A running sum from the end, of what may run from the end itself."""
        axis, params = eqn.params["axis"], {**eqn.params, "reverse": False}

        def turned(x: Any) -> Any:
            return jnp.flip(eqn.primitive.bind(jnp.flip(x, axis), **params), axis)

        return self.call(turned, *ins)

    def _branches(self, branches: Sequence[Any], ins: list[Value]) -> list[Value]:
        """The branch that is taken, if that is known; else both, and a selection."""
        index, operands = ins[0], ins[1:]
        taken = index.concrete() if not index.depends else None
        if taken is not None:
            return self.trace(branches[int(np.clip(taken, 0, len(branches) - 1))], operands)
        results = [self.trace(branch, operands) for branch in branches]
        outs = []
        for cases in zip(*results, strict=True):
            outs += self.call(lambda which, *cases: jax.lax.select_n(which, *cases), index, *cases)
        return outs

    def _scan(self, eqn: Any, ins: list[Value]) -> list[Value]:
        params = eqn.params
        n, m = _jax.scan_arity(params)
        length, body = params["length"], _jax.close(params["jaxpr"])
        consts, carry, xs = ins[:n], ins[n : n + m], ins[n + m :]
        if self._goes_with_time(xs, length) and not any(x.depends for x in consts + carry):
            return self._scan_over_time(eqn, consts, carry, xs)
        if length > MOST_TURNS:
            raise NotCausalError(_long_loop(Operation(eqn, params, ins, ()), length))
        ys: list[Any] = [None] * length
        for k in reversed(range(length)) if params["reverse"] else range(length):
            step = [self._item(x, k) for x in xs]
            outs = self.trace(body, [*consts, *carry, *step])
            carry, ys[k] = outs[:m], outs[m:]
        empty = [self.constant(jnp.zeros(v.aval.shape, v.aval.dtype)) for v in eqn.outvars[m:]]
        stacked = [
            self._apply(lambda *ys: jnp.stack(ys), *parts) for parts in zip(*ys, strict=True)
        ]
        return [*carry, *(stacked if length else empty)]

    def _goes_with_time(self, xs: Sequence[Value], length: int) -> bool:
        """Whether turns follow each other as the input does; else they are of layers, heads ..."""
        stamps = [x.stamps for x in xs if x.depends]
        if not any(s.shape[0] > 1 for s in stamps):
            return False
        return length > MOST_TURNS or all(s[0].size == 1 for s in stamps)

    def _apply(self, fun: Callable[..., Any], *args: Value) -> Value:
        if any(x.depends for x in args):
            return self.call(fun, *args)[0]
        return self.constant(fun(*(x.array for x in args)))

    def _item(self, xs: Value, k: int) -> Value:
        item = self._apply(lambda xs: jax.lax.index_in_dim(xs, k, 0, keepdims=False), xs)
        if xs.is_known:
            item.run = lambda: np.asarray(xs.concrete())[k]
        return item

    def _scan_over_time(
        self, eqn: Any, consts: list[Value], carry: list[Value], xs: list[Value]
    ) -> list[Value]:
        """One operation, that has what it carries after each turn as further results.

        What it carries and does not depend on the input, as a counter, runs ahead.
        """
        params, n, m = eqn.params, len(consts), len(carry)
        body, reverse = _jax.close(params["jaxpr"]), params["reverse"]
        changing = [False] * m
        while True:
            reached = _reached(body, [False] * n + changing + [x.depends for x in xs])
            if reached[:m] == changing:
                break
            changing = reached[:m]
        fixed, moving = _places(changing, False), _places(changing, True)
        fixed_ys, moving_ys = _places(reached[m:], False), _places(reached[m:], True)
        constants = [x.array for x in consts]

        def turn(known: Sequence[Any], changes: Sequence[Any], step: Sequence[Any]) -> list[Any]:
            carried: list[Any] = [None] * m
            for places, values in ((fixed, known), (moving, changes)):
                for k, value in zip(places, values, strict=True):
                    carried[k] = value
            return _jax.eval_closed_jaxpr(body, *constants, *carried, *step)

        def ahead(known: Any, step: Any) -> Any:
            changes = [jnp.zeros(carry[k].shape, carry[k].dtype) for k in moving]
            steps = iter(step)
            every = [jnp.zeros(x.shape[1:], x.dtype) if x.depends else next(steps) for x in xs]
            outs = turn(known, changes, every)
            return [outs[k] for k in fixed], (known, [outs[m + k] for k in fixed_ys])

        last, (befores, known_ys) = jax.lax.scan(
            ahead, [carry[k].array for k in fixed], [x.array for x in xs if not x.depends],
            params["length"], reverse,
        )  # fmt: skip

        def rest(changes: Any, known: Any, step: Any) -> Any:
            outs = turn(known, changes, step)
            return [outs[k] for k in moving] + [outs[m + k] for k in moving_ys]

        first = [jax.ShapeDtypeStruct(carry[k].shape, carry[k].dtype) for k in moving]
        steps = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
        jaxpr = jax.make_jaxpr(rest)(first, [carry[k].array for k in fixed], steps)
        every = [*map(self.constant, befores), *xs]
        if reverse:
            every = [self._apply(lambda x: jnp.flip(x, 0), x) for x in every]
        length = params["length"]
        avals = [jax.ShapeDtypeStruct((length, *x.shape), x.dtype) for x in first]
        avals += [eqn.outvars[m + k].aval for k in moving_ys]
        operation = Operation(
            eqn, {"jaxpr": jaxpr, "carried": len(moving), "length": length},
            [*(carry[k] for k in moving), *every], avals,
        )  # fmt: skip
        outs = self.add(operation, self.loop_over_time)
        ys = outs[len(moving) :]
        if reverse:
            ys = [self._apply(lambda y: jnp.flip(y, 0), y) for y in ys]
        results: list[Any] = [None] * (m + len(eqn.outvars[m:]))
        for k, h in zip(moving, outs, strict=False):
            results[k] = self._apply(lambda h: h[-1], h)
        for k, x in zip(fixed, last, strict=True):
            results[k] = self.constant(x)
        for k, y in zip(moving_ys, ys, strict=True):
            results[m + k] = y
        for k, y in zip(fixed_ys, known_ys, strict=True):
            results[m + k] = self.constant(y)
        return results


def _places(flags: Sequence[bool], wanted: bool) -> list[int]:
    return [k for k, flag in enumerate(flags) if flag == wanted]


def _reached(jaxpr: Any, flags: Sequence[bool]) -> list[bool]:
    """Which results of a jaxpr may depend on the operands with a flag."""
    reached = {v for v, flag in zip(_jax.invars(jaxpr), flags, strict=True) if flag}
    for eqn in _jax.equations(jaxpr):
        if any(isinstance(v, _jax.Var) and v in reached for v in eqn.invars):
            reached.update(eqn.outvars)
    return [isinstance(v, _jax.Var) and v in reached for v in _jax.outvars(jaxpr)]


def _effect(operation: Operation) -> str:
    return message(
        f"The {operation} has an effect, and depends on the sequence that is sampled. Each element"
        " of it would be computed once, in another order than the program says.",
        fix="""
        causal_fixed_point(f, x)            # an f without prints and writes of what depends on x
        """,
        used=_jax.user_location(),
    )


def _long_loop(operation: Operation, length: int) -> str:
    return message(
        f"The {operation} carries what depends on the sequence through {length} turns. Each turn"
        f" becomes operations of its own, at most {MOST_TURNS} of them.",
        fix="""
        jax.lax.scan(body, init, x)         # a loop over time: x alone depends on the sequence
        """,
        used=_jax.user_location(),
    )
