"""Variables under derivatives, custom rules, lanes and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import jaxstate
from jaxstate_tests.params.counting import (
    KEY,
    assert_same,
    both,
    refusal,
)

# -- Derivatives -----------------------------------------------------------------------------


def through_a_variable(x):
    """x ** 4, by way of a variable that is written, updated in a loop and read under jit."""
    v = jaxstate.variable("v", jnp.ones, ())
    v.value = x

    def body(c, _):
        v.value = v.value * x
        return c, None

    lax.scan(body, 0.0, length=2)
    return jax.jit(lambda: v.value * x)()


@pytest.mark.parametrize(
    "derivative, wanted",
    [
        (jax.grad, 32.0),
        (jax.jacfwd, 32.0),
        (lambda f: jax.grad(jax.checkpoint(f)), 32.0),
        (lambda f: jax.grad(jax.jit(f)), 32.0),
        (lambda f: lambda x: jax.linearize(f, x)[1](1.0), 32.0),
        (lambda f: jax.grad(jax.grad(f)), 48.0),
        (lambda f: jax.jacfwd(jax.jacrev(f)), 48.0),
    ],
)
def test_gradients_flow_through_a_variable_and_what_leaves_is_the_value(derivative, wanted):
    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.ones, ())
        g = derivative(through_a_variable)(x)
        return g, v.value  # outside of the region: the value

    for apply in both(net.apply_with_state):
        out, state = apply({}, {"v": 5.0}, 2.0)
        assert_same(out, (jnp.float32(wanted), jnp.float32(8.0)))
        assert_same(state, {"v": jnp.float32(8.0)})


def test_derivatives_with_respect_to_the_given_state():
    net = jaxstate.parametrized(
        lambda x: lax.fori_loop(0, 3, lambda i, x: accumulate(x), x), name="net"
    )

    def accumulate(x):
        v = jaxstate.variable("v", jnp.ones, ())
        v.value = v.value * x
        return jnp.sin(v.value + x)

    def by_hand(v, x):
        for _ in range(3):
            v = v * x
            x = jnp.sin(v + x)
        return x, v

    def loss(v, x):
        y, state = net.apply_with_state({}, {"v": v}, x)
        return y * state["v"]

    def loss_by_hand(v, x):
        y, v = by_hand(v, x)
        return y * v

    for f in both(jax.grad(loss, (0, 1))):
        wanted = jax.grad(loss_by_hand, (0, 1))(1.5, 0.5)
        np.testing.assert_allclose(f(1.5, 0.5), wanted, rtol=1e-5)


# -- Custom rules ----------------------------------------------------------------------------


def with_rule(kind, f):
    """``f`` with a rule that is not its derivative, so that losing it shows."""
    if kind == "custom_jvp":
        g = jax.custom_jvp(lambda x: f(x))
        g.defjvp(lambda p, t: (f(*p), 3 * t[0]))
    else:
        g = jax.custom_vjp(lambda x: f(x))
        g.defvjp(lambda x: (f(x), None), lambda _, ct: (3 * ct,))
    return g


@pytest.mark.parametrize("kind", ["custom_jvp", "custom_vjp"])
def test_custom_rules_keep_their_rule_and_move_variables_once(kind):
    @jaxstate.parametrized
    def net(x):
        outer = jaxstate.variable("outer", jnp.zeros, ())

        def f(x):
            n = jaxstate.variable("n", jnp.zeros, ())
            n.value = n.value + x
            outer.value = outer.value + n.value
            return x * n.value

        g = with_rule(kind, f)
        value = lax.scan(lambda c, _: (g(c), None), x, length=2)[0]
        return value, jax.grad(lambda x: g(x))(x)

    def by_hand(x):
        n, outer, c = 0.0, 0.0, x
        for _ in range(2):
            n = n + c
            outer, c = outer + n, c * n
        n = n + x
        return {"n": n, "outer": outer + n}, c

    params, state = net.init_with_state(KEY, 1.5)
    wanted, value = by_hand(jnp.float32(1.5))
    for apply in both(net.apply_with_state):
        (y, g), new = apply(params, state, 1.5)
        assert_same(new, wanted)
        assert (float(y), float(g)) == (float(value), 3.0)


# -- Lanes -----------------------------------------------------------------------------------


def test_lanes_read_and_write_what_is_the_same_for_all():
    @jaxstate.parametrized
    def net(xs):
        n = jaxstate.variable("n", jnp.zeros, ())

        def lane(x):
            n.value = n.value + lax.pmean(x, "i")
            return x - n.value

        return jax.vmap(jax.jit(lane), axis_name="i")(xs)

    xs = jnp.arange(4.0)
    for apply in both(net.apply_with_state):
        assert_same(apply({}, {"n": 1.0}, xs), (xs - 2.5, {"n": jnp.float32(2.5)}))


def reducing(f, reduce):
    """``f(x, v) -> (y, v)`` by way of a variable, in each of a few transformations of it."""

    def one(x):
        v = jaxstate.variable("v", jnp.ones, (), reduce=reduce)
        y, v.value = f(x, v.value)
        return y + v.value

    def one_by_hand(x, v):
        y, v = f(x, v)
        return y + v, v

    def twice(x):
        return one(one(x))

    def twice_by_hand(x, v):
        return one_by_hand(*one_by_hand(x, v))

    yield "once", one, one_by_hand
    yield "twice", twice, twice_by_hand
    yield "jit", jax.jit(twice), twice_by_hand
    yield "scan", lambda x: lax.scan(lambda c, _: (one(c), None), x, length=2)[0], twice_by_hand
    yield (
        "cond",
        lambda x: lax.cond(x > 1.5, twice, lambda x: -x, x),
        lambda x, v: lax.cond(x > 1.5, twice_by_hand, lambda x, v: (-x, v), x, v),
    )
    yield (
        "while",
        lambda x: lax.while_loop(lambda x: x < 9, one, x),
        lambda x, v: lax.while_loop(lambda c: c[0] < 9, lambda c: one_by_hand(*c), (x, v)),
    )
    yield "checkpoint", jax.checkpoint(twice), twice_by_hand
    yield (
        "grad",
        jax.grad(twice),
        lambda x, v: jax.grad(twice_by_hand, has_aux=True)(x, v),
    )


CASES = list(reducing(lambda x, v: (x + 0.5 * v, 0.5 * v * x), jnp.mean))


@pytest.mark.parametrize("name, lane, by_hand", CASES, ids=[name for name, *_ in CASES])
@pytest.mark.parametrize("nested", [False, True])
def test_reduce_makes_one_value_of_the_lanes_values(name, lane, by_hand, nested):
    """Each lane goes on with its own value inside, as by hand; outside is the reduction."""

    @jaxstate.parametrized
    def net(xs):
        f = jax.vmap(jax.vmap(lane)) if nested else jax.vmap(lane)
        y = f(xs)
        return y, jaxstate.variable("v", jnp.ones, ()).value

    def net_by_hand(xs, v):
        f = by_hand
        for _ in range(1 + nested):
            f = with_mean(f)
        y, v = f(xs, v)
        return (y, v), {"v": v}

    def with_mean(f):
        def run(xs, v):
            ys, vs = jax.vmap(f, (0, None))(xs, v)
            return ys, jnp.mean(vs, axis=0)

        return run

    xs = jnp.arange(1.0, 5.0)
    xs = jnp.stack([xs, 2 * xs]) if nested else xs
    wanted = net_by_hand(xs, jnp.float32(2.0))
    for apply in both(net.apply_with_state):
        assert_same(apply({}, {"v": 2.0}, xs), wanted, rtol=1e-5)

    def loss(xs, v):
        (y, v), _ = net.apply_with_state({}, {"v": v}, xs)
        return y.sum() + v**2

    def loss_by_hand(xs, v):
        (y, v), _ = net_by_hand(xs, v)
        return y.sum() + v**2

    if name != "while":
        wanted = jax.grad(loss_by_hand, (0, 1))(xs, 2.0)
        for gradient in both(jax.grad(loss, (0, 1))):
            assert_same(gradient(xs, 2.0), wanted, rtol=1e-5)


@pytest.mark.parametrize("kind", ["custom_jvp", "custom_vjp"])
@pytest.mark.parametrize("order", ["vmap(grad(rule))", "grad(rule(vmap))", "grad(vmap(rule))"])
def test_reduce_in_functions_with_custom_rules(kind, order):
    @jaxstate.parametrized
    def net(xs):
        v = jaxstate.variable("v", jnp.ones, (), reduce=jnp.mean)

        def f(x):
            v.value = v.value * x
            return v.value + x

        if order == "vmap(grad(rule))":
            return jax.vmap(jax.grad(with_rule(kind, f)))(xs), v.value
        g = with_rule(kind, jax.vmap(f)) if "rule(vmap" in order else jax.vmap(with_rule(kind, f))
        return jax.grad(lambda xs: g(xs).sum())(xs), v.value

    xs = jnp.arange(3.0)
    wanted = (jnp.full(3, 3.0), jnp.float32(2.0)), {"v": jnp.float32(2.0)}
    for apply in both(net.apply_with_state):
        assert_same(apply({}, {"v": 2.0}, xs), wanted)


def test_lanes_in_a_loop_start_from_what_the_last_lanes_left():
    @jaxstate.parametrized
    def net(xs):
        def body(c, _):
            v = jaxstate.variable("v", lambda: {"a": 1.0}, reduce=jnp.mean)

            def lane(x):
                v.value = {"a": v.value["a"] * x + c}
                return v.value["a"]

            ys = jax.vmap(lane)(xs)
            return c + v.value["a"] + ys.sum(), ys

        return lax.scan(body, 0.5, length=3)

    def by_hand(v, xs):
        def body(carry, _):
            c, v = carry
            ys = v * xs + c
            v = ys.mean()
            return (c + v + ys.sum(), v), ys

        (c, v), ys = lax.scan(body, (0.5, v), length=3)
        return (c, ys), {"v": {"a": v}}

    xs = jnp.arange(3.0)
    for apply in both(net.apply_with_state):
        wanted = by_hand(jnp.float32(1.5), xs)
        assert_same(apply({}, {"v": {"a": 1.5}}, xs), wanted, rtol=1e-5)


def test_an_explicit_apply_inside_has_its_own_state():
    @jaxstate.parametrized
    def inner(x):
        n = jaxstate.variable("n", jnp.zeros, ())
        n.value = n.value + x
        return n.value

    @jaxstate.parametrized
    def net(x):
        n = jaxstate.variable("n", jnp.zeros, ())
        n.value = n.value + 10
        y, explicit = inner.apply_with_state({}, {"n": x}, 1.0)
        apply = jax.vmap(inner.apply_with_state, (None, 0, None))
        _, lanes = jax.jit(apply)({}, {"n": jnp.arange(3.0)}, y)
        return inner(y), explicit, lanes, n.value

    state = {"n": jnp.float32(1), "inner": {"n": jnp.float32(2)}}
    for apply in both(net.apply_with_state):
        y = jnp.float32(6)
        wanted = y + 2, {"n": y}, {"n": jnp.arange(3.0) + y}, jnp.float32(11)
        left = {"n": jnp.float32(11), "inner": {"n": y + 2}}
        assert_same(apply({}, state, 5.0), (wanted, left))


def test_reduce_is_for_values_that_differ_and_sees_them_once():
    seen = []

    def total(values, axis):
        seen.append(values.shape)
        return values.sum(axis)

    @jaxstate.parametrized
    def net(xs):
        hits = jaxstate.variable("hits", jnp.zeros, (), reduce=total)

        def lane(x):
            hits.value = x
            differs = hits.value
            hits.value = 7.0
            return differs + hits.value

        jax.vmap(lane)(xs)
        before = hits.value

        def last(x):
            hits.value = x

        jax.vmap(last, axis_name="i")(xs)
        return before

    out, state = net.apply_with_state({}, {"hits": 1.0}, jnp.arange(3.0))
    assert_same((out, state), (jnp.float32(7), {"hits": jnp.float32(3)}))
    assert seen == [(3,), (3,)]


def test_a_state_per_lane_outside_of_apply():
    params, state = {}, {"n": jnp.arange(3.0)}

    @jaxstate.parametrized
    def net(x):
        n = jaxstate.variable("n", jnp.zeros, ())
        lax.fori_loop(0, 2, lambda i, _: setattr(n, "value", n.value + x), None)
        return lax.cond(x > 1, lambda: n.value, lambda: 0.0)

    xs = jnp.arange(3.0)
    for apply in both(jax.vmap(net.apply_with_state, (None, 0, 0))):
        assert_same(apply(params, state, xs), (jnp.array([0.0, 0.0, 6.0]), {"n": 3 * xs}))
    _, states = jax.vmap(net.init_with_state, (None, 0))(KEY, xs)
    assert_same(states, {"n": jnp.zeros(3)})


def test_hessian_and_jacfwd_write_values_not_directions():
    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, (3,), reduce=jnp.sum)

        def f(x):
            v.value = v.value + x**2
            return (v.value * x).sum()

        return jax.hessian(f)(x), jax.jacfwd(f)(x)

    def by_hand(x, v):
        def f(x, v):
            return ((v + x**2) * x).sum(), v + x**2

        h = jax.hessian(lambda x: f(x, v)[0])(x)
        v = f(x, v)[1]
        g = jax.jacfwd(lambda x: f(x, v)[0])(x)
        return (h, g), {"v": f(x, v)[1]}

    x = jnp.arange(1.0, 4.0)
    for apply in both(net.apply_with_state):
        assert_same(apply({}, {"v": jnp.ones(3)}, x), by_hand(x, jnp.ones(3)), rtol=1e-5)


# -- Devices ---------------------------------------------------------------------------------


def test_devices_read_a_replicated_variable():
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = PartitionSpec("d")

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.ones, ())
        return jax.shard_map(lambda x: x * v.value, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    for f in (net, jaxstate.parametrized(jax.jit(net.fn))):
        assert_same(f.apply({}, jnp.arange(4.0), state={"v": 2.0}), 2 * jnp.arange(4.0))
    out, _ = net.apply_with_state({}, {"v": 2.0}, jnp.arange(4.0))
    assert_same(out, 2 * jnp.arange(4.0))


@refusal
def test_a_value_of_one_device_is_not_one_for_all():
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = PartitionSpec("d")

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.ones, ())

        def on_device(x):
            v.value = x.sum()
            return x

        return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    for apply in both(net.apply_with_state):
        with pytest.raises(jaxstate.DeviceWriteError, match="variable 'v'"):
            apply({}, {"v": 0.0}, jnp.ones(2))
    with pytest.raises(jaxstate.DeviceWriteError, match="variable 'v'"):
        net.init_with_state(KEY, jnp.ones(2))


def test_devices_write_one_value():
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))
    spec = PartitionSpec("d")

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.ones, ())

        def on_device(x):
            v.value = 0.5 * v.value + lax.psum(x.sum(), "d")
            return x * v.value

        return jax.shard_map(on_device, mesh=mesh, in_specs=spec, out_specs=spec)(x)

    x = jnp.arange(4.0)
    assert_same(net.init_with_state(KEY, x)[1], {"v": jnp.float32(1)})
    for apply in both(net.apply_with_state):
        assert_same(apply({}, {"v": 2.0}, x), (7 * x, {"v": jnp.float32(7)}))


@refusal
@pytest.mark.parametrize("reduce", [None, jnp.sum])
@pytest.mark.parametrize(("results", "spec", "says"), [
    (lambda x, n: {"y": x, "n": n}, {"y": PartitionSpec(), "n": PartitionSpec()},
     r"(?s)require replication.*out_specs\['y'\] is P\(\)"),
    (lambda x, n: (n, x), PartitionSpec("d"), r"(?s)too long.*\[0\].* has rank 0"),
], ids=["replication", "rank"])  # fmt: skip
def test_jax_says_which_results_of_devices_that_write_do_not_fit(results, spec, says, reduce):
    mesh = Mesh(np.array(jax.devices()[:1]), ("d",))

    @jaxstate.parametrized
    def net(x):
        v = jaxstate.variable("v", jnp.zeros, (), reduce=reduce)

        def on_device(x):
            v.value = v.value + 1
            return results(x, v.value)

        return jax.shard_map(on_device, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=spec)(x)

    runs = (
        lambda: net.init_with_state(KEY, jnp.ones(2)),
        lambda: jax.jit(net.apply_with_state)({}, {"v": 0.0}, jnp.ones(2)),
    )
    for run in runs:
        with pytest.raises(ValueError, match=says):
            run()
