"""Writable arrays among other state: stateful traces, slots, variables, sown values."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate.extend import StatefulTrace, new_slot, new_trace, read, write

X = jnp.arange(4.0)
EITHER_WAY = pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


class CountSines(StatefulTrace):
    def process_primitive(self, primitive, args, params):
        if primitive.name == "sin":
            self.state["n"] = self.state["n"] + 1
        return super().process_primitive(primitive, args, params)


class CountInPlace(StatefulTrace):
    def process_primitive(self, primitive, args, params):
        if primitive.name == "sin":
            counts = self.state["n"]
            counts += 1
        return super().process_primitive(primitive, args, params)


def counting(count=CountSines, start=0):
    return new_trace(count, state={"n": jnp.asarray(start, jnp.int32)})


def writes(x):
    """Four sines."""
    x[0] = jnp.sin(x[1])

    def body(i, _):
        x[i + 1] += jnp.sin(x[i])

    jax.lax.fori_loop(0, 3, body, None)
    v = x[1:3]
    v *= 2
    return x


def writes_in_numpy(x):
    x = np.array(x)
    x[0] = np.sin(x[1])
    for i in range(3):
        x[i + 1] += np.sin(x[i])
    x[1:3] *= 2
    return x


# -- Stateful traces -------------------------------------------------------------------------


@EITHER_WAY
def test_an_inplace_function_under_a_trace(jitted):
    f = jaxstate.inplace(writes)
    with counting() as trace:
        y = (jax.jit(f) if jitted else f)(X)
    assert_close(y, writes_in_numpy(X))
    assert trace.state["n"] == 4


@pytest.mark.parametrize("inside", [False, True])
def test_lanes_of_an_inplace_function_under_a_trace(inside):
    f = jaxstate.inplace(jax.vmap(writes)) if inside else jax.vmap(jaxstate.inplace(writes))
    with counting() as trace:
        y = f(jnp.stack([X, 2 * X]))
    assert_close(y, [writes_in_numpy(X), writes_in_numpy(2 * X)])
    assert trace.state["n"] == 4


def test_gradient_of_an_inplace_function_under_a_trace():
    with counting():
        found = jax.grad(lambda x: jaxstate.inplace(writes)(x).sum())(X)

    def functional(x):
        x = x.at[0].set(jnp.sin(x[1]))
        for i in range(3):
            x = x.at[i + 1].add(jnp.sin(x[i]))
        return x.at[1:3].mul(2).sum()

    assert_close(found, jax.grad(functional)(X))


@EITHER_WAY
def test_a_trace_in_an_inplace_function(jitted):
    @jaxstate.inplace
    def f(x):
        with counting() as trace:
            v = x[1:]
            y = x.copy()
            writes(x)
        v[0] += 5
        y[0] += 10
        return x, y, trace.state["n"]

    x, y, n = (jax.jit(f) if jitted else f)(X)
    wanted = writes_in_numpy(X)
    wanted[1] += 5
    assert_close(x, wanted)
    assert_close(y, [10, 1, 2, 3])
    assert n == 4


@EITHER_WAY
def test_loops_of_a_trace_write_what_they_have_read(jitted):
    @jaxstate.inplace
    def f(x):
        def body(c):
            x[0] = x[0] + jnp.sin(c)
            return c + 1

        with counting() as trace:
            jax.lax.while_loop(lambda c: c + 0 * x[0] < 3, body, 0.0)
            jax.lax.scan(lambda _, c: (None, body(c)), None, jnp.arange(2.0))
        return x, trace.state["n"]

    x, n = (jax.jit(f) if jitted else f)(X)
    assert_close(x[0], np.sin(0) + np.sin(1) + np.sin(2) + np.sin(0) + np.sin(1))
    assert n == 5


@EITHER_WAY
def test_branches_and_jitted_functions_of_a_trace_write(jitted):
    @jaxstate.inplace
    def f(x):
        def double():
            x[:] = jnp.sin(x)

        with counting() as trace:
            v = x[1:]
            jax.lax.cond(x[1] > 0, double, lambda: None)
            jax.jit(lambda: v.__setitem__(0, jnp.sin(v[1])))()
        v[1] += 3
        return x, trace.state["n"]

    x, n = (jax.jit(f) if jitted else f)(X)
    wanted = np.sin(X)
    wanted[1] = np.sin(wanted[2])
    wanted[2] += 3
    assert_close(x, wanted)
    assert n == 2


def test_a_trace_writes_its_state_in_place():
    @jaxstate.inplace
    def f(x):
        with counting(CountInPlace, [0, 0]) as trace:
            writes(x)
            jax.jit(lambda: jnp.sin(x).sum())()
            jnp.sin(x)
        return x, trace.state["n"]

    x, n = f(X)
    assert_close(x, writes_in_numpy(X))
    assert n.tolist() == [6, 6]


def test_arrays_made_under_a_trace_outlive_it():
    a = jaxstate.array(jnp.zeros(3))

    def body(i, _):
        a[i] += jnp.sin(a[i] + i)

    with counting() as trace:
        jax.lax.fori_loop(0, 3, body, None)
        jax.jit(lambda: a.__setitem__(0, a[0] + 1))()
        b = a.copy()
        b[1] = 5
    a[1] += 1
    b[0] = 9
    assert_close(a, [1, np.sin(1) + 1, np.sin(2)])
    assert_close(b, [9, 5, np.sin(2)])
    assert trace.state["n"] == 3


def test_state_of_a_trace_is_not_at_hand_in_an_inplace_function():
    @jaxstate.inplace
    def f(x, trace):
        return x + trace.state["n"]

    with counting() as trace, pytest.raises(jaxstate.TraceStateError, match="CountSines"):
        f(X, trace)


# -- Slots, variables, sown values -----------------------------------------------------------


@EITHER_WAY
def test_slots_keep_the_values_of_their_moment(jitted):
    @jaxstate.inplace
    def f(x):
        slot = new_slot(x)
        x[0] = 9
        first = read(slot)
        write(slot, x)
        x[1] = 9
        return first, read(slot), x

    found = (jax.jit(f) if jitted else f)(X)
    assert [a.tolist() for a in found] == [[0, 1, 2, 3], [9, 1, 2, 3], [9, 9, 2, 3]]


@EITHER_WAY
def test_variables_keep_the_values_of_their_moment(jitted):
    def f(x):
        total = jaxstate.variable("total", jnp.zeros, (4,))
        x += 1
        total.value = total.value + x
        x[0] = 50
        return x

    apply = jaxstate.parametrized(jaxstate.inplace(f)).apply_with_state
    x, state = (jax.jit(apply) if jitted else apply)({}, {"total": jnp.ones(4)}, X)
    assert x.tolist() == [50, 2, 3, 4]
    assert state["total"].tolist() == [2, 3, 4, 5]


@EITHER_WAY
def test_sown_values_are_those_of_their_moment(jitted):
    @jaxstate.inplace
    def f(x):
        jaxstate.sow("first", x)

        def body(c, i):
            x[i] = x[i - 1] + c
            jaxstate.sow("steps", x, mode="append")
            return c + 1, x[i]

        _, ys = jax.lax.scan(body, 1.0, jnp.arange(1, 4))
        x[0] = 100
        return x, ys

    reaped = jaxstate.reap(f)
    (x, ys), sown = (jax.jit(reaped) if jitted else reaped)(X)
    assert x.tolist() == [100, 1, 3, 6]
    assert ys.tolist() == [1, 3, 6]
    assert sown["first"].tolist() == [0, 1, 2, 3]
    assert sown["steps"].tolist() == [[0, 1, 2, 3], [0, 1, 3, 3], [0, 1, 3, 6]]


@EITHER_WAY
def test_branches_that_only_write(jitted):
    @jaxstate.inplace
    def f(x, p):
        y = x.copy()

        def fill(value):
            y[:] = value

        def look():
            y[0] = y[1] + 5

        jax.lax.cond(p, lambda: fill(1.0), lambda: fill(2.0))
        jax.lax.cond(p, look, lambda: None)
        return y

    g = jax.jit(f) if jitted else f
    assert g(X, True).tolist() == [6, 1, 1, 1]
    assert g(X, False).tolist() == [2, 2, 2, 2]
    both = jax.vmap(g, (None, 0))(X, jnp.array([True, False]))
    assert both.tolist() == [[6, 1, 1, 1], [2, 2, 2, 2]]


# -- Jitted functions inside of bodies, on arrays that were written ---------------------------


@EITHER_WAY
def test_gradient_of_a_checkpoint_that_writes(jitted):
    @jaxstate.inplace
    def f(x):
        n = jnp.zeros(2)

        @jax.checkpoint
        def g(x):
            n[0] += x[1]
            x[0] = n[0] * n[0]
            return jnp.sin(x).sum() + jnp.where(x > 0, x, n[0]).sum()

        return g(x) + n[0]

    def functional(x):
        n = x[1]
        x = x.at[0].set(n * n)
        return jnp.sin(x).sum() + jnp.where(x > 0, x, n).sum() + n

    grad = jax.grad(f)
    assert_close((jax.jit(grad) if jitted else grad)(X + 1), jax.grad(functional)(X + 1))


# -- Custom rules in custom rules ------------------------------------------------------------


def with_custom_jvp(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), 3 * tangents[0]))
    return g


def with_custom_vjp(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda y: (f(y), None), lambda _, ct: (3 * ct,))
    return g


MODES = {
    "eager": lambda f: f,
    "jit": jax.jit,
    "vmap": jax.vmap,
    "vmap of jit": lambda f: jax.vmap(jax.jit(f)),
    "jit of vmap": lambda f: jax.jit(jax.vmap(f)),
    "vmap of vmap": lambda f: lambda x: jax.vmap(jax.vmap(f))(x[None])[0],
    "vmap of scan": lambda f: jax.vmap(
        lambda x: jax.lax.scan(lambda c, _: (c, f(x)), 0, length=1)[1][0]
    ),
}


@pytest.mark.leaks_allowed("JAX keeps the rules, which close over an array, with the jaxpr")
@pytest.mark.parametrize("rules", [with_custom_jvp, with_custom_vjp])
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES)
def test_writes_in_nested_custom_rules(mode, depth, rules):
    """Into an array from outside, and into the argument, which is the function's own."""

    def run(x, wrap):
        def body(y):
            y[0] = 5
            x[1:] += y[:3]
            y *= 2
            return y * y[1]

        for _ in range(depth):
            body = wrap(body)
        y = x * 2
        z = body(y)
        x[0] += z[1] + y[1]
        return x

    x = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
    f = MODES[mode](jaxstate.inplace(lambda x: run(x, rules)))
    by_hand = np.stack([run(row.copy(), lambda body: lambda y: body(y.copy())) for row in x])
    found = f(x) if "vmap" in mode else np.stack([f(row) for row in x])
    np.testing.assert_array_equal(found, by_hand)


@pytest.mark.leaks_allowed("JAX keeps the rules, which close over an array, with the jaxpr")
@pytest.mark.parametrize("rules", [with_custom_jvp, with_custom_vjp])
@pytest.mark.parametrize("depth", [1, 2])
@EITHER_WAY
def test_derivatives_of_nested_custom_rules_that_write(jitted, depth, rules):
    """The derivative is the outermost rule's, whatever the function writes."""

    @jaxstate.inplace
    def f(x):
        log = jaxstate.array(jnp.zeros(4))

        def body(y):
            y[0] = 5
            log[1:] += jax.lax.stop_gradient(y[:3])
            return jnp.sin(y)

        for _ in range(depth):
            body = rules(body)
        return body(2 * x).sum(), log

    grad = jax.grad(f, has_aux=True)
    for wanted, g in ((6.0, grad), (np.full((3, 4), 6.0), jax.vmap(grad))):
        x = X if g is grad else jnp.stack([X, X + 1, X + 2])
        found, log = (jax.jit(g) if jitted else g)(x)
        np.testing.assert_array_equal(found, np.broadcast_to(wanted, x.shape))
        y = 2 * np.array(x)
        y[..., 0] = 5
        np.testing.assert_array_equal(log[..., 1:], y[..., :3])


def test_a_branch_in_the_condition_of_a_loop_writes():
    @jaxstate.inplace
    def f(x):
        def condition(i):
            jax.lax.cond(i < 2, lambda i: x.__setitem__(i, 5.0), lambda i: None, i)
            return i < 2

        jax.lax.while_loop(condition, lambda i: i + 1, 0)
        return x

    for run in (f, jax.jit(f)):
        np.testing.assert_array_equal(run(jnp.ones(3)), [5, 5, 1])


def _with_jvp_rule(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), tangents[0]))
    return g


def _with_vjp_rule(f):
    g = jax.custom_vjp(f)
    g.defvjp(lambda x: (g(x), None), lambda _, ct: (ct,))
    return g


def _on_devices(f):
    spec = jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.shard_map(f, mesh=mesh, in_specs=spec, out_specs=spec)


FIRST_USES = {
    "custom_jvp": lambda f: jax.jit(jax.grad(lambda x: _with_jvp_rule(f)(x).sum())),
    "custom_vjp": lambda f: jax.jit(jax.grad(lambda x: _with_vjp_rule(f)(x).sum())),
    "shard_map": _on_devices,
    "jit, shard_map": lambda f: jax.jit(_on_devices(f)),
    "checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
}


@pytest.mark.parametrize("transform", FIRST_USES.values(), ids=FIRST_USES)
def test_an_array_from_outside_is_state_before_anything_has_used_it(transform):
    gc.collect()  # slots of other tests are state too
    calls = jaxstate.array(jnp.zeros(2))

    def f(x):
        calls[1] += 1
        return 2 * x

    transform(f)(jnp.arange(3.0))
    np.testing.assert_array_equal(calls, [0, 1])
