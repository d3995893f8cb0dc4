"""Interceptors, sown values, hooks, streams and variables together, in several transformations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxstate

KEY = jax.random.key(0)
normal = jax.nn.initializers.normal()


def close(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


@jaxstate.parametrized
def dense(x):
    return x @ jaxstate.param("w", normal, (3, 3))


def sown_output(next_fun, args, kwargs, context):
    return jaxstate.sow("out", next_fun(*args, **kwargs), mode="append")


@pytest.mark.parametrize("run", [jaxstate.reap, lambda f, **kw: jax.jit(jaxstate.reap(f, **kw)),
                                 lambda f, **kw: jaxstate.reap(jax.jit(f), **kw)],
                         ids=["eagerly", "jit of reap", "reap of jit"])  # fmt: skip
def test_an_interceptor_in_a_scan_in_a_vmap_is_reaped_and_planted(run):
    def lane(x):
        def turn(x, _):
            with jaxstate.intercept(sown_output):
                return jnp.tanh(dense(x)), None

        return lax.scan(turn, x, length=2)[0]

    net = jaxstate.parametrized(lambda xs: jax.vmap(lane)(xs), name="net")
    xs = jax.random.normal(KEY, (4, 3))
    params = net.init(KEY, xs)
    w = params["dense"]["w"]
    first = xs @ w
    second = jnp.tanh(first) @ w
    y, sown = run(net.apply, nested=True)(params, xs)
    close(y, jnp.tanh(second))
    close(sown, {"dense": {"out": jnp.stack([first, second], 1)}})
    planted = jaxstate.plant(net.apply, nested=True)
    slope = jax.grad(lambda sown: planted(sown, params, xs).sum())(sown)["dense"]["out"]
    close(slope[:, 1], 1 - jnp.tanh(second) ** 2)


def test_a_hook_makes_parameters_in_a_stack_of_ensembles():
    members = jaxstate.ensemble(dense, 2)
    block = jaxstate.parametrized(lambda x: jnp.tanh(members(x).sum(0)), name="block")
    deep = jaxstate.stack(block, 3)

    def scaled(next_fun, args, kwargs, context):
        value = next_fun(*args, **kwargs)
        if context.name != "w":
            return value
        return 2 * jaxstate.param("gain", jax.nn.initializers.ones, ()) * value

    x = jax.random.normal(KEY, (5, 3))
    with jaxstate.intercept(params=scaled):
        params = deep.init(KEY, x[0])
        loss = lambda p: jax.vmap(deep.apply, (None, 0))(p, x).sum()  # noqa: E731
        found = jax.jit(jax.grad(loss))(params)

    def by_hand(params):
        p, y = params["layers"]["ensemble"]["members"], x
        for i in range(3):
            y = jnp.tanh(sum(y @ (2 * p["gain"][i, j] * p["w"][i, j]) for j in range(2)))
        return y.sum()

    close(found, jax.grad(by_hand)(params))


def test_one_compiled_loop_with_and_without_its_stream():
    def noisy(x):
        key = jaxstate.next_key("noise", default=None)
        return x if key is None else x + jax.random.uniform(key)

    inner = jax.jit(noisy)
    loop = jax.jit(lambda x: lax.scan(lambda x, _: (inner(x), None), x, length=2)[0])
    keys = [jax.random.fold_in(KEY, n) for n in range(2)]
    wanted = sum(jax.random.uniform(key) for key in keys)
    net = jaxstate.parametrized(
        lambda x: loop(x) * jaxstate.param("w", jax.nn.initializers.ones, ()), name="net"
    )
    params, apply = net.init(KEY, 0.0), jax.jit(net.apply)
    for _ in range(2):
        assert loop(0.0) == apply(params, 0.0) == apply(params, 0.0, key=KEY) == 0
        close(apply(params, 0.0, key={"noise": KEY}), wanted)
        with jaxstate.rng_stream(KEY, "noise") as stream:
            close(jax.value_and_grad(jax.checkpoint(loop))(0.0), (wanted, jnp.float32(1)))
            assert stream.count == 2
            lanes = jax.vmap(loop)(jnp.zeros(2))
            assert lanes[0] != lanes[1] and stream.count == 3
        assert (jax.vmap(loop)(jnp.zeros(2)) == 0).all()


def test_lanes_of_three_vmaps_and_turns_of_loops_merge():
    @jaxstate.parametrized
    def measure(x):
        v = jaxstate.variable(
            "v", lambda: {"sum": 0.0, "most": -jnp.inf}, reduce={"sum": jnp.sum, "most": jnp.max}
        )
        u = jaxstate.variable("u", normal, (3,), takes_key=True, reduce=jnp.mean)
        v.value = {"sum": x, "most": x}
        u.value = 2 * u.value + x
        return x

    def turns(x):
        return lax.scan(lambda c, _: (c, measure(x)), 0, length=2)[1][-1]

    net = jaxstate.parametrized(lambda x: jax.vmap(jax.vmap(jax.vmap(turns)))(x), name="net")
    x = jax.random.normal(KEY, (2, 3, 5))
    _, state = net.init_with_state(KEY, x)
    u = state["measure"]["u"]
    assert len(set(u.tolist())) == 3
    _, after = jax.jit(net.apply_with_state)({}, state, x)
    wanted = {"v": {"sum": x.sum(), "most": x.max()}, "u": 4 * u + 3 * x.mean()}
    close(after["measure"], wanted)
