"""Operations and transformations as data, each in two styles.

An operation, and a program made of transformations of it, is written twice:

* ``stateful``: a function ``x -> y`` of a float32 scalar that uses jaxstate;
* ``by_hand``: a function ``(x, s) -> (y, s)`` that is given all its state and returns it.

``s`` is a dict: the key and count of a random stream, the value of a slot, the parameter ``w``, the
variables ``v`` and ``mean``, the second of which is reduced to a mean over lanes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import zero_from_primal

import jaxstate
from jaxstate.extend import read, write

State = dict[str, Any]
Stateful = Callable[[Any], Any]
ByHand = Callable[[Any, State], tuple[Any, State]]

normal = jax.nn.initializers.normal(1.0)


def same_update(s: State, **changes: Any) -> State:
    return {**s, **changes}


# -- Operations ------------------------------------------------------------------------------


class Operation(NamedTuple):
    name: str
    stateful: Callable[[Any], Stateful]  # given the slot, or a handle of the variable ``v``
    by_hand: ByHand
    draws: bool = False
    writes: bool = False  # values that differ between lanes, into what they share
    has_param: bool = False
    variable: str | None = None
    has_handle: bool = False

    @property
    def changes(self) -> set[str]:
        """The parts of the state that come out other than they went in."""
        written = self.variable or "slot"
        changed = {written} if self.writes or self.variable == "mean" else set()
        return changed | ({"count"} if self.draws else set())


def _draw(x, s):
    u = jax.random.uniform(jax.random.fold_in(s["key"], s["count"]))
    return x * (1 + u), same_update(s, count=s["count"] + 1)


def _draw_twice(x, s):
    y, s = _draw(x, s)
    return _draw(jnp.sin(y), s)


def _slot_write(slot):
    def op(x):
        write(slot, 0.5 * read(slot) + jnp.sin(x))
        return x * 1.5

    return op


def _slot_read_after_write(slot):
    def op(x):
        write(slot, read(slot) * jnp.cos(x))
        return x + read(slot) * x

    return op


def _slot_read_after_write_by_hand(x, s):
    slot = s["slot"] * jnp.cos(x)
    return x + slot * x, same_update(s, slot=slot)


def variable(name, **kwargs):
    return jaxstate.variable(name, jnp.full, (), 0.4, **kwargs)


def _variable_write(_):
    def op(x):
        v = variable("v")
        v.value = 0.5 * v.value + jnp.sin(x)
        return x * 1.5

    return op


def _variable_handle(v):
    """Written by a handle from outside of all transformations, in another scope, and read."""

    def op(x):
        with jaxstate.scope("elsewhere"):
            v.value = v.value * jnp.cos(x)
            return x + v.value * x

    return op


def _variable_read_after_write_by_hand(x, s):
    v = s["v"] * jnp.cos(x)
    return x + v * x, same_update(s, v=v)


def _variable_mean(_):
    def op(x):
        mean = variable("mean", reduce=jnp.mean)
        mean.value = mean.value * jnp.cos(x)
        return x + mean.value * x

    return op


def _variable_mean_by_hand(x, s):
    mean = s["mean"] * jnp.cos(x)
    return x + mean * x, same_update(s, mean=mean)


OPERATIONS = [
    Operation("draw", lambda _: lambda x: x * (1 + jaxstate.random.uniform()), _draw, draws=True),
    Operation(
        "draw_twice",
        lambda _: (
            lambda x: jnp.sin(x * (1 + jaxstate.random.uniform())) * (1 + jaxstate.random.uniform())
        ),
        _draw_twice,
        draws=True,
    ),
    Operation(
        "param",
        lambda _: lambda x: jnp.sin(x * jaxstate.param("w", normal, ())),
        lambda x, s: (jnp.sin(x * s["w"]), s),
        has_param=True,
    ),
    Operation(
        "slot_write",
        _slot_write,
        lambda x, s: (x * 1.5, same_update(s, slot=0.5 * s["slot"] + jnp.sin(x))),
        writes=True,
    ),
    Operation(
        "slot_read_after_write",
        _slot_read_after_write,
        _slot_read_after_write_by_hand,
        writes=True,
    ),
    Operation(
        "variable_read",
        lambda _: lambda x: jnp.sin(x * variable("v").value),
        lambda x, s: (jnp.sin(x * s["v"]), s),
        variable="v",
    ),
    Operation(
        "variable_write",
        _variable_write,
        lambda x, s: (x * 1.5, same_update(s, v=0.5 * s["v"] + jnp.sin(x))),
        writes=True,
        variable="v",
    ),
    Operation(
        "variable_handle",
        _variable_handle,
        _variable_read_after_write_by_hand,
        writes=True,
        variable="v",
        has_handle=True,
    ),
    Operation(
        "variable_mean",
        _variable_mean,
        _variable_mean_by_hand,
        variable="mean",
    ),
]


# -- Transformations -------------------------------------------------------------------------


class Transformation(NamedTuple):
    name: str
    stateful: Callable[[Stateful], Stateful]
    by_hand: Callable[[ByHand, bool], ByHand]  # given whether the body draws
    lanes: bool = False  # maps over lanes
    directions: bool = False  # maps over directions of a derivative


def _simple(name, transform, by_hand):
    return Transformation(name, transform, lambda f, draws: by_hand(f))


def _loop(run):
    """A loop of three turns, by ``run(turn, carry)``."""

    def stateful(f):
        return lambda x: run(f, x)

    def by_hand(f):
        return lambda x, s: run(lambda c: f(*c), (x, s))

    return stateful, by_hand


def _scan(**kwargs):
    return _loop(lambda f, c: lax.scan(lambda c, _: (f(c), None), c, None, length=3, **kwargs)[0])


def _while_body():
    def run(f, c):
        def turn(nc):
            return nc[0] + 1, f(nc[1])

        return lax.while_loop(lambda nc: nc[0] < 3, turn, (jnp.int32(0), c))[1]

    return _loop(run)


def _while_cond():
    """The body of the loop counts; the condition runs the operation, four times."""

    def stateful(f):
        def run(x):
            def condition(c):
                return (c[0] < 3) & jnp.isfinite(f(c[1]))

            return lax.while_loop(condition, lambda c: (c[0] + 1, c[1] * 1.1), (jnp.int32(0), x))[1]

        return run

    def by_hand(f):
        def run(x, s):
            def test(n, x, changed):
                y, after = f(x, same_update(s, **changed))
                return (n < 3) & jnp.isfinite(y), _only_changed(after)

            go, changed = test(jnp.int32(0), x, {})

            def turn(c):
                _, n, x, changed = c
                n, x = n + 1, x * 1.1
                go, changed = test(n, x, changed)
                return go, n, x, changed

            # The rest is not carried: so JAX knows that the number of turns does not depend on it.
            c = go, jnp.int32(0), x, changed
            _, _, x, changed = lax.while_loop(lambda c: c[0], turn, c)
            return x, same_update(s, **changed)

        return run

    return stateful, by_hand


def _branch(run):
    """A branching by ``run(f, identity, x, operand)``."""

    def stateful(f):
        return lambda x: run(f, lambda x: x * 2, x, x)

    def by_hand(f):
        return lambda x, s: run(lambda c: f(*c), lambda c: (c[0] * 2, c[1]), x, (x, s))

    return stateful, by_hand


def _region(transform, transform_by_hand=None):
    """A derivative: ``transform(f, x)`` of ``f: x -> (y, aux)`` gives ``(value, aux)``."""

    def stateful(f):
        return lambda x: transform(lambda x: (f(x), ()), x)[0]

    def by_hand(f):
        return lambda x, s: (transform_by_hand or transform)(lambda x: f(x, s), x)

    return stateful, by_hand


def _jvp(f, x):
    y, t, aux = jax.jvp(f, (x,), (jnp.float32(0.7),), has_aux=True)
    return y + t, aux


def _vjp(f, x):
    y, back, aux = jax.vjp(f, x, has_aux=True)
    return y + back(jnp.float32(0.7))[0] + back(jnp.float32(0.3))[0], aux


def _linearize(f, x):
    y, linear, aux = jax.linearize(f, x, has_aux=True)
    return y + linear(jnp.float32(0.7)) + linear(jnp.float32(0.1)), aux


def _value_and_grad(f, x):
    (y, aux), g = jax.value_and_grad(f, has_aux=True)(x)
    return y + g, aux


def _jacfwd(f, x):
    return jax.jacfwd(f, has_aux=True)(x)


def _along_the_only_direction(f, x):
    """`jax.jacfwd` of a function of one number."""
    _, t, aux = jax.jvp(f, (x,), (jnp.float32(1),), has_aux=True)
    return t, aux


def _hessian_like(f, x, forward=_jacfwd):
    """`jax.hessian` has no use for a state that leaves it in two steps: forward over reverse."""
    return forward(jax.jacrev(f, has_aux=True), x)


def _vmap(**kwargs):
    def over_lanes(x):
        return jnp.stack([x, 2 * x])

    def stateful(f):
        return lambda x: jax.vmap(f, **kwargs)(over_lanes(x)).sum()

    def by_hand(f, draws):
        def run(x, s):
            if draws:
                region = jax.random.fold_in(s["key"], s["count"])
                keys = jax.vmap(jax.random.fold_in, (None, 0))(region, jnp.arange(2))
                after = same_update(s, count=s["count"] + 1)
            else:
                keys, after = jnp.stack([s["key"]] * 2), s

            def lane(x, key):
                mine = same_update(s, key=key, count=jnp.int32(0)) if draws else s
                y, mine = f(x, mine)
                return y, mine["mean"]

            y, means = jax.vmap(lane, **kwargs)(over_lanes(x), keys)
            return y.sum(), same_update(after, mean=means.mean(0))

        return run

    return stateful, by_hand


def _custom_jvp():
    """A rule that is not the derivative, so that losing it shows."""

    def stateful(f):
        @jax.custom_jvp
        def g(x):
            return f(x)

        g.defjvp(lambda primals, tangents: (f(primals[0]), 3 * tangents[0]))
        return g

    def by_hand(f):
        @jax.custom_jvp
        def g(x, s):
            return f(x, s)

        @g.defjvp
        def rule(primals, tangents):
            y, s = f(*primals)
            return (y, s), (3 * tangents[0], _kept(primals[1], s, tangents[1]))

        return g

    return stateful, by_hand


def _custom_vjp():
    def stateful(f):
        @jax.custom_vjp
        def g(x):
            return f(x)

        g.defvjp(lambda x: (f(x), None), lambda _, ct: (3 * ct,))
        return g

    def by_hand(f):
        @jax.custom_vjp
        def g(x, s):
            return f(x, s)

        kept = {}

        def forward(x, s):
            y, after = f(x, s)
            kept.update({name: after[name] is s[name] for name in s})
            return (y, after), s

        def backward(s, ct):
            zero = zero_from_primal(s)
            return 3 * ct[0], {name: ct[1][name] if kept[name] else zero[name] for name in s}

        g.defvjp(forward, backward)
        return g

    return stateful, by_hand


def _kept(before, after, tangents):
    """What a rule by hand says of the state: what the function leaves alone keeps its tangent."""
    zero = zero_from_primal(after)
    return {n: tangents[n] if after[n] is before[n] else zero[n] for n in after}


def _closure_convert():
    def convert(f, *args):
        converted, consts = jax.closure_convert(f, *args)
        return converted(*args, *consts)

    return (lambda f: lambda x: convert(f, x)), (lambda f: lambda x, s: convert(f, x, s))


def _eval_jaxpr():
    def evaluate(f, *args):
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*args)
        flat = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), flat)

    return (lambda f: lambda x: evaluate(f, x)), (lambda f: lambda x, s: evaluate(f, x, s))


def _eval_shape():
    def stateful(f):
        return lambda x: x + len(jax.eval_shape(f, x).shape)

    def by_hand(f):
        return lambda x, s: (x + len(jax.eval_shape(f, x, s)[0].shape), s)

    return stateful, by_hand


def _custom_root():
    """The calls of the solve count; derivatives start from the state before it."""

    def tangent_solve(g, b):
        return b / g(jnp.float32(1))

    def stateful(f):
        def solve(g, x0):
            return lax.fori_loop(0, 5, lambda _, y: y - g(y), x0)

        return lambda x: lax.custom_root(lambda y: y - 0.1 * f(y) - x, x, solve, tangent_solve)

    def by_hand(f):
        def run(x, s):
            def turn(_, carry):
                y, s = carry
                f_y, s = f(y, s)
                return y - (y - 0.1 * f_y - x), s

            def solve(_, x0):
                y, after = lax.fori_loop(0, 5, turn, (x0, s))
                return y, _as_auxiliary(after)

            root = lax.custom_root(
                lambda y: y - 0.1 * f(y, s)[0] - x, x, solve, tangent_solve, has_aux=True
            )
            return root[0], _from_auxiliary(root[1], s)

        return run

    return stateful, by_hand


def _linear_solve():
    """An operator that does not depend linearly on anything but its argument."""

    def factor(y):
        return 2 + 0.1 * jnp.tanh(y)

    def stateful(f):
        def run(x):
            def solve(matvec, b):
                return b / matvec(jnp.float32(1))

            return lax.custom_linear_solve(
                lambda v: v * factor(f(jnp.float32(0.3))), x, solve, solve
            )

        return run

    def by_hand(f):
        def run(x, s):
            # What the solve leaves in the state has no derivative. It could be handed out as the
            # auxiliary result, but where only that has a cotangent JAX's rule fails.
            fixed = lax.stop_gradient(s)

            def solve(_, b):
                return b / factor(f(jnp.float32(0.3), fixed)[0])

            def matvec(v):
                # JAX's rule fails for an operator that moves in no direction at all.
                return v * (factor(f(jnp.float32(0.3), s)[0]) + 0 * s["v"])

            y = lax.custom_linear_solve(matvec, x, solve, solve)
            _, after = f(jnp.float32(0.3), fixed)
            return y, same_update(s, **lax.stop_gradient(_only_changed(after)))

        return run

    return stateful, by_hand


def _as_auxiliary(s):
    """What has changed, as floats: JAX 0.10 has no derivatives of functions with integers beside.

    What has not changed does not go through a solver, which would take its derivative for zero.
    """
    return {name: jnp.float32(x) for name, x in _only_changed(s).items()}


def _only_changed(s):
    return {name: s[name] for name in sorted(_changed)}


def _from_auxiliary(floats, s):
    return same_update(s, **{name: x.astype(s[name].dtype) for name, x in floats.items()})


_changed: set[str] = set()


@contextlib.contextmanager
def changing(names):
    """While the program of an operation that changes these parts of the state runs by hand."""
    _changed.update(names)
    try:
        yield
    finally:
        _changed.clear()


def _map():
    def stateful(f):
        return lambda x: lax.map(f, jnp.stack([x, 2 * x, 3 * x])).sum()

    def by_hand(f):
        def run(x, s):
            def turn(s, x):
                y, s = f(x, s)
                return s, y

            s, ys = lax.scan(turn, s, jnp.stack([x, 2 * x, 3 * x]))
            return ys.sum(), s

        return run

    return stateful, by_hand


def _both(transform):
    return transform, transform


def _jit_twice():
    """One cached function, called twice."""

    def stateful(f):
        g = jax.jit(f)
        return lambda x: g(g(x))

    def by_hand(f):
        g = jax.jit(f)
        return lambda x, s: g(*g(x, s))

    return stateful, by_hand


dots = jax.checkpoint_policies.dots_saveable
nothing = jax.checkpoint_policies.nothing_saveable

TRANSFORMATIONS = [
    _simple("jit", *_both(jax.jit)),
    _simple("jit_jit", *_both(lambda f: jax.jit(jax.jit(f)))),
    _simple("jit_twice", *_jit_twice()),
    _simple("scan", *_scan()),
    _simple("scan_reverse", *_scan(reverse=True)),
    _simple("scan_unroll", *_scan(unroll=2)),
    _simple("fori", *_loop(lambda f, c: lax.fori_loop(0, 3, lambda _, c: f(c), c))),
    _simple(
        "fori_traced", *_loop(lambda f, c: lax.fori_loop(0, jnp.int32(3), lambda _, c: f(c), c))
    ),
    _simple("while_body", *_while_body()),
    _simple("while_cond", *_while_cond()),
    _simple("cond_true", *_branch(lambda f, g, x, c: lax.cond(x > -100, f, g, c))),
    _simple("cond_false", *_branch(lambda f, g, x, c: lax.cond(x < -100, f, g, c))),
    _simple("switch", *_branch(lambda f, g, x, c: lax.switch((x > -100) + 0, [g, f, g], c))),
    _simple("map", *_map()),
    _simple("checkpoint", *_both(jax.checkpoint)),
    _simple("checkpoint_policy", *_both(lambda f: jax.checkpoint(f, policy=dots))),
    _simple("checkpoint_nothing", *_both(lambda f: jax.checkpoint(f, policy=nothing))),
    _simple("grad", *_region(lambda f, x: jax.grad(f, has_aux=True)(x))),
    _simple("value_and_grad", *_region(_value_and_grad)),
    _simple("jvp", *_region(_jvp)),
    _simple("vjp", *_region(_vjp)),
    _simple("linearize", *_region(_linearize)),
    _simple("jacrev", *_region(lambda f, x: jax.jacrev(f, has_aux=True)(x))),
    _simple("jacfwd", *_region(_jacfwd, _along_the_only_direction))._replace(directions=True),
    _simple(
        "hessian",
        *_region(_hessian_like, partial(_hessian_like, forward=_along_the_only_direction)),
    )._replace(directions=True),
    Transformation("vmap", *_vmap(), lanes=True),
    Transformation("vmap_axis_name", *_vmap(axis_name="i"), lanes=True),
    _simple("custom_jvp", *_custom_jvp()),
    _simple("custom_vjp", *_custom_vjp()),
    _simple("closure_convert", *_closure_convert()),
    _simple("eval_jaxpr", *_eval_jaxpr()),
    _simple("eval_shape", *_eval_shape()),
    _simple("custom_root", *_custom_root()),
    _simple("linear_solve", *_linear_solve()),
]
