"""Where parameters are made, and which initializers are the same."""

import hashlib
from functools import partial, update_wrapper, wraps

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.core.test_matrix import initial_parameter
from jaxstate_tests.params.networks import (
    assert_trees_close,
    assert_trees_equal,
    dense,
    dense_by_hand,
    lecun,
    net,
    net_by_hand,
    normal,
    scaled,
    shapes,
)

# -- Birth -----------------------------------------------------------------------------------


def births():
    def while_body(f, x):
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, f(c[1])), (0, x))[1]

    def deep(f, x):
        def lane(x):
            turn = jax.checkpoint(jax.jit(f))
            return jax.lax.scan(lambda c, _: (turn(c), None), x, None, length=2)[0]

        return jax.jit(jax.vmap(lane))(jnp.stack([x, x]))[0]

    def while_cond(f, x):
        return jax.lax.while_loop(
            lambda c: (c[0] < 3) & (f(c[1]) < 1e9), lambda c: (c[0] + 1, c[1]), (0, x)
        )[1]

    def custom_jvp(f, x):
        @jax.custom_jvp
        def g(x):
            return f(x)

        g.defjvp(lambda p, t: (g(*p), t[0]))
        return g(x)

    def custom_vjp(f, x):
        @jax.custom_vjp
        def g(x):
            return f(x)

        g.defvjp(lambda x: (g(x), None), lambda _, ct: (ct,))
        return g(x)

    return {
        "plain": lambda f, x: f(x),
        "jit": lambda f, x: jax.jit(f)(x),
        "scan": lambda f, x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
        "while_body": while_body,
        "while_cond": while_cond,
        "branch": lambda f, x: jax.lax.cond(x < -1e9, f, lambda x: x, x),
        "both_branches": lambda f, x: jax.lax.cond(x < 0, f, lambda x: 2 * f(x), x),
        "vmap": lambda f, x: jax.vmap(f)(jnp.stack([x, x]))[0],
        "grad": lambda f, x: jax.grad(f)(x),
        "checkpoint": lambda f, x: jax.checkpoint(f)(x),
        "custom_jvp": custom_jvp,
        "custom_vjp": custom_vjp,
        "closure_convert": lambda f, x: (lambda g, c: g(x, *c))(*jax.closure_convert(f, x)),
        "deep": deep,
    }  # fmt: skip


@pytest.mark.parametrize("where", births())
def test_a_parameter_can_be_born_anywhere(key, where):
    net = jaxstate.parametrized(lambda x: births()[where](scaled(), x))
    wanted = {"scale": {"s": initial_parameter(key, "scale/s")}}
    assert_trees_equal(net.init(key, 0.5), wanted)
    assert_trees_equal(jax.jit(net.init)(key, 0.5), wanted)
    by_hand = births()[where](lambda x: x * wanted["scale"]["s"], 0.5)
    np.testing.assert_allclose(net.apply(wanted, 0.5), by_hand, rtol=1e-6)


def test_init_does_nothing_of_the_forward_pass(key, capfd):
    def forward(x):
        jax.debug.print("forward {x}", x=x)
        y = jax.pure_callback(lambda x: 1 / 0, jax.ShapeDtypeStruct((), jnp.float32), x)
        return y * jaxstate.param("s", normal, ())

    net = jaxstate.parametrized(forward)
    net.init(key, 1.0)
    jax.effects_barrier()
    assert capfd.readouterr().out == ""
    jaxpr = jax.make_jaxpr(net.init)(key, 1.0)
    assert "callback" not in str(jaxpr) and "debug" not in str(jaxpr)


def test_init_from_shapes_and_eval_shape(key):
    x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
    params = net.init(key, x)
    assert_trees_equal(params, net.init(key, jnp.ones((4, 8))))
    assert shapes(jax.eval_shape(net.init, key, x)) == shapes(params)


def test_vmap_of_init_makes_an_ensemble(key):
    x, keys = jnp.ones((4, 8)), jax.random.split(key, 3)
    ensemble = jax.vmap(net.init, (0, None))(keys, x)
    assert_trees_equal(jax.tree.map(lambda a: a[1], ensemble), net.init(keys[1], x))
    ys = jax.vmap(net.apply, (0, None))(ensemble, x)
    wanted = net_by_hand(jax.tree.map(lambda a: a[1], ensemble), x)
    np.testing.assert_allclose(ys[1], wanted, rtol=1e-5)


def test_init_with_out_shardings(key):
    mesh = jax.make_mesh((1,), ("model",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.jit(net.init, out_shardings=sharding)(key, jnp.ones((4, 8)))
    assert all(leaf.sharding == sharding for leaf in jax.tree.leaves(params))


def test_an_initializer_that_looks_at_data(key):
    x = jnp.arange(16.0).reshape(2, 8)

    @jaxstate.parametrized
    def f(x):
        @jax.jit
        def whiten(x):
            x = dense(8)(x)
            return x - jaxstate.param("mean", lambda key: x.mean(0))

        x = whiten(x)

        def body(c, _):
            return c / jaxstate.param("std", lambda key, x: x.std(0), x), None

        return jax.lax.scan(body, x, None, length=2)[0]

    p = f.init(key, x)
    y = dense_by_hand(p["dense"], x)
    np.testing.assert_allclose(p["mean"], y.mean(0), rtol=1e-5)
    np.testing.assert_allclose(p["std"], (y - y.mean(0)).std(0), rtol=1e-5)
    np.testing.assert_allclose(f.apply(p, x), (y - p["mean"]) / p["std"] ** 2, rtol=1e-4)
    assert_trees_close(jax.jit(f.init)(key, x), p)


@pytest.mark.leaks_allowed("the checker reports tracers in the traceback of the expected error")
def test_data_out_of_a_loop_or_a_lane_is_a_clear_error(key):
    def in_scan(x):
        def body(c, x):
            return c + x * jaxstate.param("s", lambda key: x), None

        return jax.lax.scan(body, 0.0, x)[0]

    def in_lane(x):
        return jax.vmap(lambda x: x * jaxstate.param("s", lambda key: x))(x)

    for f, match in ((in_scan, "comes out of a loop"), (in_lane, "differs between the lanes")):
        with pytest.raises(jaxstate.InitializerDataError, match=match):
            jaxstate.parametrized(f).init(key, jnp.ones(3))
    only_shape = jaxstate.parametrized(lambda x: x * jaxstate.param("s", lambda key: x.mean()))
    with pytest.raises(jaxstate.InitializerDataError, match="only its shape"):
        only_shape.init(key, jax.ShapeDtypeStruct((3,), jnp.float32))


def test_data_for_a_module_made_inside_a_transformed_function(key):
    def f(x):
        layer = jaxstate.parametrized(
            lambda x: x + jaxstate.param("m", lambda key: x.mean() * 2), name="layer"
        )
        return layer(x)

    def scan(f):
        return lambda x: jax.lax.scan(lambda c, _: (c + f(x), None), x, length=2)[0]

    def cond(f):
        return lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: x, x)

    for wrap in (lambda f: f, jax.jit, jax.checkpoint, scan, cond):
        net = jaxstate.parametrized(wrap(f), name="net")
        assert net.init(key, jnp.arange(3.0)) == {"layer": {"m": 2.0}}


# -- Initializers that differ in one thing -----------------------------------------------------


FACTOR = 1.0


def by_keyword_default(factor):
    @wraps(lecun)
    def init(key, shape, dtype=jnp.float32, *, factor=factor):
        return factor * lecun(key, shape, dtype)

    return init


def by_default(factor):
    @wraps(lecun)
    def init(key, shape, dtype=jnp.float32, factor=factor):
        return factor * lecun(key, shape, dtype)

    return init


def by_closure(factor):
    return wraps(lecun)(lambda key, *args: factor * lecun(key, *args))


@wraps(lecun)
def reads_global(key, *args):
    return FACTOR * lecun(key, *args)


def by_global(factor):
    globals()["FACTOR"] = factor
    return reads_global


@wraps(lecun)
def reads_attribute(key, *args):
    return reads_attribute.factor * lecun(key, *args)


def by_attribute(factor):
    reads_attribute.factor = factor
    return reads_attribute


class Factor:
    def __init__(self, factor):
        update_wrapper(self, lecun)
        self.factor = factor

    def __call__(self, key, *args):
        return self.factor * lecun(key, *args)


def by_changed_default(factor, init=by_keyword_default(0.0)):
    init.__kwdefaults__ = {"factor": factor}
    return init


DIFFERING = [
    by_keyword_default, by_default, by_closure, by_global, by_attribute, Factor,
    by_changed_default, lambda factor: partial(by_default(1.0), factor=factor),
    lambda factor: Factor(factor).__call__,
    lambda factor: jax.nn.initializers.variance_scaling(factor**2, "fan_in", "truncated_normal"),
]  # fmt: skip


@pytest.mark.parametrize("make", DIFFERING, ids=lambda make: make.__name__)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_initializers_that_differ_in_one_thing_are_told_apart(make, wrap, key):
    def net(init):
        f = wrap(lambda x: x @ jaxstate.param("w", init, (4, 4)))
        return jaxstate.parametrized(lambda x: f(x), name="net")

    x = jnp.ones((2, 4))
    own = lecun(folded(key, "w"), (4, 4))
    for factor in (1.0, 10.0, 3.0, 10.0):
        p = net(make(factor)).init(key, x)
        np.testing.assert_allclose(p["w"], factor * own, rtol=1e-5)


def folded(key, path):
    for word in np.frombuffer(hashlib.sha256(path.encode()).digest(), "<u4", 2):
        key = jax.random.fold_in(key, word)
    return key


@pytest.mark.parametrize("init", ["zeros", "normal"])
def test_the_dtype_that_an_initializer_was_made_with(init, key):
    make = getattr(jax.nn.initializers, init)
    init = make(dtype=jnp.bfloat16) if init == "normal" else partial(make, dtype=jnp.bfloat16)
    net = jaxstate.parametrized(jax.jit(lambda: jaxstate.param("w", init, (2,)) + 1), name="net")
    assert net.init(key)["w"].dtype == jnp.bfloat16
    assert net.apply(net.init(key)).dtype == jnp.bfloat16


def test_arguments_that_are_equal_and_not_the_same(key):
    def init(key, value):
        return jnp.asarray(value)

    @jaxstate.parametrized
    def net():
        return [jaxstate.param(f"p{i}", init, v) for i, v in enumerate((1, 1.0, True, 0.0, -0.0))]

    params = net.init(key)
    for out in (net.apply(params), jax.jit(net.apply)(params)):
        kinds = [jnp.asarray(x).dtype.kind for x in out]
        assert kinds == ["i", "f", "b", "f", "f"] and np.signbit(out[4]) and not np.signbit(out[3])


@pytest.mark.parametrize("kind", ["threefry2x32", "rbg"])
def test_the_form_of_a_parameter_that_is_a_raw_key(kind):
    net = jaxstate.parametrized(lambda: jaxstate.param("k", lambda key: key), name="net")
    with jax.default_prng_impl(kind):
        params = net.init(jax.random.PRNGKey(0))
        raw = jaxstate.parametrized(
            lambda: jaxstate.param("k", lambda key: jax.random.key_data(key)), name="raw"
        )
        typed = raw.init(jax.random.key(0))
        assert (raw.apply(typed) == typed["k"]).all()
    assert params["k"].shape == jax.random.PRNGKey(0, impl=kind).shape
