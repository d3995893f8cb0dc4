"""Parameters: names, sharing, birth, and apply as a pure function."""

import copy
import dataclasses
import hashlib
import importlib
import inspect
import pickle
import subprocess
import sys
import threading
import types
from functools import partial, update_wrapper, wraps
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jaxstate
from jaxstate_tests.core.test_matrix import initial_parameter
from jaxstate_tests.sampling import part_of_product

normal = jax.nn.initializers.normal(1.0)
lecun = jax.nn.initializers.lecun_normal()
zeros = jax.nn.initializers.zeros


def dense(features):
    @jaxstate.parametrized
    def dense(x):
        w = jaxstate.param("w", lecun, (x.shape[-1], features))
        b = jaxstate.param("b", zeros, (features,))
        return x @ w + b

    return dense


def dense_by_hand(p, x):
    return x @ p["w"] + p["b"]


def scaled(name="scale"):
    @jaxstate.parametrized(name=name)
    def scale(x):
        return x * jaxstate.param("s", normal, ())

    return scale


def shapes(params):
    return jax.tree.map(jnp.shape, params)


def assert_trees_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, rtol=1e-5):
    """Each array to `rtol` of its largest element, which is what its sums are rounded to."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(partial(_assert_close, rtol), a, b)


def _assert_close(rtol, x, y):
    largest = np.max(np.abs(y), initial=0.1, where=np.isfinite(y))
    np.testing.assert_allclose(x, y, rtol=0, atol=rtol * largest)


# -- The example of the documentation --------------------------------------------------------


@jaxstate.parametrized
def net(x, layer=dense(8), head=dense(1)):
    x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(layer(x)), x)
    return jax.jit(head)(x)


def net_by_hand(p, x):
    for _ in range(3):
        x = jnp.tanh(dense_by_hand(p["dense"], x))
    return dense_by_hand(p["dense_1"], x)


def test_a_layer_in_a_loop_and_one_in_a_jit(key):
    x = jax.random.normal(key, (4, 8))
    params = net.init(key, x)
    assert shapes(params) == {
        "dense": {"w": (8, 8), "b": (8,)},
        "dense_1": {"w": (8, 1), "b": (1,)},
    }
    assert type(params) is dict and all(type(v) is dict for v in params.values())
    assert_trees_close(net.apply(params, x), net_by_hand(params, x))
    assert_trees_close(jax.jit(net.apply)(params, x), net_by_hand(params, x))
    loss = lambda f: lambda p: (f(p, x) ** 2).sum()  # noqa: E731
    for d in (jax.grad, lambda f: jax.jit(jax.grad(f)), lambda f: jax.grad(jax.jit(f))):
        assert_trees_close(d(loss(net.apply))(params), jax.grad(loss(net_by_hand))(params))


def test_the_jaxpr_of_apply_has_the_equations_of_the_hand_written_function(key):
    x = jnp.ones((4, 8))
    params = net.init(key, x)

    def by_hand(p, x):
        x = jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(dense_by_hand(p["dense"], x)), x)
        return jax.jit(dense_by_hand)(p["dense_1"], x)

    def equations(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for sub in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from equations(sub)

    found, wanted = (jax.make_jaxpr(f)(params, x) for f in (net.apply, by_hand))
    assert list(equations(found)) == list(equations(wanted))
    assert found.consts == []
    gradients = (
        jax.make_jaxpr(jax.grad(lambda p, f=f: f(p, x).sum()))(params) for f in (net.apply, by_hand)
    )
    found, wanted = gradients
    assert sorted(equations(found)) == sorted(equations(wanted))


# -- Names -----------------------------------------------------------------------------------


def test_names_follow_first_use_and_stay_when_a_layer_is_added(key):
    a, b, c = dense(2), dense(3), dense(4)
    x = jnp.ones(2)
    two = jaxstate.parametrized(lambda x: b(a(x)))
    three = jaxstate.parametrized(lambda x: c(b(a(x))))
    p2, p3 = two.init(key, x), three.init(key, x)
    assert list(p2) == ["dense", "dense_1"] and list(p3) == ["dense", "dense_1", "dense_2"]
    assert_trees_equal({k: p3[k] for k in p2}, p2)


def test_scopes_by_hand(key):
    @jaxstate.parametrized
    def f(x):
        with jaxstate.scope("encoder"):
            x = dense(2)(x)
        with jaxstate.scope("decoder"), jaxstate.scope("inner"):
            x = x * jaxstate.param("s", normal, ())
        with jaxstate.scope("encoder"):
            return x + jaxstate.param("shift", normal, ())

    p = f.init(key, jnp.ones(2))
    assert shapes(p) == {
        "encoder": {"dense": {"w": (2, 2), "b": (2,)}, "shift": ()},
        "decoder": {"inner": {"s": ()}},
    }
    np.testing.assert_array_equal(
        p["decoder"]["inner"]["s"], initial_parameter(key, "decoder/inner/s")
    )
    f.apply(p, jnp.ones(2))


def test_the_value_depends_on_key_and_path_only(key):
    def forwards(x):
        return x * jaxstate.param("a", normal, ()) + jaxstate.param("b", normal, ())

    def backwards(x):
        b = jaxstate.param("b", normal, ())
        jaxstate.param("new", normal, (3,))
        return jax.jit(lambda: x * jaxstate.param("a", normal, ()) + b)()

    p, q = (jaxstate.parametrized(f).init(key, 1.0) for f in (forwards, backwards))
    assert p["a"] == q["a"] == initial_parameter(key, "a")
    assert p["b"] == q["b"] == initial_parameter(key, "b")


def test_a_python_loop_equals_a_scan(key):
    cell = scaled()

    def python(x):
        for _ in range(3):
            x = jnp.sin(cell(x))
        return x

    def scan(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(cell(c)), None), x, None, length=3)[0]

    a, b = jaxstate.parametrized(python), jaxstate.parametrized(scan)
    p = a.init(key, 1.0)
    assert_trees_equal(p, b.init(key, 1.0))
    np.testing.assert_allclose(a.apply(p, 1.0), b.apply(p, 1.0), rtol=1e-6)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["no", "jit", "remat"])
def test_a_module_made_inside_a_function_that_is_called_twice(key, wrap):
    @jaxstate.parametrized
    def f(x):
        g = wrap(lambda x: scaled()(x))
        return g(g(x))

    p = f.init(key, 1.0)
    assert shapes(p) == {"scale": {"s": ()}, "scale_1": {"s": ()}}
    np.testing.assert_allclose(f.apply(p, 2.0), 2 * p["scale"]["s"] * p["scale_1"]["s"], rtol=1e-6)


def test_one_jitted_layer_in_two_scopes(key):
    @jax.jit
    def layer(x):
        return jnp.sin(x * jaxstate.param("s", normal, ()))

    @jaxstate.parametrized
    def f(x):
        for name in ("a", "b"):
            with jaxstate.scope(name):
                x = layer(x)
        return x

    p = f.init(key, 1.0)
    assert shapes(p) == {"a": {"s": ()}, "b": {"s": ()}} and p["a"]["s"] != p["b"]["s"]
    wanted = np.sin(np.sin(p["a"]["s"]) * p["b"]["s"])
    np.testing.assert_allclose(f.apply(p, 1.0), wanted, rtol=1e-6)


def test_one_object_under_two_parents_plain_and_jitted_is_one_entry(key):
    shared = scaled("shared")
    a = jaxstate.parametrized(lambda x: shared(x), name="a")
    b = jaxstate.parametrized(lambda x: jax.jit(shared)(x), name="b")
    f = jaxstate.parametrized(lambda x: a(x) + b(x) ** 2 + shared(x))
    p = f.init(key, 3.0)
    assert shapes(p) == {"a": {"shared": {"s": ()}}}
    s = p["a"]["shared"]["s"]
    np.testing.assert_allclose(f.apply(p, 3.0), 6 * s + 9 * s**2, rtol=1e-6)
    g = jax.grad(lambda p: f.apply(p, 3.0))(p)
    np.testing.assert_allclose(g["a"]["shared"]["s"], 6 + 18 * s, rtol=1e-5)


def test_every_instance_of_a_class_is_its_own_module(key):
    @dataclasses.dataclass
    class LinearMap:
        features: int

        @jaxstate.parametrized
        def __call__(self, x):
            return x @ jaxstate.param("w", lecun, (x.shape[-1], self.features))

        @jaxstate.parametrized
        def twice(self, x):
            return self(self(x))

    one, two = LinearMap(2), LinearMap(2)
    f = jaxstate.parametrized(lambda x: two(one(one(x))))
    p = f.init(key, jnp.ones(2))
    assert shapes(p) == {"linear_map": {"w": (2, 2)}, "linear_map_1": {"w": (2, 2)}}
    x = jnp.arange(2.0)
    w, v = p["linear_map"]["w"], p["linear_map_1"]["w"]
    np.testing.assert_allclose(f.apply(p, x), x @ w @ w @ v, rtol=1e-5)
    assert shapes(one.twice.init(key, x)) == {"linear_map": {"w": (2, 2)}}


def test_layers_of_two_branches_or_of_cond_and_body(key):
    """Their jaxprs are traced before either is bound: neither sees the other's names."""
    x, narrow, wide = jnp.ones(2), dense(3), dense(4)

    def branches(x):
        return jax.lax.cond(x.sum() > 0, lambda x: narrow(x).sum(), lambda x: wide(x).sum(), x)

    def loop(x):
        return jax.lax.while_loop(
            lambda c: (c[0] < 2) & (narrow(x).sum() < 1e9),
            lambda c: (c[0] + 1, c[1] + wide(x).sum()),
            (0, 0.0),
        )[1]

    for f, by_hand in (
        (branches, lambda p: dense_by_hand(p["dense"], x).sum()),
        (loop, lambda p: 2 * dense_by_hand(p["dense_1"], x).sum()),
    ):
        for net in (jaxstate.parametrized(f), jaxstate.parametrized(jax.jit(f), name="f")):
            p = net.init(key, x)
            assert shapes(p) == {
                "dense": {"w": (2, 3), "b": (3,)},
                "dense_1": {"w": (2, 4), "b": (4,)},
            }
            for dtype in (jnp.float32, jnp.bfloat16):
                q = jax.tree.map(lambda a, d=dtype: a.astype(d), p)
                np.testing.assert_allclose(net.apply(q, x), by_hand(q), rtol=1e-2)
            np.testing.assert_allclose(jax.jit(net.apply)(p, x), by_hand(p), rtol=1e-5)


def test_a_shared_layer_in_two_branches_has_one_place(key):
    layer = scaled()

    def in_scope(x):
        with jaxstate.scope("s"):
            return layer(x)

    net = jaxstate.parametrized(lambda x: jax.lax.cond(x > 0, layer, in_scope, x))
    p = net.init(key, 1.0)
    assert shapes(p) == {"scale": {"s": ()}}
    for x in (2.0, -2.0):
        np.testing.assert_allclose(net.apply(p, x), x * p["scale"]["s"], rtol=1e-6)


@pytest.mark.parametrize(
    "first", [jax.jit, jax.checkpoint, lambda f: f], ids=["jit", "remat", "no"]
)
def test_one_layer_first_transformed_then_plain(key, first):
    layer = scaled()
    net = jaxstate.parametrized(lambda x: first(layer)(x) + layer(x) + jax.jit(layer)(x))
    p = net.init(key, 1.0)
    np.testing.assert_allclose(net.apply(p, 2.0), 6 * p["scale"]["s"], rtol=1e-6)


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


# -- Apply -----------------------------------------------------------------------------------


def test_two_applies_through_one_cached_function(key):
    traces = []

    @jax.jit
    def layer(x):
        traces.append(x.shape)
        return x * jaxstate.param("s", normal, ())

    f = jaxstate.parametrized(layer)
    p = f.init(key, 2.0)
    del traces[:]
    with jax.checking_leaks.func(False):  # the checker turns JAX's caches off
        for factor in (1.0, 2.0, 3.0):
            q = jax.tree.map(lambda a, k=factor: a * k, p)
            np.testing.assert_allclose(f.apply(q, 2.0), 2 * q["s"], rtol=1e-6)
    assert traces == [()]


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
def test_a_loop_of_calls_of_one_jitted_stateful_function_traces_it_once(key):
    traces = []

    @jax.jit
    def step(x):
        traces.append(1)
        return x + jaxstate.random.uniform()

    with jaxstate.rng_stream(key) as stream:
        for _ in range(1000):
            step(1.0)
    assert len(traces) == 1 and stream.count == 1000


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
def test_a_cached_function_whose_parameter_changed_shape(key):
    size = [3]

    @jax.jit
    def f(x):
        return x * jaxstate.param("w", normal, (size[0],)).sum()

    net = jaxstate.parametrized(f)
    p3 = net.init(key, 1.0)
    np.testing.assert_allclose(net.apply(p3, 1.0), p3["w"].sum(), rtol=1e-6)
    size[0] = 5
    p5 = {"w": jnp.arange(5.0)}
    np.testing.assert_allclose(net.apply(p5, 1.0), 10.0)
    size[0] = 3
    np.testing.assert_allclose(net.apply(p3, 1.0), p3["w"].sum(), rtol=1e-6)


def test_parameters_of_another_dtype(key):
    f = jaxstate.parametrized(jax.jit(lambda x: x * jaxstate.param("w", normal, (3,))))
    p = f.init(key, jnp.ones(3))
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float16):
        q = jax.tree.map(lambda a, d=dtype: a.astype(d), p)
        assert f.apply(q, jnp.ones(3, dtype)).dtype == dtype
    numpy = jax.tree.map(np.asarray, p)
    np.testing.assert_array_equal(f.apply(numpy, jnp.ones(3)), p["w"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_a_parameter_of_another_shape_is_refused_with_the_type_that_is_wanted(dtype):
    ones = jax.nn.initializers.ones
    net = jaxstate.parametrized(lambda: jaxstate.param("w", ones, (3,), jnp.dtype(dtype)))
    for how in (lambda f: f, jax.jit):
        with pytest.raises(jaxstate.StateError, match=rf"wants {dtype}\[3\]"):
            how(net.apply)({"w": jnp.zeros(4, dtype)})


def test_a_parameter_that_is_a_tree(key):
    def init(key, n):
        return {"kernel": normal(key, (n,)), "scales": (jnp.ones(()), jnp.zeros(2))}

    f = jaxstate.parametrized(lambda x: jax.jit(lambda: jaxstate.param("layer", init, 3))())
    p = f.init(key, 0.0)
    assert shapes(p) == {"layer": {"kernel": (3,), "scales": ((), (2,))}}
    value = f.apply(p, 0.0)
    assert jax.tree.structure(value) == jax.tree.structure(init(key, 3))
    np.testing.assert_array_equal(value["kernel"], p["layer"]["kernel"])


def test_keys_of_apply_and_init(key):
    def f(x):
        return x + jaxstate.random.uniform() + jaxstate.random.uniform(stream="dropout")

    net, other = jaxstate.parametrized(f), jax.random.key(5)
    assert net.init({"params": key, "default": key, "dropout": other}, 0.0) == {}
    found = jax.jit(net.apply)({}, 0.0, key={"default": key, "dropout": other})
    wanted = jax.random.uniform(jax.random.fold_in(key, 0)) + jax.random.uniform(
        jax.random.fold_in(other, 0)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_explicit_apply_inside_a_body(key):
    inner = scaled("inner")

    @jaxstate.parametrized
    def outer(x, p1, p2):
        s = jaxstate.param("s", normal, ())
        y = jax.jit(inner.apply)(p1, x) + inner.apply(p2, x) * s
        with_key = jaxstate.parametrized(lambda: jaxstate.random.uniform()).apply({}, key=key)
        return y + with_key

    p1, p2 = {"s": jnp.float32(2)}, {"s": jnp.float32(3)}
    p = outer.init(key, 1.0, p1, p2)
    assert shapes(p) == {"s": ()}
    wanted = 2 + 3 * p["s"] + jax.random.uniform(jax.random.fold_in(key, 0))
    np.testing.assert_allclose(outer.apply(p, 1.0, p1, p2), wanted, rtol=1e-6)


def test_explicit_init_inside_a_body(key):
    inner = scaled("inner")

    @jaxstate.parametrized
    def outer(x):
        return jax.jit(inner.init)(key, x)["s"] * inner(x)

    p = outer.init(key, 1.0)
    wanted = initial_parameter(key, "s") * initial_parameter(key, "inner/s")
    np.testing.assert_allclose(outer.apply(p, 1.0), wanted, rtol=1e-6)


def test_returned_dicts_are_the_users_own(key):
    x = jnp.ones((4, 8))
    params = net.init(key, x)
    before = net.apply(params, x)
    copy = jax.tree.map(lambda a: a, params)
    params["dense"]["w"] = params["dense"]["w"] * 0
    params["unused"] = {"note": "left alone"}
    assert_trees_equal(net.apply(copy, x), before)
    np.testing.assert_allclose(net.apply(params, x), net_by_hand(params, x), rtol=1e-6)


def test_outside_of_init_and_apply_it_is_plain_python(key):
    double = jaxstate.parametrized(lambda x: 2 * x)
    assert double(3) == 6 and jax.jit(double)(3) == 6
    with jaxstate.scope("anything"):
        assert double(3) == 6


def test_disable_jit_finds_the_same_parameters(key):
    a, b = scaled(), scaled()
    net = jaxstate.parametrized(lambda x: jax.lax.cond(x > 0, a, b, x))
    p = net.init(key, 1.0)
    with jax.disable_jit():
        assert_trees_equal(net.init(key, 1.0), p)
        for x, name in ((2.0, "scale"), (-2.0, "scale_1")):
            np.testing.assert_allclose(net.apply(p, x), x * p[name]["s"], rtol=1e-6)


def test_an_initializer_that_reads_a_global(key):
    net = jaxstate.parametrized(lambda: jaxstate.param("w", by_global_size))
    for by_global_size.n in (3, 5):
        assert net.apply(net.init(key)).shape == (by_global_size.n,)


def by_global_size(key):
    return jnp.zeros(by_global_size.n)


@pytest.mark.parametrize("inner", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_an_initializer_that_runs_a_forward_pass_for_the_shapes(key, inner):
    """As a module of Flax does: what it computes from the data is thrown away."""

    def init(key, x):
        def forward(key, x):
            w = normal(key, (x.shape[-1], 3))
            return w, jnp.tanh(x @ w)

        return inner(forward)(key, x)[0]

    net = jaxstate.parametrized(
        lambda x: jax.lax.fori_loop(0, 2, lambda i, x: x @ jaxstate.param("w", init, x), x)
    )
    x = jnp.ones((2, 3))
    p = net.init(key, x)
    np.testing.assert_allclose(net.apply(p, x), x @ p["w"] @ p["w"], rtol=1e-6)
    lanes = jaxstate.parametrized(jax.vmap(lambda x: x @ jaxstate.param("w", init, x)), name="net")
    assert_trees_equal(lanes.init(key, x), p)


def test_an_initializer_that_closes_over_values_of_a_transformation_around_init(key):
    def initial(scale):
        def f(x):
            def body(i, x):
                return x * jaxstate.param("w", lambda key: scale * normal(key, (3,)))

            return jax.lax.fori_loop(0, 2, body, x)

        return jaxstate.parametrized(f).init(key, jnp.ones(3))["w"]

    w, scales = initial(1.0), jnp.arange(1.0, 4.0)
    for transformed in (jax.vmap(initial), jax.jit(jax.vmap(initial))):
        np.testing.assert_allclose(transformed(scales), scales[:, None] * w, rtol=1e-6)
    for derivative in (jax.jacrev(initial), jax.jacfwd(initial), jax.jit(jax.jacrev(initial))):
        np.testing.assert_allclose(derivative(2.0), w, rtol=1e-6)


def test_copies_are_modules_of_their_own(key):
    layer = scaled()
    for copied in (copy.copy(layer), copy.deepcopy(layer), *copy.deepcopy([layer, layer])):
        net = jaxstate.parametrized(lambda x, copied=copied: copied(layer(x)))
        assert shapes(net.init(key, 1.0)) == {"scale": {"s": ()}, "scale_1": {"s": ()}}
    one, again = copy.deepcopy((layer, layer))
    assert one is again


MODULE = """
import jax, jaxstate

@jaxstate.parametrized
def net(x):
    return x * jaxstate.param("w", jax.nn.initializers.ones, ())

nameless = jaxstate.parametrized(lambda x: net(x), name="other")
deep = jaxstate.stack(net, 3)

class Block:
    def __init__(self, n):
        self.n = n

    @jaxstate.parametrized
    def __call__(self, x):
        return self.n * x * jaxstate.param("w", jax.nn.initializers.ones, ())

    class Inner:
        @jaxstate.parametrized
        def f(self, x):
            return x
"""


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_stands_in_a_module_is_pickled_by_name(protocol, tmp_path, monkeypatch, key):
    (tmp_path / "module_of_nets.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("module_of_nets")
    again = lambda x: pickle.loads(pickle.dumps(x, protocol))  # noqa: E731
    Block = module.Block
    for net in (module.net, module.nameless, module.deep, Block.__call__, Block.Inner.f):
        assert again(net) is net
        assert again([net.apply, net])[0].__self__ is net
    shaped = again(module.net.shaped(jax.ShapeDtypeStruct((), jnp.float32)))
    assert shaped.net is module.net and shaped.init(key) == {"w": 1.0}
    for method in (again(Block(2)).__call__, again(Block(2).__call__)):
        assert method.apply({"w": 3.0}, 5.0) == 30.0
    made_here = [scaled(), jaxstate.stack(scaled(), 2), jaxstate.parametrized(MODULE.count)]
    for net in made_here:
        with pytest.raises(pickle.PicklingError, match="pickled by name"):
            again(net)


async def coroutine(x):
    return x


async def asynchronous(x):
    yield x


class Generating:
    def __call__(self, x):
        yield x

    def method(self, x):
        yield x


LATE = [coroutine, asynchronous, Generating(), Generating().method, lambda x: (yield x)]


@pytest.mark.parametrize("fn", [*LATE, *map(partial, LATE)], ids=range(2 * len(LATE)))
def test_a_function_that_does_not_run_when_it_is_called_is_refused(fn):
    with pytest.raises(TypeError, match="runs when it is called"):
        jaxstate.parametrized(fn)


def test_initializers_may_want_a_raw_key():
    raw = jax.random.PRNGKey(0)
    net = jaxstate.parametrized(
        lambda: jaxstate.param("w", lambda k: normal(jax.random.wrap_key_data(k), (3,)))
    )
    p = net.init(raw)
    assert_trees_equal(net.apply(p), p["w"])


def test_a_parameter_that_is_the_key_of_a_stream(key):
    with jaxstate.rng_stream(key) as stream:
        p = jaxstate.parametrized(lambda: jaxstate.param("k", lambda _: stream.key)).init(key)
    assert not isinstance(p["k"], jax.core.Tracer) and p["k"] == key


def test_a_callable_object_keeps_its_attributes_to_itself(key):
    class Layer:
        def __init__(self):
            self.name, self.init = "mine", "not a method"

        def __call__(self, x):
            return x * jaxstate.param("s", normal, ())

    net = jaxstate.parametrized(Layer(), name="net")
    assert net.name == "net" and shapes(net.init(key, 1.0)) == {"s": ()}
    assert shapes(jaxstate.parametrized(lambda x: net(x)).init(key, 1.0)) == {"net": {"s": ()}}


def test_a_pickled_tree_in_a_new_process(tmp_path, key):
    params = net.init(key, jnp.ones((4, 8)))
    (tmp_path / "params.pkl").write_bytes(pickle.dumps(jax.tree.map(np.asarray, params)))
    program = f"""
import pickle, jax.numpy as jnp
from jaxstate_tests.params.test_params import net
params = pickle.load(open({str(tmp_path / "params.pkl")!r}, "rb"))
print(float(net.apply(params, jnp.ones((4, 8))).sum()))
"""
    out = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    np.testing.assert_allclose(
        float(out.stdout), net.apply(params, jnp.ones((4, 8))).sum(), rtol=1e-5
    )


def test_threads_do_not_see_each_other(key):
    x = jnp.ones((4, 8))
    params = [net.init(jax.random.key(i), x) for i in range(8)]
    wanted = [np.asarray(net_by_hand(p, x)) for p in params]
    found, gate = {}, threading.Barrier(8)

    def work(i):
        gate.wait()
        found[i] = [np.asarray(net.apply(params[i], x)) for _ in range(5)]

    with jax.checking_leaks.func(False):  # threads do not share the setting
        workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        [w.start() for w in workers]
        [w.join() for w in workers]
    for i in range(8):
        for y in found[i]:
            np.testing.assert_allclose(y, wanted[i], rtol=1e-5)


def test_an_exception_inside_leaves_nothing_behind(key):
    @jaxstate.parametrized
    def fails(x):
        with jaxstate.scope("inner"):
            jax.jit(lambda: jaxstate.param("s", normal, ()) / 0 if x > 1e9 else 1 // 0)()

    for run in (lambda: fails.init(key, 1.0), lambda: fails.apply({}, 1.0)):
        with pytest.raises(ZeroDivisionError):
            run()
    with pytest.raises(jaxstate.MissingStoreError):
        jaxstate.param("s", normal, ())
    x = jnp.ones((4, 8))
    assert_trees_equal(net.init(key, x), net.init(key, x))


@pytest.mark.parametrize("jitted", [False, True], ids=["eager", "jit"])
def test_a_parameter_that_is_the_result_of_a_jaxpr_is_its_value(jitted):
    """What stands for it in the jaxpr, as a constant, is not given to the program."""

    @jaxstate.parametrized
    def net(x):
        read = lambda _: jaxstate.param("w", jax.nn.initializers.ones, ())  # noqa: E731
        f, constants = jax.closure_convert(read, x)
        made = jax.make_jaxpr(read)(x)
        return f(x, *constants), jax.core.eval_jaxpr(made.jaxpr, made.consts, x)[0]

    apply = jax.jit(net.apply) if jitted else net.apply
    for w in (2.0, 3.0):
        out = apply({"w": jnp.float32(w)}, 1.0)
        assert [type(y) for y in out] == [type(jnp.ones(()))] * 2
        assert out == (w, w)
    assert net.init(jax.random.key(0), 1.0) == {"w": 1.0}


# -- Methods -----------------------------------------------------------------------------------


class Scale:
    @jaxstate.parametrized
    def dense(self, x):
        return x * jaxstate.param("w", jax.nn.initializers.ones, ())


@dataclasses.dataclass(slots=True, weakref_slot=True)
class SlottedScale:
    size: int = 1

    @jaxstate.parametrized
    def dense(self, x):
        return x * jaxstate.param("w", jax.nn.initializers.ones, (self.size,)).sum()


class ScaleWithNew(Scale):
    def __new__(cls, *sizes):
        self = super().__new__(cls)
        self.sizes = sizes
        return self

    def __init__(self, *sizes):
        super().__init__()


FIRST_USES = {
    "jit": lambda f, x: jax.jit(f)(jax.jit(f)(x)),
    "cached jit": lambda f, x: (lambda g: g(g(x)))(jax.jit(f)),
    "checkpoint": lambda f, x: (lambda g: g(g(x)))(jax.checkpoint(f)),
    "branch, then loop": lambda f, x: jax.lax.fori_loop(
        0, 1, lambda _, x: f(x), jax.lax.cond(True, f, f, x)
    ),
}


@pytest.mark.parametrize("use", FIRST_USES)
@pytest.mark.parametrize("make", [Scale, SlottedScale, ScaleWithNew], ids=lambda c: c.__name__)
def test_an_instance_is_one_module_wherever_its_method_is_used_first(make, use, key):
    def network():
        layer = make()
        return jaxstate.parametrized(
            lambda x: FIRST_USES[use](lambda x: layer.dense(x), x), name="net"
        )

    x, params = jnp.float32(1), {"dense": {"w": 2.0}, "dense_1": {"w": 5.0}}
    if make is SlottedScale:
        params = jax.tree.map(lambda w: jnp.full((1,), w), params)
    assert network().init(key, x).keys() == {"dense"}
    assert network().apply(params, x) == 4  # of a network that was never initialized
    seen = network()
    seen.init(key, x)
    assert seen.apply(params, x) == 4


def test_an_instance_made_in_a_jitted_function_is_one_for_each_call(key):
    f = jax.jit(lambda x: Scale().dense(x))
    net = jaxstate.parametrized(lambda x: f(f(x)), name="net")
    assert net.init(key, 1.0).keys() == {"dense", "dense_1"}


def test_classes_with_parametrized_methods_are_made_as_ever():
    class WithInit:
        def __init__(self, n: int, *, m=3):
            self.n = n

        @jaxstate.parametrized
        def __call__(self, x):
            return x

    class Further(WithInit):
        def __init__(self, z):
            super().__init__(z)

    class Pair(NamedTuple):
        a: int

    class PairWithMethod(Pair):
        @jaxstate.parametrized
        def f(self, x):
            return x

    class PairAsItIs(PairWithMethod):
        pass

    shown = {Scale: "()", SlottedScale: "(size: int = 1) -> None", WithInit: "(n: int, *, m=3)"}
    shown |= {Further: "(z)", PairWithMethod: "(a: int)", ScaleWithNew: "(*sizes)"}
    shown |= {PairAsItIs: "(a: int)"}
    for cls, signature in shown.items():
        assert str(inspect.signature(cls)) == signature
    assert str(inspect.signature(WithInit(1))) == "(x)"
    assert PairWithMethod(3).a == 3 and ScaleWithNew(1, 2).sizes == (1, 2) and Further(4).n == 4
    assert copy.copy(ScaleWithNew(5)).sizes == (5,)
    with pytest.raises(TypeError, match="takes no arguments"):
        Scale(3)


# -- Types that a jaxpr was traced for ---------------------------------------------------------


SHARED = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "jit of checkpoint": lambda f: jax.jit(jax.checkpoint(f)),
    "scan": lambda f: (
        lambda body: lambda x: jax.lax.scan(body, x, None, length=1)[0]
    )(lambda x, _: (f(x), None)),
    "fori_loop": lambda f: (lambda body: lambda x: jax.lax.fori_loop(0, 1, body, x))(
        lambda i, x: f(x)
    ),
    "while_loop": lambda f: (
        lambda cond, body: lambda x: jax.lax.while_loop(cond, body, (0, x))[1]
    )(lambda c: c[0] < 1, lambda c: (c[0] + 1, f(c[1]))),
    "cond": lambda f: lambda x: jax.lax.cond(x.sum() < 1e9, f, f, x),
    "vmap": lambda f: (lambda g: lambda x: jax.vmap(g)(x[None])[0])(jax.jit(f)),
    "grad": lambda f: (lambda g: lambda x: x + jax.grad(lambda x: g(x).sum())(x))(jax.jit(f)),
    "custom_jvp": lambda f: with_rule(jax.jit(f)),
}  # fmt: skip


def with_rule(f):
    g = jax.custom_jvp(f)
    g.defjvp(lambda primals, tangents: (g(*primals), tangents[0]))
    return g


class Layer:
    def __init__(self, f):
        self.f = f

    @jaxstate.parametrized(name="layer")
    def __call__(self, x):
        return self.f(x)


def scopes_of(f):
    """Programs that use one function in the scopes "a", "b" and "a" again."""

    def by_hand(x):
        for name in ("a", "b", "a"):
            with jaxstate.scope(name):
                x = f(x)
        return x

    def modules(x):
        a, b = (jaxstate.parametrized(lambda x: f(x), name=name) for name in "ab")
        return a(b(a(x)))

    def instances(x):
        a, b = Layer(f), Layer(f)
        return a(b(a(x)))

    def nested(x):
        with jaxstate.scope("deep"), jaxstate.scope("er"):
            return by_hand(x)

    return {
        "scopes": by_hand,
        "modules": modules,
        "instances": instances,
        "in jit": jax.jit(by_hand),
        "in a loop": lambda x: jax.lax.fori_loop(0, 1, lambda i, x: modules(x), x),
        "nested": nested,
    }


W = jnp.arange(9.0).reshape(3, 3) / 8  # exact in all dtypes that are used


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
@pytest.mark.parametrize("wrap, program", part_of_product(2, SHARED, scopes_of(None)))
def test_a_function_that_scopes_with_parameters_of_other_types_share(wrap, program, key):
    def layer(x):
        return x + (x @ jaxstate.param("w", jax.nn.initializers.ones, (3, 3))).astype(x.dtype)

    net = jaxstate.parametrized(scopes_of(SHARED[wrap](layer))[program], name="net")
    x = jnp.ones(3)
    params = net.init(key, x)
    tree = jax.tree.structure(params)
    for dtypes in [(jnp.float32, jnp.bfloat16), (jnp.float16,) * 2]:
        a, b = (W.astype(dtype) for dtype in dtypes)

        def by_hand(a, b, x):
            for w in (a, b, a):
                f = lambda x, w=w: x + (x @ w).astype(x.dtype)  # noqa: E731
                x = x + jax.grad(lambda x, f=f: f(x).sum())(x) if wrap == "grad" else f(x)
            return x

        for apply in (net.apply, jax.jit(net.apply)):
            found, wanted = apply(tree.unflatten([a, b]), x), by_hand(a, b, x)
            np.testing.assert_allclose(found, wanted, rtol=1e-6)


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
def test_scopes_with_parameters_of_the_same_types_share_one_trace(key):
    traced = []

    @jax.jit
    def layer(x):
        traced.append(1)
        return x @ jaxstate.param("w", jax.nn.initializers.ones, (3, 3)).astype(x.dtype)

    @jaxstate.parametrized
    def net(x):
        for i in range(6):
            with jaxstate.scope(f"layer{i}"):
                x = layer(x)
        return x

    params = net.init(key, jnp.ones(3))
    del traced[:]
    net.apply(params, jnp.ones(3))
    assert len(traced) == 1
    for i in (1, 3, 5):
        params[f"layer{i}"]["w"] = params[f"layer{i}"]["w"].astype(jnp.bfloat16)
    net.apply(params, jnp.ones(3))
    assert len(traced) == 3


@pytest.mark.leaks_allowed("the checker turns JAX's caches off")
@pytest.mark.parametrize("shared", ["jit", "scan", "checkpoint"])
def test_a_function_shared_by_scopes_with_weak_and_strong_parameters(shared):
    f = SHARED[shared](lambda x: x * jaxstate.param("w", jax.nn.initializers.ones, ()))

    def both(x):
        with jaxstate.scope("a"):
            a = f(x) if shared != "scan" else f(x).astype(jnp.bfloat16)
        with jaxstate.scope("b"):
            return a, f(x)

    net = jaxstate.parametrized(both, name="net")
    x, weak, strong = jnp.bfloat16(1), 2.0, jnp.bfloat16(3)
    for a, b in ((weak, weak), (strong, strong), (weak, strong), (strong, weak)):
        assert net.apply({"a": {"w": a}, "b": {"w": b}}, x) == (a, b)


def test_variables_of_other_types_in_scopes_that_share_a_function(key):
    @jax.jit
    def f(x):
        v = jaxstate.variable("v", jnp.zeros, ())
        v.value = v.value + 1
        return x + v.value

    def both(x):
        for name in "aba":
            with jaxstate.scope(name):
                x = f(x)
        return x

    net = jaxstate.parametrized(both, name="net")
    state = {"a": {"v": jnp.float32(1)}, "b": {"v": jnp.int32(2)}}
    y, new = net.apply_with_state({}, state, 0.0)
    assert y == 2 + 3 + 3 and new == {"a": {"v": 3}, "b": {"v": 3}}
    assert new["a"]["v"].dtype == jnp.float32 and new["b"]["v"].dtype == jnp.int32


def test_parameters_in_a_mapping_that_is_no_pytree():
    layer = jax.jit(lambda x: x * jaxstate.param("w", jax.nn.initializers.ones, ()))
    net = jaxstate.parametrized(lambda x: layer(x), name="net")
    for w in (jnp.float32(2), 2.0, jnp.bfloat16(2), jnp.int32(2)):
        out = net.apply(types.MappingProxyType({"w": w}), jnp.bfloat16(1))
        wanted = jnp.bfloat16(1) * w
        assert out == wanted and out.dtype == wanted.dtype


def test_initializers_that_differ_in_the_sign_of_zero(key):
    @jaxstate.parametrized
    def net(x):
        a = jaxstate.param("a", jax.nn.initializers.constant(0.0), ())
        return a, jaxstate.param("b", jax.nn.initializers.constant(-0.0), ())

    params = net.init(key, 1.0)
    assert not np.signbit(params["a"]) and np.signbit(params["b"])


# -- Initializers that differ in one thing -----------------------------------------------------

lecun = jax.nn.initializers.lecun_normal()
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
